// The two formats of a weight, dense and W4: where a strip lies in memory, how some tiles of it are copied to a stage
// of the ring by the copying warp, and how a reader warp multiplies one tile of a stage by the activations of T = 1..8
// rows.
//
// mma.m16n8k16 takes a weight's strip as operand A (16 rows) and the activations as B (8 columns), at one cost for all
// T. k is permuted, which a dot product does not mind: lane l = 4 g + t holds columns 16 t .. 16 t + 15 of rows g and g
// + 8 of a tile, and the same 16 activations of row g of x.
#pragma once

#include "arch.cuh"
#include "stream_shape.cuh"
#include "types.cuh"

namespace river::device {

// ---- where weights lie ------------------------------------------------------------------------------

// A dense source names the 16 rows of a strip one by one (null: a row of padding), so that a strip can hold rows of
// several matrices, in the packed orders (layer_weights.cuh).
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

// ---- the two formats --------------------------------------------------------------------------------

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

// Packed tiles (layout: river_ext/quant/w4.py). Nibbles become exact 16-bit numbers under a magic exponent; that
// constant, zero and scale act in fp32 on a tile's sums, with the sums of the very activations that were multiplied.
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
    const auto* metadata = reinterpret_cast<const uint32_t*>(tile + kTileMetadata);
    const float2 top = to_float2<fp16>(metadata[g]), bottom = to_float2<fp16>(metadata[g + 8]);  // scale, zero
    sum[0] += top.x * (part[0] - kNibbleOffset<T> * sum0 - top.y * sum0);
    sum[1] += top.x * (part[1] - kNibbleOffset<T> * sum1 - top.y * sum1);
    sum[2] += bottom.x * (part[2] - kNibbleOffset<T> * sum0 - bottom.y * sum0);
    sum[3] += bottom.x * (part[3] - kNibbleOffset<T> * sum1 - bottom.y * sum1);
  }
};

// The format that a source is in
template <class T, class Source>
using FormatOf = std::conditional_t<std::is_same_v<Source, PackedTiles>, W4Format<T>, DenseFormat<T>>;

}  // namespace river::device
