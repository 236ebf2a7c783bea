// The W4 tile format on the CPU: pack, unpack, dequantise. The layout is described in river_ext/quant/w4.py.
#include "isa/kernels.h"

#include <algorithm>
#include <cstring>

namespace river::cpu {

namespace {

using Words = uint32_t[kTileMetadata / sizeof(uint32_t)];
using Metadata = uint16_t[kTileRows][2];  // fp16 scale and zero of each row

struct Nibble {  // of tile entry (row, column): its word and the shift in it
  int word, shift;
};

constexpr Nibble nibble_at(int row, int column) {
  return {.word = (row % 8) * 16 + column / 4, .shift = 16 * (column % 2) + 4 * (column % 4 / 2) + 8 * (row / 8)};
}

// One tile of a weight; rows and columns past those of the weight are padding.
struct Tile {
  int64_t first_row, first_column;
  int rows, columns;  // that are no padding
  int64_t group;      // along K
  bool begins_group;
  uint8_t* bytes;  // [576]

  // Calls f(row in the tile, column in the tile, index in [out, in]) for the entries that are no padding.
  template <class F>
  void for_entries(const W4Args& a, F f) const {
    for (int row = 0; row < rows; row++)
      for (int column = 0; column < columns; column++)
        f(row, column, (first_row + row) * a.in_features + first_column + column);
  }

  // Calls f(row in the tile, index in [out, groups]) for the rows that are no padding.
  template <class F>
  void for_pairs(const W4Args& a, F f) const {
    const int64_t groups = ceil_div(ceil_div(a.in_features, kTileCols), a.group_tiles);
    for (int row = 0; row < rows; row++) f(row, (first_row + row) * groups + group);
  }
};

// Calls f for every tile, strips of them in parallel.
template <class F>
void for_tiles(const W4Args& a, const Parallel& parallel, F f) {
  const int64_t tiles = ceil_div(a.in_features, kTileCols);
  parallel(ceil_div(a.out_features, kTileRows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++)
      for (int64_t k = 0; k < tiles; k++)
        f(Tile{.first_row = n * kTileRows,
               .first_column = k * kTileCols,
               .rows = int(std::min<int64_t>(kTileRows, a.out_features - n * kTileRows)),
               .columns = int(std::min<int64_t>(kTileCols, a.in_features - k * kTileCols)),
               .group = k / a.group_tiles,
               .begins_group = k % a.group_tiles == 0,
               .bytes = a.packed + (n * tiles + k) * kTileBytes});
  });
}

}  // namespace

void launch_pack_w4(const W4Args& a, const Parallel& parallel) {
  for_tiles(a, parallel, [&](const Tile& tile) {
    Words words = {};
    Metadata metadata = {};
    tile.for_entries(a, [&](int row, int column, int64_t i) {
      const Nibble at = nibble_at(row, column);
      words[at.word] |= uint32_t(a.q[i]) << at.shift;
    });
    tile.for_pairs(a, [&](int row, int64_t i) {
      metadata[row][0] = a.scale[i];
      metadata[row][1] = a.zero[i];
    });
    memcpy(tile.bytes, words, sizeof(words));
    memcpy(tile.bytes + kTileMetadata, metadata, sizeof(metadata));
  });
}

void launch_unpack_w4(const W4Args& a, const Parallel& parallel) {
  for_tiles(a, parallel, [&](const Tile& tile) {
    Words words;
    Metadata metadata;
    memcpy(words, tile.bytes, sizeof(words));
    memcpy(metadata, tile.bytes + kTileMetadata, sizeof(metadata));
    tile.for_entries(a, [&](int row, int column, int64_t i) {
      const Nibble at = nibble_at(row, column);
      a.q[i] = words[at.word] >> at.shift & 15;
    });
    if (!tile.begins_group) return;  // a group that is larger than a tile repeats its pair in each
    tile.for_pairs(a, [&](int row, int64_t i) {
      a.scale[i] = metadata[row][0];
      a.zero[i] = metadata[row][1];
    });
  });
}

void launch_dequantize_w4(const W4Args& a, const Parallel& parallel) {
  for_tiles(a, parallel, [&](const Tile& tile) {
    Words words;
    float metadata[2 * kTileRows], values[kTileCols];
    memcpy(words, tile.bytes, sizeof(words));
    kernels().to_float(DType::kFloat16, tile.bytes + kTileMetadata, metadata, 2 * kTileRows);
    for (int row = 0; row < tile.rows; row++) {
      const float scale = metadata[2 * row], zero = metadata[2 * row + 1];
      for (int column = 0; column < tile.columns; column++) {
        const Nibble at = nibble_at(row, column);
        values[column] = (float(words[at.word] >> at.shift & 15) - zero) * scale;
      }
      const int64_t first = (tile.first_row + row) * a.in_features + tile.first_column;
      kernels().from_float(a.dtype, values, static_cast<char*>(a.dense) + first * size_of(a.dtype), tile.columns);
    }
  });
}

}  // namespace river::cpu
