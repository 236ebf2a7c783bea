// The two formats of a weight, dense and W4: where a strip's rows lie in memory, how a stage of the ring is copied, and
// how a tile of it is multiplied. weight_stream.cuh makes a kernel of them.
#pragma once

#include "arch.cuh"
#include "types.cuh"

namespace river::device {

constexpr int kSplitColumns = 4096;  // activations of one block: 8 rows x 4096 x 2 B = 64 KB

// One weight and how it is cut. Depends on the shape only.
struct StreamShape {
  int out_features, in_features;
  int strips, tiles;        // of 16 rows; of 64 columns
  int splits, split_tiles;  // ranges of K

  static constexpr int kDesignBlocks = 132;  // what the cut is good for; any grid is right

  __host__ __device__ StreamShape(int out_features, int in_features)
      : out_features(out_features), in_features(in_features), strips((out_features + kTileRows - 1) / kTileRows),
        tiles((in_features + kTileCols - 1) / kTileCols), splits((in_features + kSplitColumns - 1) / kSplitColumns) {
    // 192 units on 132 blocks keep 73 % busy: split K until the last wave is full enough, ranges of 512 columns at least
    auto busy = [&](int s) {
      const int units = strips * s, waves = (units + kDesignBlocks - 1) / kDesignBlocks;
      return 100 * units >= 85 * waves * kDesignBlocks;
    };
    while (!busy(splits) && 2 * splits * 8 <= tiles) splits *= 2;
    split_tiles = (tiles + splits - 1) / splits;
    splits = (tiles + split_tiles - 1) / split_tiles;
  }
};

// ---- where weights come from ------------------------------------------------------------------------

// Dense sources name the 16 rows of a strip one by one (null: a row of padding), so that the rows of several matrices
// can stand in a strip as in the packed orders of river_ext/w4.py.
template <class T>
struct MatrixRows {
  const T* weight;  // [rows, columns]
  int rows, columns;
  RIVER_DEVICE const T* row(int strip, int r) const {
    const int n = strip * kTileRows + r;
    return n < rows ? weight + int64_t(n) * columns : nullptr;
  }
};

struct PackedTiles {
  const uint8_t* tiles;  // [strips, tiles, 576]
};

// The same weight in both formats, strip for strip
template <class Rows>
struct DualWeight {
  Rows dense;
  PackedTiles packed;
};

// ---- the two formats ------------------------------------------------------------------------------

// Row-major weights in checkpoint order. A stage is 16 rows of 512 columns, each padded by 16 bytes so that the
// eight lanes of a quarter-warp, two rows of four, read different banks.
template <class T>
struct DenseFormat {
  static constexpr bool kPacked = false;
  static constexpr int kStageTiles = 8;
  static constexpr int kRowBytes = kStageTiles * kTileCols * 2 + 16;
  static constexpr int kStageBytes = kTileRows * kRowBytes;

  // Where a strip lies, for the copying warp: lane r holds row r, or row 0 in place of padding, which nobody looks at.
  // Once per strip and all rows at a time: lookups take divisions, and one by one would cost more than the copies.
  template <class Rows>
  static RIVER_DEVICE const T* start(const Rows& source, const StreamShape&, int strip) {
    const T* row = source.row(strip, lane_id() % kTileRows);
    return row ? row : source.row(strip, 0);
  }

  template <class Barrier>
  static RIVER_DEVICE void copy(Barrier& full, unsigned char* stage, const T* row, const StreamShape& shape, int tile,
                                int count, CopyHint hint) {
    const int first = tile * kTileCols, columns = min(count * kTileCols, shape.in_features - first);
    full.arrive_expect(kTileRows * columns * 2);
    full.template copy_rows<kTileRows>(stage, kRowBytes, row + first, columns * 2, hint);
    full.arrive_copies();
  }

  static RIVER_DEVICE void prefetch(const T* row, const StreamShape& shape, int tile, int count, CopyHint hint) {
    const int first = tile * kTileCols, columns = min(count * kTileCols, shape.in_features - first);
    if (lane_id() < kTileRows) bulk_prefetch_to_l2(row + first, columns * 2, hint);
  }

  // sum += tile `index` of the stage times x; columns: valid columns from the start of the tile
  static RIVER_DEVICE void multiply(float (&sum)[4], const unsigned char* stage, int index, int columns,
                                    const uint32_t (&x)[8], float, float) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    const unsigned char* row = stage + g * kRowBytes + index * kTileCols * 2 + t * 32;
    for (int half = 0; half < 2; half++) {
      uint4 top{}, bottom{};
      if (16 * t + 8 * half < columns) {  // past the end the stage holds anything, and 0 * NaN is NaN
        top = *reinterpret_cast<const uint4*>(row + 16 * half);
        bottom = *reinterpret_cast<const uint4*>(row + 8 * kRowBytes + 16 * half);
      }
      mma_m16n8k16<T>(sum, {top.x, bottom.x, top.y, bottom.y}, {x[4 * half], x[4 * half + 1]});
      mma_m16n8k16<T>(sum, {top.z, bottom.z, top.w, bottom.w}, {x[4 * half + 2], x[4 * half + 3]});
    }
  }
};

// Packed tiles (layout: river_ext/w4.py). Nibbles become exact 16-bit numbers under a magic exponent; that constant,
// zero and scale act in fp32 on a tile's sums, with the sums of the very activations that were multiplied.
template <class T>
struct W4Format {
  static constexpr bool kPacked = true;
  static constexpr int kStageTiles = 16;
  static constexpr int kStageBytes = kStageTiles * kTileBytes;

  static RIVER_DEVICE const uint8_t* start(const PackedTiles& source, const StreamShape& shape, int strip) {
    return source.tiles + int64_t(strip) * shape.tiles * kTileBytes;
  }

  template <class Barrier>
  static RIVER_DEVICE void copy(Barrier& full, unsigned char* stage, const uint8_t* strip, const StreamShape&, int tile,
                                int count, CopyHint hint) {
    full.arrive_expect(count * kTileBytes);
    full.copy(stage, strip + int64_t(tile) * kTileBytes, count * kTileBytes, hint);
    full.arrive_copies();
  }

  static RIVER_DEVICE void prefetch(const uint8_t* strip, const StreamShape&, int tile, int count, CopyHint hint) {
    if (elect_one()) bulk_prefetch_to_l2(strip + int64_t(tile) * kTileBytes, count * kTileBytes, hint);
  }

  static RIVER_DEVICE void multiply(float (&sum)[4], const unsigned char* stage, int index, int, const uint32_t (&x)[8],
                                    float sum0, float sum1) {
    const unsigned char* tile = stage + index * kTileBytes;
    const int g = lane_id() / 4;
    const uint4 words = *reinterpret_cast<const uint4*>(tile + 16 * lane_id());
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    float even[4] = {}, part[4] = {};  // two chains, as an mma waits for the one before it
    for (int j = 0; j < 4; j++)
      mma_m16n8k16<T>(j % 2 ? part : even,
                      {nibble_pair<T>(word[j], 0), nibble_pair<T>(word[j], 2), nibble_pair<T>(word[j], 1),
                       nibble_pair<T>(word[j], 3)},
                      {x[2 * j], x[2 * j + 1]});
    for (int i = 0; i < 4; i++) part[i] += even[i];
    const auto* metadata = reinterpret_cast<const uint32_t*>(tile + 512);
    const float2 top = to_float2<fp16>(metadata[g]), bottom = to_float2<fp16>(metadata[g + 8]);  // scale, zero
    sum[0] += top.x * (part[0] - kNibbleOffset<T> * sum0 - top.y * sum0);
    sum[1] += top.x * (part[1] - kNibbleOffset<T> * sum1 - top.y * sum1);
    sum[2] += bottom.x * (part[2] - kNibbleOffset<T> * sum0 - bottom.y * sum0);
    sum[3] += bottom.x * (part[3] - kNibbleOffset<T> * sum1 - bottom.y * sum1);
  }
};

// ---- the format of a launch -------------------------------------------------------------------------

// A Path says which format a kernel streams. Fixed for all launches ...
struct DensePath {
  static constexpr bool kDense = true, kPacked = false;
};
struct PackedPath {
  static constexpr bool kDense = false, kPacked = true;
};
// ... or, with both true, known on the device only (exit_path.cuh). Then it has
//   bool guess() const;   a hint that may be asked before the kernels ahead have ended: which weights to prefetch
//   uint32_t decide(input) const;  by all readers, after the wait: not 0 = packed

template <class Path>
constexpr bool kDecides = Path::kDense && Path::kPacked;

// f(Type<Format>) for the format that streams
template <class T, class Path, class F>
RIVER_DEVICE void with_format(bool packed, F f) {
  if constexpr (!Path::kPacked) f(Type<DenseFormat<T>>{});
  else if constexpr (!Path::kDense) f(Type<W4Format<T>>{});
  else if (packed) f(Type<W4Format<T>>{});
  else f(Type<DenseFormat<T>>{});
}

template <class Format, class Source>
RIVER_DEVICE const Source& source_of(const Source& source) {
  return source;
}
template <class Format, class Rows>
RIVER_DEVICE const auto& source_of(const DualWeight<Rows>& weight) {
  if constexpr (Format::kPacked) return weight.packed;
  else return weight.dense;
}

}  // namespace river::device
