// The kernel of stream.cuh for a weight that lies there in both formats, of which the device decides row by row
// (decision.cuh). A format without a row is not read. Where rows are on both paths, every strip comes in both formats,
// one after the other, and each row keeps the sums of its own; so splits and epilogues never know.
//
// The same warps do the same work, with a ring for each way of reading, all in the same memory. The copying warp fills
// a ring on a guess, while the kernels ahead still run, and starts again with another one where the guess was wrong.
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

// Which formats a kernel reads
enum Reading { kDense, kPacked, kBoth, kNothing };
constexpr int kRings = 3;  // of all but kNothing, for which no row is active

RIVER_DEVICE Reading reading_for(const RowPaths& paths) {
  if (paths.dense) return paths.packed ? kBoth : kDense;
  return paths.packed ? kPacked : kNothing;
}

// Packed tiles in the ring of kBoth, whose stages are those of dense ones. A stage has whole turns of the readers, as
// any other of packed tiles, so that each reader adds up the same tiles in the same order.
template <class T>
struct W4InDenseStages : W4Format<T> {
  static constexpr int kStageBytes = DenseFormat<T>::kStageBytes;
  static constexpr int kStageTiles = kStageBytes / kTileBytes / kReaders * kReaders;
  static_assert(kStageTiles > 0 && W4Format<T>::kStageTiles % kReaders == 0);
};

// How a launch cuts the memory before the activations
struct RingSizes {
  int dense_stages, packed_stages;  // of either format
  int bytes;                        // that the larger ring takes
  RIVER_DEVICE int stages(Reading reading) const { return reading == kPacked ? packed_stages : dense_stages; }
};

// The copying warp: fills at most `limit` stages with strips in both formats, dense first; returns how many.
template <class T, bool kBulk, class Weight>
RIVER_DEVICE int copy_both(Ring<kBulk>& ring, CopyPlace& place, bool& at_packed, int limit, unsigned char* memory,
                           const Weight& weight, const StreamShape& shape, const BlockWork& work) {
  int copied = 0;
  while (copied < limit && place.strip < shape.strips) {
    const int left = limit - copied;
    if (at_packed) copied += copy_strip<W4InDenseStages<T>>(ring, place, left, memory, weight.packed, shape, work);
    else copied += copy_strip<DenseFormat<T>>(ring, place, left, memory, weight.dense, shape, work);
    if (place.tile < work.tiles) continue;
    if (at_packed) place.next_strip(work);
    place.tile = 0, at_packed = !at_packed;
  }
  return copied;
}

// The copying warp. decided: in shared memory, written before kDecisionBarrier.
template <class T, bool kBulk, class Rows, class Decision>
RIVER_DEVICE void copy_decided_weights(Ring<kBulk> (&rings)[kRings], const RingSizes& sizes, unsigned char* memory,
                                       const DecidedWeight<Rows, Decision>& weight, int rows, const Reading& decided,
                                       const StreamShape& shape, const BlockWork& work, bool deep) {
  using Dense = DenseFormat<T>;
  using Packed = W4Format<T>;
  Reading reading = reading_for(RowPaths(weight.decision.guess(rows)));
  CopyPlace place(sizes.stages(reading), work);
  bool at_packed = false;  // kBoth: the strip's dense tiles are copied
  const auto copy = [&](int limit) {
    if (reading == kDense) return copy_weights<Dense>(rings[kDense], place, limit, memory, weight.dense, shape, work);
    if (reading == kPacked)
      return copy_weights<Packed>(rings[kPacked], place, limit, memory, weight.packed, shape, work);
    if (reading == kBoth) return copy_both<T>(rings[kBoth], place, at_packed, limit, memory, weight, shape, work);
    return 0;
  };
  const int guessed = copy(sizes.stages(reading));
  if (deep && reading == kPacked) prefetch_weights<Packed>(place, sizes.packed_stages, weight.packed, shape, work);
  if (deep && reading == kDense) prefetch_weights<Dense>(place, sizes.dense_stages, weight.dense, shape, work);
  barrier_sync(kDecisionBarrier, kStreamThreads);
  if (reading != decided) {
    for (int i = 0; i < guessed; i++) rings[reading].full[i].wait(0);  // landed: the memory is free, nobody reads it
    reading = decided;
    place = CopyPlace(sizes.stages(reading), work);
    at_packed = false;
  }
  copy(kAll);
}

// One reader: its sums over the next strip, of each row by the format of its path
template <class T, bool kBulk, class Activations>
RIVER_DEVICE void multiply_decided_strip(float (&sum)[4], Reading reading, uint32_t packed_rows,
                                         Ring<kBulk> (&rings)[kRings], Cursor& cursor, const unsigned char* memory,
                                         const Activations& x, const StreamShape& shape, const BlockWork& work) {
  if (reading == kNothing) return;
  if (reading == kPacked) return multiply_strip<W4Format<T>>(sum, rings[kPacked], cursor, memory, x, shape, work);
  multiply_strip<DenseFormat<T>>(sum, rings[reading], cursor, memory, x, shape, work);
  if (reading == kDense) return;
  float packed[4] = {};
  multiply_strip<W4InDenseStages<T>>(packed, rings[kBoth], cursor, memory, x, shape, work);
  const uint32_t mine = packed_rows >> (lane_id() % 4 * 2);  // bits 0 and 1: x rows 2t and 2t + 1
  if (mine & 1) sum[0] = packed[0], sum[2] = packed[2];
  if (mine & 2) sum[1] = packed[1], sum[3] = packed[3];
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
  RIVER_SHARED(Ring<kBulk>, rings, [kRings]);
  RIVER_SHARED(RowSquares, squares, [1]);
  RIVER_SHARED(Reading, decided, [1]);
  const BlockWork work(shape);
  if (work.idle(shape)) return end_idle_block(epilogue);
  if (!workspace.variants.late_trigger) dependency_trigger();
  for (const Reading reading : {kDense, kPacked, kBoth}) rings[reading].init(sizes.stages(reading));
  __syncthreads();
  if (warp_id() == kReaders) {
    if (workspace.overlap != Overlap::kPrefetch) dependency_wait();
    copy_decided_weights<T>(rings, sizes, memory, weight, rows, decided[0], shape, work, prefetches_deep(workspace));
    end_copying(workspace);
    return;
  }
  const StreamActivations<T, true> x(memory + sizes.bytes, rows, shape, work, squares[0]);
  input.prefetch(x);
  dependency_wait();
  const RowPath row = weight.decision.decide(input, x);
  typename Epilogue::State state = epilogue.begin();
  weight.decision.load(input, x);
  const RowPaths paths(row);
  const Reading reading = reading_for(paths);
  if (threadIdx.x == 0) decided[0] = reading;
  barrier_sync(kDecisionBarrier, kStreamThreads);
  Cursor cursor(sizes.stages(reading));
  reduce_strips(epilogue, state, shape, work, workspace, [&](float (&sum)[4]) {
    multiply_decided_strip<T>(sum, reading, paths.packed, rings, cursor, memory, x, shape, work);
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
