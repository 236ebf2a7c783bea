// advance: the end of a step. It finishes the record of the step, which the host polls, and turns the rows' state into
// what the next step starts from: embeddings, positions, and no row that has drawn its last token. The work is small
// and each part needs what the part before has left alone, so that one block does all of it.
#include "../step_rules.h"
#include "device/embed.cuh"
#include "device/launch.h"
#include "device/similarity.cuh"

namespace river::cuda {
namespace {

using namespace device;

constexpr int kThreads = kParts * kWarp;

RIVER_DEVICE bool is_active(const AdvanceArgs& a, int row) { return load_written(a.slots + row) >= 0; }

RIVER_DEVICE bool has_left(const AdvanceArgs& a, int layer, int row) {
  return load_written(a.exited + int64_t(layer) * a.rows + row);
}

// The similarities of the last layer, which no other kernel measures
template <class T>
RIVER_DEVICE void finish_similarities(const AdvanceArgs& a) {
  RIVER_SHARED(float, similarities, [kMaxRows]);
  RIVER_SHARED(RowSquares, squares, [1]);
  const int last = a.layers - 1, t = lane_id();
  const bool measured = t < a.rows && is_active(a, t) && !has_left(a, last, t);
  if (!ballot(measured)) return;  // the same in all warps
  measure_rows(
      static_cast<const T*>(a.before), static_cast<const T*>(a.after), a.rows, a.hidden_size, similarities, squares[0],
      [] { __syncthreads(); }, KeepNothing{});
  if (warp_id() == 0 && measured) a.similarities[int64_t(last) * a.rows + t] = similarities[t];
}

// The first layer that the row ran as an exit layer, by one warp
RIVER_DEVICE int exit_depth(const AdvanceArgs& a, int row) {
  int depth = a.layers;
  for (int i = a.layers - 1 - lane_id(); i >= 0; i -= kWarp)
    if (has_left(a, i, row)) depth = i;
  return over_warp(depth, [](int a, int b) { return min(a, b); });
}

// All but the stamp
RIVER_DEVICE void write_record(const AdvanceArgs& a, int32_t* record) {
  static_assert(kMaxRows <= kThreads / kWarp, "each row has a warp");
  if (warp_id() < a.rows) {
    const int depth = exit_depth(a, warp_id());
    if (lane_id() == 0) record[RecordLayout::kDepths + warp_id()] = depth;
  }
  int32_t* tokens = record + RecordLayout::tokens(a.rows);
  for (int t = threadIdx.x; t < a.rows; t += kThreads) {
    const int64_t token = load_written(a.tokens + t);
    tokens[t] = recorded_token(is_active(a, t), token, is_drawn(token, a.vocab_size));
  }
  int32_t* similarities = record + RecordLayout::similarities(a.rows);
  for (int i = threadIdx.x; i < a.layers * a.rows; i += kThreads)
    similarities[i] = int32_t(__float_as_uint(load_written(a.similarities + i)));
}

// What the row goes on with, or kNoToken
RIVER_DEVICE int64_t next_token(const AdvanceArgs& a, int row) {
  if (row >= a.rows || !is_active(a, row)) return kNoToken;
  const int64_t token = load_written(a.tokens + row);
  return is_drawn(token, a.vocab_size) ? token : kNoToken;
}

RIVER_DEVICE void move_on(const AdvanceArgs& a, int t) {
  if (!is_active(a, t)) return;
  const int64_t token = load_written(a.tokens + t);
  const bool drawn = is_drawn(token, a.vocab_size);
  const bool stop_token = is_stop_token(a.stop_tokens, a.num_stop_tokens, t, token);
  const NextRow next = next_row(load_written(a.positions + t), load_written(a.remaining + t), drawn, stop_token);
  a.positions[t] = next.position;
  a.draw_positions[t] = next.draw_position;
  a.remaining[t] = next.remaining;
  if (next.ends) a.slots[t] = -1;
}

// Budget: 256 threads, 96 registers
template <class T>
__global__ void __launch_bounds__(kThreads) advance_kernel(AdvanceArgs a) {  // shapes: river.h
  RIVER_SHARED(int64_t, next_tokens, [kMaxRows]);
  dependency_trigger();
  dependency_wait();
  const int t = threadIdx.x;
  const uint32_t step = load_written(a.step);
  int32_t* record = a.records + step % a.num_records * RecordLayout::size(a.rows, a.layers);
  if (t < kMaxRows) next_tokens[t] = next_token(a, t);
  finish_similarities<T>(a);
  __syncthreads();  // the similarities are there, and nobody reads `hidden` any more
  write_record(a, record);
  embed<kThreads>(next_tokens, a.embed_tokens, a.hidden_size, a.hidden);
  __syncthreads();  // all have read the slots and the path, and written their part of the record
  for (int i = t; i < a.layers * a.rows; i += kThreads) a.exited[i] = 0;
  if (t < a.rows) move_on(a, t);
  if (t == 0) {
    a.step[0] = step + 1;
    // One release is enough for what all threads wrote: the barrier has ordered that before it.
    store_release_system(reinterpret_cast<uint32_t*>(record + RecordLayout::kStamp), step + 1);
  }
}

}  // namespace

void launch_advance(const AdvanceArgs& a, const Workspace& workspace, Stream stream) {
  const LaunchOptions options{.name = "advance", .pdl = workspace.overlap != Overlap::kNone};
  with_16bit_dtype(a.dtype, [&]<class T>() { launch(advance_kernel<T>, 1, kThreads, 0, stream, options, a); });
}

}  // namespace river::cuda
