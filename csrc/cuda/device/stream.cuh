// A weight, dense or W4, streamed through shared memory past the activations of T = 1..8 rows:
// out[t][n] = W[n] . x[t], 16 output rows (a strip) at a time.
//
// A block has kReaders warps that multiply and one warp that copies. Blocks are dealt (strip, split) units: a split
// is a range of K, chosen by the weight's shape alone, and a block keeps to one split so that its activations stay in
// shared memory. A stage of the ring holds some 64-column tiles of a strip, dealt to the readers in turn; each reader
// keeps its own fp32 sums, which are added in warp order at the strip's end. Nothing depends on T or on the grid.
//
// mma.m16n8k16 takes the weights as operand A (16 rows) and the activations as B (8 columns), at one cost for all T.
// k is permuted, which a dot product does not mind: lane l = 4 g + t holds columns 16 t .. 16 t + 15 of rows g and
// g + 8 of a tile, and the same 16 activations of row g of x.
#pragma once

#include <algorithm>

#include "arch.cuh"
#include "launch.h"
#include "row_sums.cuh"
#include "types.cuh"
#include "formats.cuh"

namespace river::device {

using cuda::Overlap;
using cuda::Workspace;

constexpr int kReaders = kParts;  // so that they also share out the sums over rows
constexpr int kStreamThreads = (kReaders + 1) * kWarp;
constexpr int kReaderThreads = kReaders * kWarp;
constexpr int kReaderBarrier = 1;    // named barriers: of the reader warps,
constexpr int kDecisionBarrier = 2;  // and of all, once a block knows its path

// ---- activations in shared memory -------------------------------------------------------------------

// x of one split, [rows][stride] in the model dtype, zero past K; for W4 also the sums of each tile, [tiles][8].
template <class T>
struct StreamActivations {
  T* values;
  float* sums;
  int rows, tiles, stride;  // stride in elements: rows start 16 bytes apart modulo 128, so no bank conflicts

  static constexpr __host__ __device__ int stride_of(int tiles) { return tiles * kTileCols + 8; }
  static constexpr __host__ __device__ int bytes(int rows, int tiles, bool with_sums) {
    return rows * stride_of(tiles) * 2 + (with_sums ? tiles * kMaxRows * 4 : 0);
  }

  RIVER_DEVICE StreamActivations(unsigned char* memory, int rows, int tiles)
      : values(reinterpret_cast<T*>(memory)), sums(reinterpret_cast<float*>(memory + rows * stride_of(tiles) * 2)),
        rows(rows), tiles(tiles), stride(stride_of(tiles)) {}

  // 8 columns
  RIVER_DEVICE uint4& piece(int row, int column) { return *reinterpret_cast<uint4*>(values + row * stride + column); }

  // By the readers: 8 columns at a time from load(row, column) -> 16 bytes, which may be what the piece holds already;
  // zero past `columns`, a multiple of 8. The eight lanes of a tile's row add it up.
  template <class Load>
  RIVER_DEVICE void fill(int columns, bool with_sums, Load load) {
    constexpr int kAtOnce = 4;  // loads under way: one after the other they would take a trip to L2 each
    const int row_pieces = tiles * 8, pieces = rows * row_pieces;
    for (int first = warp_id() * kWarp; first < pieces; first += kAtOnce * kReaderThreads) {
      uint4 v[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; n++) {
        const int i = first + n * kReaderThreads + lane_id(), row = i / row_pieces, column = i % row_pieces * 8;
        v[n] = i < pieces && column < columns ? load(row, column) : uint4{};
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; n++) {
        const int i = first + n * kReaderThreads + lane_id(), row = i / row_pieces, column = i % row_pieces * 8;
        if (i < pieces) piece(row, column) = v[n];
        if (!with_sums) continue;
        float each[8], sum = 0;
        unpack<T>(v[n], each);
        for (int j = 0; j < 8; j++) sum += each[j];
        for (int lanes = 4; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
        if (i < pieces && i % 8 == 0) sums[column / kTileCols * kMaxRows + row] = sum;
      }
    }
    barrier_sync(kReaderBarrier, kReaderThreads);
  }

  // The 16 activations of this lane: columns 16 t .. of row g of x
  RIVER_DEVICE void fragment(int tile, uint32_t (&x)[8]) const {
    const int g = lane_id() / 4, t = lane_id() % 4;
    uint4 first{}, second{};
    if (g < rows) {
      const auto* p = reinterpret_cast<const uint4*>(values + g * stride + tile * kTileCols + t * 16);
      first = p[0];
      second = p[1];
    }
    x[0] = first.x, x[1] = first.y, x[2] = first.z, x[3] = first.w;
    x[4] = second.x, x[5] = second.y, x[6] = second.z, x[7] = second.w;
  }
};

// ---- the ring ---------------------------------------------------------------------------------------

constexpr int kMaxStages = 24;

// Both sides walk the stages of all strips of the block in the same order.
struct Cursor {
  int stages, slot = 0;
  uint32_t phase = 0;
  RIVER_DEVICE explicit Cursor(int stages) : stages(stages) {}
  RIVER_DEVICE void next() {
    if (++slot == stages) slot = 0, phase ^= 1;
  }
};

template <bool kBulk>
struct Ring {
  StageBarrier<kBulk> full[kMaxStages], empty[kMaxStages];

  RIVER_DEVICE void init(int stages) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < stages; i++) {
        full[i].init_full();
        empty[i].init_empty(kReaders);
      }
      mbarrier_init_fence();
    }
    __syncthreads();
  }
};

// Which strips a block takes, and where its split lies. Any grid of at least `splits` blocks is right; some may have none.
struct BlockWork {
  int split, first_strip, strip_step, strips, first_tile, tiles;

  RIVER_DEVICE BlockWork(const StreamShape& shape) {
    split = blockIdx.x % shape.splits;
    first_strip = blockIdx.x / shape.splits;
    strip_step = gridDim.x / shape.splits;  // blocks per split
    first_tile = split * shape.split_tiles;
    tiles = min(shape.split_tiles, shape.tiles - first_tile);
    strips = max(0, (shape.strips - first_strip + strip_step - 1) / strip_step);
  }
  RIVER_DEVICE bool idle(const StreamShape& shape) const { return first_strip >= min(strip_step, shape.strips); }
  RIVER_DEVICE int strip(int n) const { return first_strip + n * strip_step; }
};

// Where the copying warp stands: the next stage of the ring, and the part of the weight that it takes
struct CopyPlace {
  Cursor cursor;
  int strip, tile = 0;
  RIVER_DEVICE CopyPlace(int stages, const BlockWork& work) : cursor(stages), strip(work.first_strip) {}
};

// The copying warp: at most `limit` stages; returns how many. Weights never change, so it waits for the readers only.
template <class Format, bool kBulk, class Source>
RIVER_DEVICE int copy_weights(Ring<kBulk>& ring, CopyPlace& place, int limit, unsigned char* stages,
                              const Source& source, const StreamShape& shape, const BlockWork& work) {
  if (place.strip >= shape.strips) return 0;
  const CopyHint hint = evict_first();
  auto start = Format::start(source, shape, place.strip);
  int copied = 0;
  for (; copied < limit && place.strip < shape.strips; copied++, place.cursor.next()) {
    const int slot = place.cursor.slot, count = min(Format::kStageTiles, work.tiles - place.tile);
    ring.empty[slot].wait(place.cursor.phase ^ 1);
    Format::copy(ring.full[slot], stages + slot * Format::kStageBytes, start, shape, work.first_tile + place.tile,
                 count, hint);
    place.tile += count;
    if (place.tile < work.tiles) continue;
    place.tile = 0, place.strip += work.strip_step;
    if (place.strip < shape.strips) start = Format::start(source, shape, place.strip);
  }
  return copied;
}

constexpr int kAll = 1 << 30;

// The stages that come behind those copied so far, at most `count`, to L2: with its ring full, a copying warp would leave
// the memory idle until the kernels ahead have ended.
template <class Format, class Source>
RIVER_DEVICE void prefetch_weights(CopyPlace place, int count, const Source& source, const StreamShape& shape,
                                   const BlockWork& work) {
  const CopyHint hint = evict_first();
  for (; count > 0 && place.strip < shape.strips; place.tile = 0, place.strip += work.strip_step) {
    const auto start = Format::start(source, shape, place.strip);
    for (; count > 0 && place.tile < work.tiles; count--, place.tile += Format::kStageTiles)
      Format::prefetch(start, shape, work.first_tile + place.tile, min(Format::kStageTiles, work.tiles - place.tile),
                       hint);
  }
}

// How a launch cuts the memory before the activations: stages of either format
struct RingSizes {
  int dense_stages, packed_stages, bytes;
  RIVER_DEVICE int stages(bool packed) const { return packed ? packed_stages : dense_stages; }
};

// The copying warp of a kernel whose path is open: fills the ring on a guess, and starts again if the guess was wrong.
template <class T, class Path, bool kBulk, class Weight>
RIVER_DEVICE void copy_decided_weights(Ring<kBulk> (&rings)[2], const RingSizes& sizes, unsigned char* stages,
                                       const Path& path, const int& decision, const Weight& weight,
                                       const StreamShape& shape, const BlockWork& work, bool deep) {
  bool packed = shuffle(static_cast<int>(path.guess()), 0);  // it may change under the loads: one lane's for all
  CopyPlace place(sizes.stages(packed), work);
  const auto copy = [&](int limit) {
    int copied = 0;
    with_format<T, Path>(packed, [&](auto type) {
      using Format = typename decltype(type)::type;
      copied = copy_weights<Format>(rings[packed], place, limit, stages, source_of<Format>(weight), shape, work);
    });
    return copied;
  };
  const int guessed = copy(sizes.stages(packed));
  if (deep)
    with_format<T, Path>(packed, [&](auto type) {
      using Format = typename decltype(type)::type;
      prefetch_weights<Format>(place, sizes.stages(packed), source_of<Format>(weight), shape, work);
    });
  barrier_sync(kDecisionBarrier, kStreamThreads);
  if (packed != static_cast<bool>(decision)) {
    for (int i = 0; i < guessed; i++) rings[packed].full[i].wait(0);  // landed: the memory is free, nobody reads it
    packed = !packed;
    place = CopyPlace(sizes.stages(packed), work);
  }
  copy(kAll);
}

// One reader's sums over the next strip of the block: d0, d1 are row g of x rows 2t, 2t + 1; d2, d3 row g + 8.
template <class T, class Format, bool kBulk>
RIVER_DEVICE void multiply_strip(float (&sum)[4], Ring<kBulk>& ring, Cursor& cursor, const unsigned char* stages,
                                 const StreamActivations<T>& x, const StreamShape& shape, const BlockWork& work) {
  for (int tile = 0; tile < work.tiles; tile += Format::kStageTiles, cursor.next()) {
    const int slot = cursor.slot, count = min(Format::kStageTiles, work.tiles - tile);
    ring.full[slot].wait(cursor.phase);
    const auto multiply = [&](int index) {
      uint32_t values[8];
      x.fragment(tile + index, values);
      float sum0 = 0, sum1 = 0;
      if (Format::kPacked) {
        const float* sums = x.sums + (tile + index) * kMaxRows + 2 * (lane_id() % 4);
        sum0 = sums[0], sum1 = sums[1];
      }
      const int columns = shape.in_features - (work.first_tile + tile + index) * kTileCols;
      Format::multiply(sum, stages + slot * Format::kStageBytes, index, columns, values, sum0, sum1);
    };
    int index = warp_id();
    for (; index + kReaders < count; index += 2 * kReaders) {  // two chains of mma at a time hide each other's latency
      multiply(index);
      multiply(index + kReaders);
    }
    if (index < count) multiply(index);
    __syncwarp();
    if (lane_id() == 0) ring.empty[slot].arrive();
  }
}

// The readers' sums of a strip, [2][kReaders][16 rows][8 x rows]: two buffers, so that one barrier per strip is enough.
struct StripSums {
  float value[2][kReaders][kTileRows][kMaxRows];

  RIVER_DEVICE void put(int buffer, const float (&sum)[4]) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    auto& mine = value[buffer][warp_id()];
    mine[g][2 * t] = sum[0];
    mine[g][2 * t + 1] = sum[1];
    mine[g + 8][2 * t] = sum[2];
    mine[g + 8][2 * t + 1] = sum[3];
    barrier_sync(kReaderBarrier, kReaderThreads);
  }
  // In warp order
  RIVER_DEVICE float total(int buffer, int row, int t) const {
    float sum = 0;
    for (int warp = 0; warp < kReaders; warp++) sum += value[buffer][warp][row][t];
    return sum;
  }
};

// ---- the kernel of every phase that streams a weight ------------------------------------------------

// What a phase loads its activations to, and what is known of them
template <class T>
struct StreamInput {
  StreamActivations<T> x;
  const BlockWork& work;
  const StreamShape& shape;
  RowSquares& squares;
  bool with_sums;         // of tiles, which packed weights want
  bool measured = false;  // squares are known, and x holds the rows as they came

  RIVER_DEVICE int first_column() const { return work.first_tile * kTileCols; }

  // Keeps a chunk of a row, if it is of this block's split
  RIVER_DEVICE void keep(int row, int column, const float (&values)[kChunk]) {
    const int local = column - first_column();
    if (local >= 0 && local < work.tiles * kTileCols) store16(x.values + row * x.stride + local, values);
  }
};

constexpr int kBlockBytes = 113 << 10;
constexpr int kStaticBytes = 11 << 10;  // of these, at most, are static: the gate checks it
static_assert(2 * (kBlockBytes + (1 << 10)) <= 228 << 10, "two blocks, and what the system takes of each, fit an SM");
static_assert(StreamActivations<bf16>::bytes(kMaxRows, kSplitColumns / kTileCols, true) +
                      std::max(DenseFormat<bf16>::kStageBytes, W4Format<bf16>::kStageBytes) <=
                  kBlockBytes - kStaticBytes,
              "the most activations of a block leave room for a stage");

// The finished sums of a strip: of the readers of this block, or of the splits, in the order of K
struct StripTotals {
  const StripSums* sums;
  int buffer;
  const float* partials;  // [splits][16][8]; null: not split
  int splits;

  RIVER_DEVICE float operator()(int row, int t) const {
    if (!partials) return sums->total(buffer, row, t);
    float sum = 0;
#pragma unroll 4
    for (int split = 0; split < splits; split++)  // all loads before the first sum, as far as they are unrolled
      sum += load_written(partials + (split * kTileRows + row) * kMaxRows + t);
    return sum;
  }
};

// True for the readers of the last of `count` blocks to come here; the counter wraps to zero. All readers call it.
RIVER_DEVICE bool readers_arrive_last(uint32_t* counter, int count) {
  RIVER_SHARED(int, last, [1]);
  barrier_sync(kReaderBarrier, kReaderThreads);
  if (threadIdx.x == 0) {
    gpu_fence();  // after the barrier: it releases what all readers wrote
    last[0] = atomicInc(counter, count - 1) == static_cast<unsigned>(count - 1);
    gpu_fence();
  }
  barrier_sync(kReaderBarrier, kReaderThreads);
  const bool result = last[0];
  barrier_sync(kReaderBarrier, kReaderThreads);
  return result;
}

// Where a weight is split, the blocks of a strip add up in three steps, each a strip later than the one before, so that no
// reader waits for memory: a block's sums go out; once they are there, it arrives; the last to arrive finishes the strip.
class SplitStrips {
 public:
  RIVER_DEVICE SplitStrips(const StreamShape& shape, const BlockWork& work, const Workspace& workspace, int (&last)[2])
      : shape_(shape), work_(work), workspace_(workspace), last_(last) {}

  RIVER_DEVICE bool used() const { return shape_.splits > 1; }
  RIVER_DEVICE int steps_behind() const { return used() ? 2 : 0; }

  RIVER_DEVICE void before_barrier(int n) {
    if (!used() || n < 2 || threadIdx.x != kArriver) return;
    const bool last = arrival_ == static_cast<uint32_t>(shape_.splits - 1);
    last_[n % 2] = last;
    if (last) gpu_fence();
  }

  RIVER_DEVICE void after_barrier(int n, const StripTotals& own) {
    const int row = threadIdx.x / kMaxRows, t = threadIdx.x % kMaxRows;
    if (n < work_.strips && row < kTileRows) partials(n)[(work_.split * kTileRows + row) * kMaxRows + t] = own(row, t);
    if (n >= 1 && n <= work_.strips && threadIdx.x == kArriver) {
      gpu_fence();  // the sums of strip n - 1, of all readers: it is the barrier since then that brings them here
      arrival_ = atomicInc(workspace_.counters + work_.strip(n - 1), shape_.splits - 1);  // wraps to zero
    }
  }

  RIVER_DEVICE bool to_finish(int n) const { return n >= 2 && last_[n % 2]; }
  RIVER_DEVICE StripTotals totals(int n) const { return {nullptr, 0, partials(n), shape_.splits}; }

 private:
  static constexpr int kArriver = kReaderThreads - kWarp;  // of a warp that sends no sums: its fence is short

  RIVER_DEVICE float* partials(int n) const {
    return workspace_.partials + int64_t(work_.strip(n)) * shape_.splits * kTileRows * kMaxRows;
  }

  const StreamShape& shape_;
  const BlockWork& work_;
  const Workspace& workspace_;
  int (&last_)[2];
  uint32_t arrival_ = 0;  // of kArriver: how many had come to the strip before this block
};

// A Phase has: source(), the weight; prefetch(work, shape), which may ask for what never changes; begin(), the state of a
// reader, and load(input), which fills the activations, once the predecessors are done; ask(strip, state), for what a strip
// wants beside its sums, which is under way while it is multiplied; finish(strip, totals, asked, state), which all readers
// call with the finished sums of a strip; end(state), once per block, idle ones too. All of it lives in registers.
struct PlainPhase {
  struct State {};
  struct Asked {};
  RIVER_DEVICE void prefetch(const BlockWork&, const StreamShape&) const {}
  RIVER_DEVICE State begin() const { return {}; }
  RIVER_DEVICE Asked ask(int, const State&) const { return {}; }
  template <class AnyState>
  RIVER_DEVICE void end(AnyState&) const {}
};

// Budget: 288 threads, 112 registers, 11264 shared, mma
template <class T, class Path, bool kBulk, class Phase>
__global__ void __launch_bounds__(kStreamThreads, 2)
    stream_kernel(Phase phase, Path path, StreamShape shape, int rows, RingSizes sizes, bool prefetch,
                  Workspace workspace) {
  RIVER_DYNAMIC_SHARED(memory);
  RIVER_SHARED(Ring<kBulk>, rings, [2]);  // dense, packed
  RIVER_SHARED(StripSums, sums, [1]);
  RIVER_SHARED(RowSquares, squares, [1]);
  RIVER_SHARED(int, decision, [1]);
  RIVER_SHARED(int, last, [2]);
  const BlockWork work(shape);
  const bool late = workspace.variants.late_trigger, deep = workspace.variants.deep_prefetch && prefetch;
  const bool idle = work.idle(shape);
  if (!late || idle) dependency_trigger();
  if (idle) {  // It keeps a place on its SM, as long as the kernels ahead run: one whose copies all fit its ring triggers by then.
    dependency_wait();
    typename Phase::State none{};
    if (warp_id() < kReaders) phase.end(none);
    return;
  }
  if (Path::kDense) rings[0].init(sizes.dense_stages);
  if (Path::kPacked) rings[1].init(sizes.packed_stages);
  if (warp_id() == kReaders) {
    if (!prefetch) dependency_wait();
    if constexpr (kDecides<Path>) {
      copy_decided_weights<T>(rings, sizes, memory, path, decision[0], phase.source(), shape, work, deep);
    } else {
      const int stages = sizes.stages(Path::kPacked);
      CopyPlace place(stages, work);
      with_format<T, Path>(Path::kPacked, [&](auto type) {
        using Format = typename decltype(type)::type;
        copy_weights<Format>(rings[Path::kPacked], place, deep ? stages : kAll, memory, phase.source(), shape, work);
        if (!deep) return;
        prefetch_weights<Format>(place, stages, phase.source(), shape, work);
        copy_weights<Format>(rings[Path::kPacked], place, kAll, memory, phase.source(), shape, work);
      });
    }
    // Only now: a successor that fills its ring while this kernel streams has nothing left to ask for when this one's last
    // bytes have come, and memory idles until its first stage is free.
    if (late) dependency_trigger();
    dependency_wait();
    return;
  }
  const StreamActivations<T> x(memory + sizes.bytes, rows, shape.split_tiles);
  StreamInput<T> input{x, work, shape, squares[0], Path::kPacked};
  phase.prefetch(work, shape);
  dependency_wait();
  uint32_t decided = Path::kPacked;
  if constexpr (kDecides<Path>) decided = path.decide(input);  // may be on its way while the activations come
  typename Phase::State state = phase.begin();
  phase.load(input);
  bool packed = Path::kPacked;
  if constexpr (kDecides<Path>) {
    if (threadIdx.x == 0) decision[0] = decided != 0;
    barrier_sync(kDecisionBarrier, kStreamThreads);
    packed = decision[0];
  }
  Cursor cursor(sizes.stages(packed));
  SplitStrips splits(shape, work, workspace, last);
  typename Phase::Asked asked[3] = {};  // for strips n, n - 1, n - 2
  for (int n = 0; n < work.strips + splits.steps_behind(); n++) {
    float sum[4] = {};
    asked[2] = asked[1], asked[1] = asked[0];
    if (n < work.strips) asked[0] = phase.ask(work.strip(n), state);
    if (n < work.strips)
      with_format<T, Path>(packed, [&](auto type) {
        multiply_strip<T, typename decltype(type)::type>(sum, rings[packed], cursor, memory, x, shape, work);
      });
    splits.before_barrier(n);
    sums[0].put(n % 2, sum);
    const StripTotals own{&sums[0], n % 2, nullptr, 1};
    if (!splits.used()) {
      phase.finish(work.strip(n), own, asked[0], state);
      continue;
    }
    splits.after_barrier(n, own);
    if (splits.to_finish(n)) phase.finish(work.strip(n - 2), splits.totals(n - 2), asked[2], state);
  }
  phase.end(state);
}

// The ring takes what the activations leave of a block's share of shared memory.
template <class T, class Path, class Phase>
void launch_stream(const Phase& phase, const Path& path, const StreamShape& shape, int rows, const Workspace& workspace,
                   cudaStream_t stream, const char* name) {
  const int activations = StreamActivations<T>::bytes(rows, shape.split_tiles, Path::kPacked);
  const int room = std::min(kBlockBytes, device_facts().shared_memory_per_block) - kStaticBytes - activations;
  const auto stages = [&](bool used, int stage_bytes) {
    return used ? std::max(1, std::min(kMaxStages, room / stage_bytes)) : 0;
  };
  constexpr int kDenseBytes = DenseFormat<T>::kStageBytes, kPackedBytes = W4Format<T>::kStageBytes;
  RingSizes sizes{stages(Path::kDense, kDenseBytes), stages(Path::kPacked, kPackedBytes), 0};
  sizes.bytes = std::max(sizes.dense_stages * kDenseBytes, sizes.packed_stages * kPackedBytes);
  const int busy = std::max(1, std::min(workspace.blocks / shape.splits, shape.strips)) * shape.splits;
  const int blocks = workspace.variants.full_grid ? std::max(busy, workspace.blocks) : busy;
  const bool overlap = workspace.overlap != Overlap::kNone && device_facts().arch >= 90;
  const bool prefetch = workspace.overlap == Overlap::kPrefetch;
  auto run = [&](auto kernel) {
    launch(kernel, blocks, kStreamThreads, sizes.bytes + activations, stream, {name, overlap}, phase, path, shape, rows,
           sizes, prefetch, workspace);
  };
  if (overlap) run(stream_kernel<T, Path, true, Phase>);
  else run(stream_kernel<T, Path, false, Phase>);
}

// fp32 partial sums that a shape needs
inline int64_t partials_of(const StreamShape& shape) {
  return shape.splits > 1 ? int64_t(shape.strips) * shape.splits * kTileRows * kMaxRows : 0;
}

}  // namespace river::device
