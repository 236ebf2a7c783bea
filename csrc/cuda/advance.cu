// advance: the end of a step, by one block: the record for the host, and what the next step starts from.
#include "../step_rules.h"
#include "device/launch.h"
#include "device/row_sums.cuh"

namespace river::cuda {
namespace {

using namespace device;

constexpr int kThreads = kParts * kWarp;

// The similarity of the last layer, which no other kernel looks at
template <class T>
RIVER_DEVICE void finish_similarities(const AdvanceArgs& a) {
  RIVER_SHARED(float, similarities, [kMaxRows]);
  RIVER_SHARED(RowSquares, squares, [1]);
  if (load_written(a.exited + a.layers - 1)) return;
  measure_rows(
      static_cast<const T*>(a.before), static_cast<const T*>(a.after), a.rows, a.hidden_size, similarities, squares[0],
      [] { __syncthreads(); }, KeepNothing{});
  const int t = threadIdx.x;
  if (t < a.rows && load_written(a.slots + t) >= 0)
    a.similarities[int64_t(a.layers - 1) * a.rows + t] = similarities[t];
}

RIVER_DEVICE bool is_drawn(const AdvanceArgs& a, int64_t token) { return token >= 0 && token < a.vocab_size; }

// All but the stamp
RIVER_DEVICE void write_record(const AdvanceArgs& a, int32_t* record) {
  if (warp_id() == 0) {
    int depth = a.layers;  // the first layer that ran as an exit layer
    for (int i = a.layers - 1 - lane_id(); i >= 0; i -= kWarp)
      if (load_written(a.exited + i)) depth = i;
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) depth = min(depth, shuffle_xor(depth, lanes));
    if (lane_id() == 0) record[1] = depth;
  }
  for (int t = threadIdx.x; t < a.rows; t += kThreads) {
    const int64_t token = load_written(a.tokens + t);
    record[2 + t] = load_written(a.slots + t) < 0 ? kInactive : is_drawn(a, token) ? int32_t(token) : kFailed;
  }
  for (int i = threadIdx.x; i < a.layers * a.rows; i += kThreads)
    record[2 + a.rows + i] = static_cast<int32_t>(__float_as_uint(load_written(a.similarities + i)));
}

template <class T>
RIVER_DEVICE void embed(const AdvanceArgs& a) {
  const int pieces = a.hidden_size / 8;  // of 16 bytes
  for (int i = threadIdx.x; i < a.rows * pieces; i += kThreads) {
    const int row = i / pieces;
    const int64_t token = load_written(a.tokens + row);
    if (load_written(a.slots + row) < 0 || !is_drawn(a, token)) continue;
    static_cast<uint4*>(a.hidden)[i] = static_cast<const uint4*>(a.embed_tokens)[token * pieces + i % pieces];
  }
}

RIVER_DEVICE void move_on(const AdvanceArgs& a, int t) {
  if (load_written(a.slots + t) < 0) return;
  const int64_t token = load_written(a.tokens + t);
  const int remaining = load_written(a.remaining + t) - 1, position = load_written(a.positions + t) + 1;
  bool last = remaining <= 0 || !is_drawn(a, token);
  for (int i = 0; i < a.num_stop_tokens; i++) last |= token == a.stop_tokens[i];
  a.remaining[t] = remaining;
  a.positions[t] = position;
  a.draw_positions[t] = position + 1;
  if (last) a.slots[t] = -1;
}

// Budget: 256 threads, 96 registers
template <class T>
__global__ void __launch_bounds__(kThreads) advance_kernel(AdvanceArgs a) {
  dependency_trigger();
  dependency_wait();
  const uint32_t step = load_written(a.step);
  int32_t* record = a.records + int64_t(step % a.num_records) * (2 + a.rows + a.layers * a.rows);
  finish_similarities<T>(a);
  __syncthreads();
  write_record(a, record);
  embed<T>(a);
  __syncthreads();  // all have read the slots and the path, and written their part of the record
  for (int i = threadIdx.x; i < a.layers; i += kThreads) a.exited[i] = 0;
  if (int(threadIdx.x) < a.rows) move_on(a, threadIdx.x);
  if (threadIdx.x == 0) {
    a.step[0] = step + 1;
    // One release is enough for what all threads wrote: the barrier has ordered that before it.
    store_release_system(reinterpret_cast<uint32_t*>(record), step + 1);
  }
}

}  // namespace

void launch_advance(const AdvanceArgs& a, const Workspace& workspace, Stream stream) {
  with_16bit_dtype(a.dtype, [&]<class T>() {
    launch(advance_kernel<T>, 1, kThreads, 0, stream, {"advance", workspace.overlap != Overlap::kNone}, a);
  });
}

}  // namespace river::cuda
