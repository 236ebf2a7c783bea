// The ring of stages through which weights come from global to shared memory, and the warps at its two ends: a block
// has kReaders warps that multiply and one warp, the last, that copies. Copying runs ahead of the readers by as many
// stages as the ring has, which keeps the memory busy. Both sides walk the same stages in the same order, each with a
// Cursor: the copying warp waits until a stage is empty and fills it; the readers wait until it is full and release it
// one by one. The stages themselves lie in dynamic shared memory, as their number and size are the launch's choice.
#pragma once

#include "arch.cuh"
#include "launch.h"

namespace river::device {

constexpr int kReaders = 8;
constexpr int kReaderThreads = kReaders * kWarp;
constexpr int kStreamThreads = kReaderThreads + kWarp;
constexpr int kReaderBarrier = 1;  // named barrier of the readers alone

// Shared memory of a block, static and dynamic
constexpr int kBlockBytes = 113 << 10;
static_assert(2 * (kBlockBytes + (1 << 10)) <= 228 << 10, "two blocks, and what the system takes of each, fit an SM");

constexpr int kMaxStages = 24;

// Where one side of the ring stands: the stage, and the parity of how often the walk has come around.
struct Cursor {
  int stages, stage = 0;
  uint32_t parity = 0;
  RIVER_DEVICE explicit Cursor(int stages) : stages(stages) {}
  RIVER_DEVICE void next() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// Lies in static shared memory.
template <bool kBulk>
struct Ring {
  StageBarrier<kBulk> full[kMaxStages], empty[kMaxStages];

  // By all threads of the block, before a __syncthreads
  RIVER_DEVICE void init(int stages) {
    const int i = threadIdx.x;
    if (i >= stages) return;
    full[i].init_full();
    empty[i].init_empty(kReaders);
    mbarrier_init_fence();
  }

  // The copying warp, all lanes, before it fills the stage. No use precedes the first one, so it passes at once.
  RIVER_DEVICE void wait_until_empty(const Cursor& at) { empty[at.stage].wait(at.parity ^ 1); }
  // The readers
  RIVER_DEVICE void wait_until_full(const Cursor& at) { full[at.stage].wait(at.parity); }
  // One reader warp, which no longer reads the stage
  RIVER_DEVICE void release(const Cursor& at) {
    __syncwarp();
    if (lane_id() == 0) empty[at.stage].arrive();
  }
};

}  // namespace river::device
