// The activations of a block: x of its split, for all T rows, in shared memory. The readers of a block load them once,
// after the kernels ahead have ended, as they are or normalised; then every strip of the block is multiplied by them.
// For packed weights the sums of each tile's activations stand beside them (W4Format says why).
//
// An Input is what a kernel loads from. It has
//   prefetch(x)  asks for what never changes, while the kernels ahead still run;
//   load(x)      fills x, by all readers, once the kernels ahead have ended.
#pragma once

#include "cache_places.cuh"
#include "ring.cuh"
#include "row_sums.cuh"
#include "stream_shape.cuh"

namespace river::device {

static_assert(kReaders == kParts, "the readers share out the sums over rows");

template <class T, bool kWithSums>
struct StreamActivations {
  T* values;            // [T, stride], zero past K
  float* sums;          // [tiles, 8], of the 64 values of each tile; kWithSums alone
  RowSquares& squares;  // of whole rows, once they are measured
  int rows, tiles, stride;
  int first_column, in_features;  // where the split begins, and the whole K

  // In elements: rows start 16 bytes apart modulo 128, so no bank conflicts.
  static constexpr __host__ __device__ int stride_of(int tiles) { return tiles * kTileCols + 8; }
  static constexpr __host__ __device__ int bytes(int rows, int tiles) {
    return rows * stride_of(tiles) * 2 + (kWithSums ? tiles * kMaxRows * 4 : 0);
  }

  RIVER_DEVICE StreamActivations(unsigned char* memory, int rows, const StreamShape& shape, const BlockWork& work,
                                 RowSquares& squares)
      : values(reinterpret_cast<T*>(memory)),
        sums(reinterpret_cast<float*>(memory + rows * stride_of(shape.split_tiles) * 2)), squares(squares), rows(rows),
        tiles(shape.split_tiles), stride(stride_of(shape.split_tiles)), first_column(work.first_tile * kTileCols),
        in_features(shape.in_features) {}

  // 8 columns, counted from the split's first
  RIVER_DEVICE uint4& piece(int row, int column) const {
    return *reinterpret_cast<uint4*>(values + row * stride + column);
  }

  // By the readers: 8 columns at a time from load(row, column) -> 16 bytes, which may be what the piece holds already;
  // zero past K, a multiple of 8. The eight lanes of a tile's row add it up.
  template <class Load>
  RIVER_DEVICE void fill(Load load) const {
    constexpr int kAtOnce = 4;  // loads under way: one after the other they would take a trip to L2 each
    const int row_pieces = tiles * 8, pieces = rows * row_pieces, columns = in_features - first_column;
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
        if (!kWithSums) continue;
        float each[8], sum = 0;
        unpack<T>(v[n], each);
        for (int j = 0; j < 8; j++) sum += each[j];
        for (int lanes = 4; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
        if (i < pieces && i % 8 == 0) sums[column / kTileCols * kMaxRows + row] = sum;
      }
    }
    barrier_sync(kReaderBarrier, kReaderThreads);
  }

  // Keeps a chunk of a row, which begins at `column` of K, if it is of this split.
  RIVER_DEVICE void keep(int row, int column, const float (&chunk)[kChunk]) const {
    const int local = column - first_column;
    if (local >= 0 && local < tiles * kTileCols) store16(values + row * stride + local, chunk);
  }

  // The 16 activations of this lane: columns 16 t .. of row g
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

  // The sum of the tile's activations of one row
  RIVER_DEVICE float tile_sum(int tile, int row) const { return kWithSums ? sums[tile * kMaxRows + row] : 0.f; }
};

// Rows as they are
template <class T>
struct PlainInput {
  const T* rows;  // [T, in_features]

  template <class Activations>
  RIVER_DEVICE void prefetch(const Activations&) const {}

  template <class Activations>
  RIVER_DEVICE void load(const Activations& x) const {
    x.fill([&](int row, int column) {
      return load_activations(rows + int64_t(row) * x.in_features + x.first_column + column);
    });
  }
};

// RMSNorm of rows, rounded once; in_features is a multiple of 64. Every block measures whole rows and keeps its split's
// part.
template <class T>
struct NormalisedInput {
  const T* hidden;  // [T, in_features]
  const T* norm;    // [in_features]
  float eps;

  template <class Activations>
  RIVER_DEVICE void prefetch(const Activations& x) const {
    constexpr int kLine = 128 / sizeof(T);
    const int columns = min(x.tiles * kTileCols, x.in_features - x.first_column);
    for (int i = threadIdx.x * kLine; i < columns; i += kReaderThreads * kLine)
      prefetch_to_l2(norm + x.first_column + i);
  }

  template <class Activations>
  RIVER_DEVICE void load(const Activations& x) const {
    measure(x);
    normalise(x);
  }

  // The squares of the rows, which x holds then as they came
  template <class Activations>
  RIVER_DEVICE void measure(const Activations& x) const {
    measure_squares(hidden, x.rows, x.in_features, x.squares,
                    [&](int row, int column, const float (&chunk)[kChunk]) { x.keep(row, column, chunk); });
    barrier_sync(kReaderBarrier, kReaderThreads);
  }

  // What x holds, by its squares
  template <class Activations>
  RIVER_DEVICE void normalise(const Activations& x) const {
    x.fill([&](int row, int column) {
      float v[8], w[8];
      const float inverse = 1.f / sqrtf(x.squares.total(row) / x.in_features + eps);
      unpack<T>(x.piece(row, column), v);
      unpack<T>(load_activations(norm + x.first_column + column), w);
      for (int j = 0; j < 8; j++) v[j] = v[j] * inverse * w[j];
      return repack<T>(v);
    });
  }
};

}  // namespace river::device
