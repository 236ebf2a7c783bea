// A step whose rows find their own paths: one depth by either layer, and the end of the step.
#include "../step_rules.h"

#include <array>
#include <atomic>
#include <cstring>

#include "layer.h"

namespace river::cpu {

namespace {

using RowSimilarities = std::array<float, kMaxRows>;

// The active rows that have not left by then; exited: [T], of the layer
Rows in_backbone(const int32_t* slots, const int32_t* exited, int rows) {
  Rows inside;
  for (int t = 0; t < rows; t++)
    if (slots[t] >= 0 && !exited[t]) inside.add(t);
  return inside;
}

// Measures before and after, both [T, hidden], and writes the similarities of these rows, to [T]. Of the others the
// result may hold anything.
template <class Args>
RowSimilarities measure_rows(const Args& a, const Rows& rows, const void* before, const void* after,
                             float* similarities, const Parallel& parallel) {
  RowSimilarities measured{};
  if (rows.count() == 0) return measured;
  launch_state_similarity(
      {.dtype = a.dtype, .rows = a.rows, .hidden_size = a.hidden_size, .x = before, .y = after, .out = measured.data()},
      parallel);
  for (int i = 0; i < rows.count(); i++) similarities[rows.index[i]] = measured[rows.index[i]];
  return measured;
}

RowSimilarities similarities_before(const BlockArgs& a, const ExitDecision& d, const Parallel& parallel) {
  if (d.index == 0) return {};
  const int64_t before = int64_t(d.index - 1) * a.rows;
  const Rows rows = in_backbone(a.slots, d.exited + before, a.rows);
  return measure_rows(a, rows, d.previous, a.hidden, d.similarities + before, parallel);
}

// Writes the layer's entries of `exited`.
void decide(const BlockArgs& a, const ExitDecision& d, const Parallel& parallel) {
  const RowSimilarities similarities = similarities_before(a, d, parallel);
  int32_t* exited = d.exited + int64_t(d.index) * a.rows;
  bool left[kMaxRows], agrees[kMaxRows], all_agree = true;
  for (int t = 0; t < a.rows; t++) {
    left[t] = d.index > 0 && exited[t - a.rows];
    const float bar = exit_bar(d.thresholds[t], d.index, d.min_layers[t], d.limit[t]);
    agrees[t] = row_agrees(left[t], similarities[t], bar);
    if (a.slots[t] >= 0) all_agree &= agrees[t];
  }
  for (int t = 0; t < a.rows; t++) exited[t] = a.slots[t] >= 0 && row_exits(left[t], agrees[t], d.together, all_agree);
}

int exit_depth(const AdvanceArgs& a, int row) {
  int depth = 0;
  while (depth < a.layers && !a.exited[int64_t(depth) * a.rows + row]) depth++;
  return depth;
}

// All but the stamp
void write_record(const AdvanceArgs& a, int32_t* record) {
  for (int t = 0; t < a.rows; t++) {
    record[RecordLayout::kDepths + t] = exit_depth(a, t);
    record[RecordLayout::tokens(a.rows) + t] =
        recorded_token(a.slots[t] >= 0, a.tokens[t], is_drawn(a.tokens[t], a.vocab_size));
  }
  memcpy(record + RecordLayout::similarities(a.rows), a.similarities, int64_t(a.layers) * a.rows * sizeof(float));
}

// What the next step starts from, of active row t
void move_on(const AdvanceArgs& a, int t) {
  const int64_t token = a.tokens[t], bytes = a.hidden_size * size_of(a.dtype);
  const bool drawn = is_drawn(token, a.vocab_size);
  if (drawn)
    memcpy(static_cast<char*>(a.hidden) + t * bytes, static_cast<const char*>(a.embed_tokens) + token * bytes, bytes);
  const bool stop_token = is_stop_token(a.stop_tokens, a.num_stop_tokens, t, token);
  const NextRow next = next_row(a.positions[t], a.remaining[t], drawn, stop_token);
  a.positions[t] = next.position;
  a.draw_positions[t] = next.draw_position;
  a.remaining[t] = next.remaining;
  if (next.ends) a.slots[t] = -1;
}

}  // namespace

void launch_dual_layer(const DualLayerArgs& a, const Parallel& parallel) {
  const ExitDecision& d = a.decision;
  decide(a.block, d, parallel);
  const int32_t* exited = d.exited + int64_t(d.index) * a.block.rows;
  Rows block_rows, exit_rows;
  for (int t = 0; t < a.block.rows; t++)
    if (a.block.slots[t] >= 0) (exited[t] ? exit_rows : block_rows).add(t);
  run_both_ways(a, block_rows, exit_rows, parallel);
}

void launch_advance(const AdvanceArgs& a, const Parallel& parallel) {
  const int64_t last = int64_t(a.layers - 1) * a.rows;
  const Rows inside = in_backbone(a.slots, a.exited + last, a.rows);
  measure_rows(a, inside, a.before, a.after, a.similarities + last, parallel);
  const uint32_t step = *a.step;
  int32_t* record = a.records + step % a.num_records * RecordLayout::size(a.rows, a.layers);
  write_record(a, record);
  for (int t = 0; t < a.rows; t++)
    if (a.slots[t] >= 0) move_on(a, t);
  memset(a.exited, 0, int64_t(a.layers) * a.rows * sizeof(int32_t));
  *a.step = step + 1;
  // Who sees the stamp sees all of the record.
  std::atomic_ref(record[RecordLayout::kStamp]).store(step + 1, std::memory_order_release);
}

}  // namespace river::cpu
