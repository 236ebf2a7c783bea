// The W4 tile format on the CPU: pack, unpack, dequantise. The layout is described in river_ext/quant/w4.py.
#include "isa/kernels.h"

#include <cstring>

namespace river::cpu {

namespace {

struct Place {  // of tile entry (row, column): its 32-bit word and the shift in it
  int word, shift;
};

constexpr Place place(int row, int column) {
  return {(row % 8) * 16 + column / 4, 16 * (column % 2) + 4 * (column % 4 / 2) + 8 * (row / 8)};
}

constexpr int kMetadata = 512;  // byte offset of the (scale, zero) pairs

struct Shape {
  int64_t row_tiles, column_tiles, groups;
  explicit Shape(const W4Args& a)
      : row_tiles(ceil_div(a.out_features, kTileRows)), column_tiles(ceil_div(a.in_features, kTileCols)),
        groups(ceil_div(column_tiles, a.group_tiles)) {}
};

// Calls f(tile bytes, row tile, column tile) for every tile
template <class F>
void for_tiles(const W4Args& a, const Shape& shape, const Parallel& parallel, F f) {
  parallel(shape.row_tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++)
      for (int64_t k = 0; k < shape.column_tiles; k++) f(a.packed + (n * shape.column_tiles + k) * kTileBytes, n, k);
  });
}

// Calls f(row in tile, column in tile, flat index in [out, in]) for the entries that are not padding
template <class F>
void for_entries(const W4Args& a, int64_t n, int64_t k, F f) {
  for (int row = 0; row < kTileRows && n * kTileRows + row < a.out_features; row++)
    for (int column = 0; column < kTileCols && k * kTileCols + column < a.in_features; column++)
      f(row, column, (n * kTileRows + row) * a.in_features + k * kTileCols + column);
}

void read_words(const uint8_t* tile, uint32_t (&words)[128]) { memcpy(words, tile, sizeof(words)); }

}  // namespace

void launch_pack_w4(const W4Args& a, const Parallel& parallel) {
  const Shape shape(a);
  for_tiles(a, shape, parallel, [&](uint8_t* tile, int64_t n, int64_t k) {
    uint32_t words[128] = {};
    uint16_t metadata[kTileRows][2] = {};
    for_entries(a, n, k, [&](int row, int column, int64_t i) {
      const Place at = place(row, column);
      words[at.word] |= (uint32_t)a.q[i] << at.shift;
    });
    for (int row = 0; row < kTileRows && n * kTileRows + row < a.out_features; row++) {
      const int64_t group = (n * kTileRows + row) * shape.groups + k / a.group_tiles;
      metadata[row][0] = a.scale[group];
      metadata[row][1] = a.zero[group];
    }
    memcpy(tile, words, sizeof(words));
    memcpy(tile + kMetadata, metadata, sizeof(metadata));
  });
}

void launch_unpack_w4(const W4Args& a, const Parallel& parallel) {
  const Shape shape(a);
  for_tiles(a, shape, parallel, [&](const uint8_t* tile, int64_t n, int64_t k) {
    uint32_t words[128];
    uint16_t metadata[kTileRows][2];
    read_words(tile, words);
    memcpy(metadata, tile + kMetadata, sizeof(metadata));
    for_entries(a, n, k, [&](int row, int column, int64_t i) {
      const Place at = place(row, column);
      a.q[i] = words[at.word] >> at.shift & 15;
    });
    if (k % a.group_tiles != 0) return;
    for (int row = 0; row < kTileRows && n * kTileRows + row < a.out_features; row++) {
      const int64_t group = (n * kTileRows + row) * shape.groups + k / a.group_tiles;
      a.scale[group] = metadata[row][0];
      a.zero[group] = metadata[row][1];
    }
  });
}

void launch_dequantize_w4(const W4Args& a, const Parallel& parallel) {
  const Shape shape(a);
  for_tiles(a, shape, parallel, [&](const uint8_t* tile, int64_t n, int64_t k) {
    uint32_t words[128];
    float metadata[2 * kTileRows], row_values[kTileCols];
    read_words(tile, words);
    kernels().to_float(DType::kFloat16, tile + kMetadata, metadata, 2 * kTileRows);
    const int64_t columns = a.in_features - k * kTileCols < kTileCols ? a.in_features - k * kTileCols : kTileCols;
    for (int row = 0; row < kTileRows && n * kTileRows + row < a.out_features; row++) {
      const float scale = metadata[2 * row], zero = metadata[2 * row + 1];
      for (int column = 0; column < columns; column++) {
        const Place at = place(row, column);
        row_values[column] = ((float)(words[at.word] >> at.shift & 15) - zero) * scale;
      }
      const int64_t first = (n * kTileRows + row) * a.in_features + k * kTileCols;
      kernels().from_float(a.dtype, row_values, (char*)a.dense + first * size_of(a.dtype), columns);
    }
  });
}

}  // namespace river::cpu
