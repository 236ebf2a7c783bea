// What ends the two kinds of step in lossless mode: a draft, and a verification.
#include <atomic>
#include <cstring>

#include "../river.h"
#include "../step_rules.h"

namespace river::cpu {

namespace {

// A token of request r, which stands in a row of the verification too
void embed(const LosslessArgs& a, int64_t token, int r, int row) {
  const int64_t bytes = a.hidden_size * size_of(a.dtype);
  const char* embedding = static_cast<const char*>(a.embed_tokens) + token * bytes;
  memcpy(static_cast<char*>(a.hidden) + r * bytes, embedding, bytes);
  memcpy(static_cast<char*>(a.verify_hidden) + row * bytes, embedding, bytes);
}

// Writes them down, too: tokens [V, R]
NewTokens new_tokens(const AcceptArgs& a, int r, int32_t* tokens) {
  NewTokens found = no_new_tokens(a.verify_positions[r], a.remaining[r]);
  for (int row = r; row < a.rows && found.follows(a.verify_slots[row] >= 0, a.drafts[row]); row += a.requests) {
    const int64_t target = a.tokens[row];
    const bool drawn = is_drawn(target, a.vocab_size);
    found = found.with(target, drawn, is_stop_token(a.stop_tokens, a.num_stop_tokens, r, target));
    tokens[row] = recorded_token(true, target, drawn);
  }
  return found;
}

// What the next cycle of request r starts from
void move_on(const AcceptArgs& a, int r, const NewTokens& found) {
  if (is_drawn(found.last, a.vocab_size)) embed(a, found.last, r, r);
  a.positions[r] = found.row.position;
  a.draw_positions[r] = found.row.draw_position;
  a.remaining[r] = found.row.remaining;
  a.slots[r] = a.verify_slots[r] = found.row.ends ? -1 : a.verify_slots[r];
  for (int i = 0; i < a.max_tokens; i++) {
    a.verify_positions[i * a.requests + r] = found.row.position + i;
    a.verify_draw_positions[i * a.requests + r] = found.row.draw_position + i;
  }
}

}  // namespace

void launch_draft_advance(const DraftAdvanceArgs& a, const Parallel&) {
  for (int r = 0; r < a.requests; r++) {
    if (a.slots[r] < 0) continue;
    const int64_t token = a.tokens[r];
    const NextDraft next = next_draft(a.index, a.wanted[r], is_drawn(token, a.vocab_size), a.margins[r] >= a.sure[r]);
    if (next.counts) {
      const int row = (a.index + 1) * a.requests + r;
      a.drafts[row] = token;
      a.verify_slots[row] = a.slots[r];
      embed(a, token, r, row);
      a.positions[r]++;
      a.draw_positions[r]++;
    }
    if (next.ends) a.slots[r] = -1;
  }
}

void launch_accept(const AcceptArgs& a, const Parallel&) {
  const int rows = a.max_tokens * a.requests;
  const uint32_t step = *a.step;
  int32_t* record = a.records + int64_t(step % a.num_records) * CycleLayout::size(a.requests, rows);
  int32_t* tokens = record + CycleLayout::tokens(a.requests);
  for (int row = 0; row < rows; row++) tokens[row] = kInactive;
  for (int r = 0; r < a.requests; r++) {
    const NewTokens found = new_tokens(a, r, tokens);
    record[CycleLayout::kCounts + r] = found.count > 0 ? found.count : kInactive;
    if (found.count > 0) move_on(a, r, found);
  }
  for (int row = 0; row < rows; row++) a.drafts[row] = -1;
  for (int row = a.requests; row < rows; row++) a.verify_slots[row] = -1;
  *a.step = step + 1;
  // Who sees the stamp sees all of the record.
  std::atomic_ref(record[CycleLayout::kStamp]).store(step + 1, std::memory_order_release);
}

}  // namespace river::cpu
