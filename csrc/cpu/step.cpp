// A step whose path is chosen by the op: one depth by either layer, and the end of the step.
#include "../step_rules.h"

#include <array>
#include <atomic>
#include <cstring>

#include "../river.h"

namespace river::cpu {

namespace {

using RowSimilarities = std::array<float, kMaxRows>;

// Measures all rows of before and after, both [T, hidden], and writes those of active rows to similarities, [T].
template <class Args>
RowSimilarities measure_rows(const Args& a, const void* before, const void* after, float* similarities,
                             const Parallel& parallel) {
  RowSimilarities measured;
  launch_state_similarity(
      {.dtype = a.dtype, .rows = a.rows, .hidden_size = a.hidden_size, .x = before, .y = after, .out = measured.data()},
      parallel);
  for (int t = 0; t < a.rows; t++)
    if (a.slots[t] >= 0) similarities[t] = measured[t];
  return measured;
}

bool all_rows_agree(const BlockArgs& a, const ExitDecision& d, const Parallel& parallel) {
  float* written = d.similarities + int64_t(d.index - 1) * a.rows;
  const RowSimilarities similarity = measure_rows(a, d.previous, a.hidden, written, parallel);
  bool all = true;
  for (int t = 0; t < a.rows; t++)
    all &= row_agrees(similarity[t], exit_bar(a.slots[t] >= 0, d.thresholds[t], d.index, d.min_layers[t]));
  return all;
}

int exit_depth(const AdvanceArgs& a) {
  int depth = 0;
  while (depth < a.layers && !a.exited[depth]) depth++;
  return depth;
}

// All but the stamp
void write_record(const AdvanceArgs& a, int32_t* record) {
  record[RecordLayout::kDepth] = exit_depth(a);
  for (int t = 0; t < a.rows; t++)
    record[RecordLayout::kTokens + t] =
        recorded_token(a.slots[t] >= 0, a.tokens[t], is_drawn(a.tokens[t], a.vocab_size));
  memcpy(record + RecordLayout::similarities(a.rows), a.similarities, int64_t(a.layers) * a.rows * sizeof(float));
}

// What the next step starts from, of active row t
void move_on(const AdvanceArgs& a, int t) {
  const int64_t token = a.tokens[t], bytes = a.hidden_size * size_of(a.dtype);
  const bool drawn = is_drawn(token, a.vocab_size);
  if (drawn)
    memcpy(static_cast<char*>(a.hidden) + t * bytes, static_cast<const char*>(a.embed_tokens) + token * bytes, bytes);
  bool stop_token = false;
  for (int i = 0; i < a.num_stop_tokens; i++) stop_token |= token == a.stop_tokens[i];
  const NextRow next = next_row(a.positions[t], a.remaining[t], drawn, stop_token);
  a.positions[t] = next.position;
  a.draw_positions[t] = next.draw_position;
  a.remaining[t] = next.remaining;
  if (next.ends) a.slots[t] = -1;
}

}  // namespace

void launch_dual_layer(const DualLayerArgs& a, const Parallel& parallel) {
  const ExitDecision& d = a.decision;
  const bool left = d.index > 0 && d.exited[d.index - 1];
  const bool agreed = asks_rows(d.index, left) && all_rows_agree(a.block, d, parallel);
  const bool exits = runs_as_exit_layer(d.index, left, *d.limit, agreed);
  d.exited[d.index] = exits;
  float unused[kMaxRows];  // a layer's own similarity: the next depth measures it if it decides
  if (exits) {
    ExitLayerArgs layer = a.exit_layer;
    layer.similarity = unused;
    launch_exit_layer(layer, parallel);
  } else {
    DecoderBlockArgs layer = a.block;
    layer.similarity = unused;
    launch_decoder_block(layer, parallel);
  }
}

void launch_advance(const AdvanceArgs& a, const Parallel& parallel) {
  const int last = a.layers - 1;
  if (!a.exited[last]) measure_rows(a, a.before, a.after, a.similarities + int64_t(last) * a.rows, parallel);
  const uint32_t step = *a.step;
  int32_t* record = a.records + step % a.num_records * RecordLayout::size(a.rows, a.layers);
  write_record(a, record);
  for (int t = 0; t < a.rows; t++)
    if (a.slots[t] >= 0) move_on(a, t);
  memset(a.exited, 0, a.layers * sizeof(int32_t));
  *a.step = step + 1;
  // Who sees the stamp sees all of the record.
  std::atomic_ref(record[RecordLayout::kStamp]).store(step + 1, std::memory_order_release);
}

}  // namespace river::cpu
