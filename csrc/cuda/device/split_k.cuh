// How the sums of a strip come together: of the readers of a block, and, where K is split, of the blocks. Readers add
// up in warp order, blocks in the order of K, so that a sum has the same bits whoever comes last.
//
// Where K is split, a strip takes three turns of the main loop, each a barrier of the readers after the one before, so
// that no reader ever waits for memory. n counts the strips of a block:
//   turn n      every reader multiplies its part of strip n;
//               after the barrier: the block's sums go out to memory (store);
//   turn n + 1  after the barrier, which stands behind all stores of strip n: one thread counts the block in (arrive);
//   turn n + 2  before the barrier: that thread, whose count has come back meanwhile, says whether this block was the
//               last of the strip (publish); after the barrier: if it was, its readers add up what all have stored
//               (totals), and the epilogue finishes the strip.
#pragma once

#include "ring.cuh"
#include "stream_shape.cuh"

namespace river::device {

using cuda::Workspace;

// The sums of the readers of a block, in shared memory. Two buffers for strips in turn, so that one barrier per strip
// is enough: the one that separates put() from total().
struct StripSums {
  float value[2][kReaders][kTileRows][kMaxRows];

  // sum: as mma leaves it, output rows g and g + 8 of x rows 2t and 2t + 1
  RIVER_DEVICE void put(int buffer, const float (&sum)[4]) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    auto& mine = value[buffer][warp_id()];
    mine[g][2 * t] = sum[0];
    mine[g][2 * t + 1] = sum[1];
    mine[g + 8][2 * t] = sum[2];
    mine[g + 8][2 * t + 1] = sum[3];
  }
  RIVER_DEVICE float total(int buffer, int output_row, int t) const {
    float sum = 0;
    for (int warp = 0; warp < kReaders; warp++) sum += value[buffer][warp][output_row][t];
    return sum;
  }
};

// The finished sums of a strip, for its epilogue
struct StripTotals {
  const StripSums* sums;  // of the readers of this block,
  int buffer;
  const float* partials;  // or [splits, 16, 8] of all blocks; null: K is not split
  int splits;

  RIVER_DEVICE float operator()(int output_row, int t) const {
    if (!partials) return sums->total(buffer, output_row, t);
    float sum = 0;
#pragma unroll 4
    for (int split = 0; split < splits; split++)  // all loads before the first sum, as far as they are unrolled
      sum += load_written(partials + (split * kTileRows + output_row) * kMaxRows + t);
    return sum;
  }
};

// What a reader needs for the three turns. n counts the strips of the block.
class SplitK {
 public:
  // came_last: in shared memory, for two strips in turn
  RIVER_DEVICE SplitK(const StreamShape& shape, const BlockWork& work, const Workspace& workspace, int (&came_last)[2])
      : shape_(shape), work_(work), workspace_(workspace), came_last_(came_last) {}

  RIVER_DEVICE bool used() const { return shape_.splits > 1; }

  // own: the sums of this block
  RIVER_DEVICE void store(int n, const StripTotals& own) const {
    const int output_row = threadIdx.x / kMaxRows, t = threadIdx.x % kMaxRows;
    if (output_row < kTileRows) partials(n)[(work_.split * kTileRows + output_row) * kMaxRows + t] = own(output_row, t);
  }

  RIVER_DEVICE void arrive(int n) {
    if (threadIdx.x != kArriver) return;
    gpu_fence();  // the sums of strip n, of all readers: it is the barrier since then that brings them here
    arrivals_before_ = atomicInc(workspace_.counters + work_.strip(n), shape_.splits - 1);  // wraps to zero
  }

  RIVER_DEVICE void publish(int n) const {
    if (threadIdx.x != kArriver) return;
    const bool last = arrivals_before_ == uint32_t(shape_.splits - 1);
    came_last_[n % 2] = last;
    if (last) gpu_fence();
  }

  RIVER_DEVICE bool came_last(int n) const { return came_last_[n % 2]; }
  RIVER_DEVICE StripTotals totals(int n) const {
    return {.sums = nullptr, .buffer = 0, .partials = partials(n), .splits = shape_.splits};
  }

 private:
  static constexpr int kArriver = kReaderThreads - kWarp;  // of a warp that sends no sums: its fence is short

  RIVER_DEVICE float* partials(int n) const {
    return workspace_.partials + int64_t(work_.strip(n)) * shape_.splits * kTileRows * kMaxRows;
  }

  const StreamShape& shape_;
  const BlockWork& work_;
  const Workspace& workspace_;
  int (&came_last_)[2];
  uint32_t arrivals_before_ = 0;  // of kArriver: how many blocks had come to the strip before this one
};

}  // namespace river::device
