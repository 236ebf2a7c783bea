// A step whose path is chosen by the op: one depth by either layer, and the end of the step.
#include <atomic>
#include <cstring>

#include "../river.h"

namespace river::cpu {

namespace {

// The similarities [T] of the rows of x and y, of active rows only
void measure_active(DType dtype, int rows, int hidden_size, const void* x, const void* y, const int32_t* slots,
                    float* similarities, const Parallel& parallel) {
  float measured[kMaxRows];
  launch_state_similarity({dtype, rows, hidden_size, x, y, measured}, parallel);
  for (int t = 0; t < rows; t++)
    if (slots[t] >= 0) similarities[t] = measured[t];
}

// Where the path leaves the backbone, by the layer before and by the rule; measures the similarity it needs.
bool river_begun(const BlockArgs& a, const ExitDecision& d, const Parallel& parallel) {
  if (d.index == 0) return false;
  if (d.exited[d.index - 1]) return true;
  float* similarity = d.similarities + (int64_t)(d.index - 1) * a.rows;
  measure_active(a.dtype, a.rows, a.hidden_size, d.previous, a.hidden, a.slots, similarity, parallel);
  for (int t = 0; t < a.rows; t++)
    if (a.slots[t] >= 0 && !(similarity[t] > d.thresholds[t] && d.index >= d.min_layers[t])) return false;
  return true;
}

}  // namespace

void launch_dual_layer(const DualLayerArgs& a, const Parallel& parallel) {
  const ExitDecision& d = a.decision;
  const bool begun = river_begun(a.block, d, parallel), exits = begun || d.index >= *d.limit;
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
  if (!a.exited[a.layers - 1])
    measure_active(a.dtype, a.rows, a.hidden_size, a.before, a.after, a.slots,
                   a.similarities + (int64_t)(a.layers - 1) * a.rows, parallel);
  int depth = 0;
  while (depth < a.layers && !a.exited[depth]) depth++;

  const uint32_t n = *a.step;
  const int64_t count = (int64_t)a.layers * a.rows;
  int32_t* record = a.records + n % a.num_records * (2 + a.rows + count);
  record[1] = depth;
  const auto is_drawn = [&](int64_t token) { return token >= 0 && token < a.vocab_size; };
  for (int t = 0; t < a.rows; t++) {
    const int64_t token = a.tokens[t];
    record[2 + t] = a.slots[t] < 0 ? kInactive : is_drawn(token) ? (int32_t)token : kFailed;
  }
  memcpy(record + 2 + a.rows, a.similarities, count * sizeof(float));

  const int64_t bytes = a.hidden_size * size_of(a.dtype);
  for (int t = 0; t < a.rows; t++) {
    if (a.slots[t] < 0) continue;
    const int64_t token = a.tokens[t];
    if (is_drawn(token)) memcpy((char*)a.hidden + t * bytes, (const char*)a.embed_tokens + token * bytes, bytes);
    a.positions[t]++;
    a.draw_positions[t] = a.positions[t] + 1;
    bool ends = --a.remaining[t] <= 0 || !is_drawn(token);
    for (int i = 0; i < a.num_stop_tokens; i++) ends |= token == a.stop_tokens[i];
    if (ends) a.slots[t] = -1;
  }
  memset(a.exited, 0, a.layers * sizeof(int32_t));
  *a.step = n + 1;
  std::atomic_ref(record[0]).store(n + 1, std::memory_order_release);  // who sees it sees all of the record
}

}  // namespace river::cpu
