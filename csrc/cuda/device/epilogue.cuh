// What a streaming kernel does with the sums of its strips. An Epilogue has
//   begin() -> State
//       what a reader keeps in registers for the whole kernel; the first to read what the kernels ahead wrote;
//   ask(strip, state) -> Asked
//       what a strip wants beside its sums: asked for before the strip is multiplied, so that it has come by then;
//   finish(strip, totals, asked, state)
//       takes the sums of a strip, totals(output row 0..15, row t), and writes results. All readers call it; thread i
//       has output row i / 8 of row t = i % 8;
//   end(state)
//       once per block, by the readers of idle blocks too.
// Which strips a block finishes, and in which order, depends on the grid and on chance; no result does.
#pragma once

#include "ring.cuh"
#include "split_k.cuh"

namespace river::device {

// An epilogue that keeps nothing and asks for nothing; others replace what they need.
struct PlainEpilogue {
  struct State {};
  struct Asked {};
  RIVER_DEVICE State begin() const { return {}; }
  template <class AnyState>
  RIVER_DEVICE Asked ask(int, const AnyState&) const {
    return {};
  }
  template <class AnyState>
  RIVER_DEVICE void end(AnyState&) const {}
};

// Of this thread: an output row of a strip (or 16 and more: none), and a row of x
RIVER_DEVICE int output_row_of_thread() { return threadIdx.x / kMaxRows; }
RIVER_DEVICE int row_of_thread() { return threadIdx.x % kMaxRows; }

// True for the readers of the last of `count` blocks to come here; the counter wraps to zero. All readers call it. What
// the readers of a block wrote before is then visible to the last block, through load_written.
RIVER_DEVICE bool readers_arrive_last(uint32_t* counter, int count) {
  RIVER_SHARED(int, last, [1]);
  barrier_sync(kReaderBarrier, kReaderThreads);
  if (threadIdx.x == 0) {
    gpu_fence();  // after the barrier: it releases what all readers wrote
    last[0] = atomicInc(counter, count - 1) == unsigned(count - 1);
    gpu_fence();
  }
  barrier_sync(kReaderBarrier, kReaderThreads);
  const bool result = last[0];
  barrier_sync(kReaderBarrier, kReaderThreads);
  return result;
}

}  // namespace river::device
