// The kernel that streams a weight, dense or W4, through shared memory past the activations of T = 1..8 rows:
// out[t][n] = W[n] . x[t], a strip of 16 output rows at a time.
//
//   warp 8 (copies)    fills the ring with the weights of the block's strips (strips.cuh), at once: the kernels ahead
//                      do not write weights. It triggers the next kernel behind its last copy.
//   warps 0..7 (read)  wait for the kernels ahead, load x of the block's split to shared memory (activations.cuh), then
//                      go through the strips: multiply, add up (split_k.cuh), finish (epilogue.cuh).
//
// Which strips and which split a block has is told in stream_shape.cuh. Nothing depends on T or on the grid: each
// reader's sums have an order of their own, and are added in a fixed one.
#pragma once

#include <algorithm>

#include "epilogue.cuh"
#include "launch.h"
#include "strips.cuh"

namespace river::device {

using cuda::Overlap;

constexpr int kStaticBytes = 11 << 10;  // of kBlockBytes, at most, are static: the gate checks it
static_assert(StreamActivations<bf16, true>::bytes(kMaxRows, kSplitColumns / kTileCols) +
                      std::max(DenseFormat<bf16>::kStageBytes, W4Format<bf16>::kStageBytes) <=
                  kBlockBytes - kStaticBytes,
              "the most activations of a block leave room for a stage");

// A block without a strip keeps its place on an SM as long as the kernels ahead run. A kernel whose copies all fit its
// rings lets the next one start by then; that one's blocks would crowd on the SMs that idle blocks had left.
template <class Epilogue>
RIVER_DEVICE void end_idle_block(const Epilogue& epilogue) {
  dependency_trigger();
  dependency_wait();
  typename Epilogue::State none{};
  if (warp_id() < kReaders) epilogue.end(none);
}

// Whether the copying warp, its ring full, asks L2 for more before the kernels ahead have ended.
RIVER_DEVICE bool prefetches_deep(const Workspace& workspace) {
  return workspace.variants.deep_prefetch && workspace.overlap == Overlap::kPrefetch;
}

// The copying warp, behind its last copy. It triggers only now: a successor that fills its ring while this kernel
// streams has nothing left to ask for when this one's last bytes have come, and memory idles until its first stage is
// free.
RIVER_DEVICE void end_copying(const Workspace& workspace) {
  if (workspace.variants.late_trigger) dependency_trigger();
  dependency_wait();
}

// The readers, once x is loaded: all strips of the block. multiply(sum) adds one reader's part of the next strip. The
// turns behind the last strip finish what is still on its way between blocks.
template <class Epilogue, class Multiply>
RIVER_DEVICE void reduce_strips(const Epilogue& epilogue, typename Epilogue::State& state, const StreamShape& shape,
                                const BlockWork& work, const Workspace& workspace, Multiply multiply) {
  RIVER_SHARED(StripSums, sums, [1]);
  RIVER_SHARED(int, came_last, [2]);
  SplitK split(shape, work, workspace, came_last);
  typename Epilogue::Asked asked[3] = {};  // for strips n, n - 1, n - 2
  for (int n = 0; n < work.strips + (split.used() ? 2 : 0); n++) {
    float sum[4] = {};
    asked[2] = asked[1], asked[1] = asked[0];
    if (n < work.strips) {
      asked[0] = epilogue.ask(work.strip(n), state);
      multiply(sum);
    }
    if (split.used() && n >= 2) split.publish(n - 2);
    sums[0].put(n % 2, sum);
    barrier_sync(kReaderBarrier, kReaderThreads);
    int done = n;
    StripTotals totals{.sums = &sums[0], .buffer = n % 2, .partials = nullptr, .splits = 1};
    typename Epilogue::Asked ready = asked[0];
    if (split.used()) {
      if (n < work.strips) split.store(n, totals);
      if (n >= 1 && n <= work.strips) split.arrive(n - 1);
      if (n < 2 || !split.came_last(n - 2)) continue;
      done = n - 2, totals = split.totals(n - 2), ready = asked[2];
    }
    epilogue.finish(work.strip(done), totals, ready, state);  // once in the code: twice would take more registers
  }
  epilogue.end(state);
}

// Budget: 288 threads, 112 registers, 11264 shared, mma
template <class T, class Format, bool kBulk, class Source, class Input, class Epilogue>
__global__ void __launch_bounds__(kStreamThreads, 2)
    stream_kernel(Source weight,      // [out_features, in_features] of the shape, in Format
                  Input input,        // gives x [rows, in_features]
                  Epilogue epilogue,  // takes the sums [rows, out_features]
                  StreamShape shape, int rows,
                  int stages,           // of the ring, at the start of dynamic shared memory; x lies behind them
                  Workspace workspace)  // partials and counters of split strips
{
  RIVER_DYNAMIC_SHARED(memory);
  RIVER_SHARED(Ring<kBulk>, ring, [1]);
  RIVER_SHARED(RowSquares, squares, [1]);
  const BlockWork work(shape);
  if (work.idle(shape)) return end_idle_block(epilogue);
  if (!workspace.variants.late_trigger) dependency_trigger();
  ring[0].init(stages);
  __syncthreads();
  if (warp_id() == kReaders) {
    if (workspace.overlap != Overlap::kPrefetch) dependency_wait();
    CopyPlace place(stages, work);
    copy_weights<Format>(ring[0], place, stages, memory, weight, shape, work);
    if (prefetches_deep(workspace)) prefetch_weights<Format>(place, stages, weight, shape, work);
    copy_weights<Format>(ring[0], place, kAll, memory, weight, shape, work);
    end_copying(workspace);
    return;
  }
  const StreamActivations<T, Format::kPacked> x(memory + stages * Format::kStageBytes, rows, shape, work, squares[0]);
  input.prefetch(x);
  dependency_wait();
  typename Epilogue::State state = epilogue.begin();
  input.load(x);
  Cursor cursor(stages);
  reduce_strips(epilogue, state, shape, work, workspace,
                [&](float (&sum)[4]) { multiply_strip<Format>(sum, ring[0], cursor, memory, x, shape, work); });
}

// ---- the launch -------------------------------------------------------------------------------------

struct StreamLaunch {
  const char* name;  // for error messages
  StreamShape shape;
  int rows;  // T
  const Workspace& workspace;
  cudaStream_t stream;
};

// Kernels that may start early also copy in bulk: both take an sm_90.
inline bool may_overlap(const StreamLaunch& l) {
  return l.workspace.overlap != Overlap::kNone && device_facts().arch >= 90;
}

// The ring takes what the activations leave of a block's share of shared memory.
inline int stages_beside(int activation_bytes, int stage_bytes) {
  const int room = std::min(kBlockBytes, device_facts().shared_memory_per_block) - kStaticBytes - activation_bytes;
  return std::max(1, std::min(kMaxStages, room / stage_bytes));
}

inline int blocks_of(const StreamLaunch& l) {
  const int busy = std::max(1, std::min(l.workspace.blocks / l.shape.splits, l.shape.strips)) * l.shape.splits;
  return l.workspace.variants.full_grid ? std::max(busy, l.workspace.blocks) : busy;
}

// For a weight in one format (overloaded for a weight in both, decided_stream.cuh)
template <class T, class Source, class Input, class Epilogue>
void launch_stream(const StreamLaunch& l, const Source& weight, const Input& input, const Epilogue& epilogue) {
  using Format = FormatOf<T, Source>;
  const int activations = StreamActivations<T, Format::kPacked>::bytes(l.rows, l.shape.split_tiles);
  const int stages = stages_beside(activations, Format::kStageBytes);
  const bool overlap = may_overlap(l);
  launch(overlap ? stream_kernel<T, Format, true, Source, Input, Epilogue>
                 : stream_kernel<T, Format, false, Source, Input, Epilogue>,
         blocks_of(l), kStreamThreads, stages * Format::kStageBytes + activations, l.stream,
         {.name = l.name, .pdl = overlap}, weight, input, epilogue, l.shape, l.rows, stages, l.workspace);
}

}  // namespace river::device
