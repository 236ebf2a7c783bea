// The kernel of stream.cuh for a weight that lies there in both formats, of which the device decides for one
// (decision.cuh). The same warps do the same work, with a ring for each format in the same memory. The copying warp
// fills the ring on a guess, while the kernels ahead still run, and starts again where the guess was wrong.
#pragma once

#include "decision.cuh"
#include "stream.cuh"

namespace river::device {

constexpr int kDecisionBarrier = 2;  // named barrier of all warps of a block

// The same weight in both formats, strip for strip
template <class Rows, class Decision>
struct DecidedWeight {
  Rows dense;
  PackedTiles packed;
  Decision decision;
};

// How a launch cuts the memory before the activations
struct RingSizes {
  int dense_stages, packed_stages;  // of either format
  int bytes;                        // that the larger ring takes
  RIVER_DEVICE int stages(bool packed) const { return packed ? packed_stages : dense_stages; }
};

// The copying warp. decided: in shared memory, written before kDecisionBarrier.
template <class T, bool kBulk, class Rows, class Decision>
RIVER_DEVICE void copy_decided_weights(Ring<kBulk> (&rings)[2], const RingSizes& sizes, unsigned char* memory,
                                       const DecidedWeight<Rows, Decision>& weight, const int& decided,
                                       const StreamShape& shape, const BlockWork& work, bool deep) {
  using Dense = DenseFormat<T>;
  using Packed = W4Format<T>;
  bool packed = shuffle(int(weight.decision.guess()), 0);  // it may change under the loads: one lane's for all
  CopyPlace place(sizes.stages(packed), work);
  const auto copy = [&](int limit) {
    return packed ? copy_weights<Packed>(rings[1], place, limit, memory, weight.packed, shape, work)
                  : copy_weights<Dense>(rings[0], place, limit, memory, weight.dense, shape, work);
  };
  const int guessed = copy(sizes.stages(packed));
  if (deep && packed) prefetch_weights<Packed>(place, sizes.packed_stages, weight.packed, shape, work);
  if (deep && !packed) prefetch_weights<Dense>(place, sizes.dense_stages, weight.dense, shape, work);
  barrier_sync(kDecisionBarrier, kStreamThreads);
  if (packed != bool(decided)) {
    for (int i = 0; i < guessed; i++) rings[packed].full[i].wait(0);  // landed: the memory is free, nobody reads it
    packed = !packed;
    place = CopyPlace(sizes.stages(packed), work);
  }
  copy(kAll);
}

// Budget: 288 threads, 112 registers, 11264 shared, mma
template <class T, bool kBulk, class Weight, class Input, class Epilogue>
__global__ void __launch_bounds__(kStreamThreads, 2)
    decided_stream_kernel(Weight weight,      // DecidedWeight: [out_features, in_features] of the shape, twice
                          Input input,        // gives x [rows, in_features]
                          Epilogue epilogue,  // takes the sums [rows, out_features]
                          StreamShape shape, int rows,
                          RingSizes sizes,      // the rings, at the start of dynamic shared memory; x lies behind them
                          Workspace workspace)  // partials and counters of split strips
{
  RIVER_DYNAMIC_SHARED(memory);
  RIVER_SHARED(Ring<kBulk>, rings, [2]);  // dense, packed
  RIVER_SHARED(RowSquares, squares, [1]);
  RIVER_SHARED(int, decided, [1]);  // 1: packed
  const BlockWork work(shape);
  if (work.idle(shape)) return end_idle_block(epilogue);
  if (!workspace.variants.late_trigger) dependency_trigger();
  rings[0].init(sizes.dense_stages);
  rings[1].init(sizes.packed_stages);
  if (warp_id() == kReaders) {
    if (workspace.overlap != Overlap::kPrefetch) dependency_wait();
    copy_decided_weights<T>(rings, sizes, memory, weight, decided[0], shape, work, prefetches_deep(workspace));
    end_copying(workspace);
    return;
  }
  const StreamActivations<T, true> x(memory + sizes.bytes, rows, shape, work, squares[0]);
  input.prefetch(x);
  dependency_wait();
  const int exits = weight.decision.decide(input, x);
  typename Epilogue::State state = epilogue.begin();
  weight.decision.load(input, x);
  if (threadIdx.x == 0) decided[0] = exits != 0;
  barrier_sync(kDecisionBarrier, kStreamThreads);
  const bool packed = decided[0];
  Cursor cursor(sizes.stages(packed));
  reduce_strips(epilogue, state, shape, work, workspace, [&](float (&sum)[4]) {
    if (packed) multiply_strip<W4Format<T>>(sum, rings[1], cursor, memory, x, shape, work);
    else multiply_strip<DenseFormat<T>>(sum, rings[0], cursor, memory, x, shape, work);
  });
}

template <class T, class Rows, class Decision, class Input, class Epilogue>
void launch_stream(const StreamLaunch& l, const DecidedWeight<Rows, Decision>& weight, const Input& input,
                   const Epilogue& epilogue) {
  using Weight = DecidedWeight<Rows, Decision>;
  constexpr int kDenseBytes = DenseFormat<T>::kStageBytes, kPackedBytes = W4Format<T>::kStageBytes;
  const int activations = StreamActivations<T, true>::bytes(l.rows, l.shape.split_tiles);
  const int dense_stages = stages_beside(activations, kDenseBytes);
  const int packed_stages = stages_beside(activations, kPackedBytes);
  const RingSizes sizes{.dense_stages = dense_stages,
                        .packed_stages = packed_stages,
                        .bytes = std::max(dense_stages * kDenseBytes, packed_stages * kPackedBytes)};
  const bool overlap = may_overlap(l);
  launch(overlap ? decided_stream_kernel<T, true, Weight, Input, Epilogue>
                 : decided_stream_kernel<T, false, Weight, Input, Epilogue>,
         blocks_of(l), kStreamThreads, sizes.bytes + activations, l.stream, {.name = l.name, .pdl = overlap}, weight,
         input, epilogue, l.shape, l.rows, sizes, l.workspace);
}

}  // namespace river::device
