// A strip of a W4 linear: sixteen output rows for T = 1..8 activation vectors, as in dense_strip.h.
//
// Nibbles become exact small numbers first; scale and zero are applied in fp32. Each (output row, t) has one
// accumulator that runs over K in order, whatever T is.
#pragma once

#include "lines.h"

namespace {

using river::cpu::StripOut;

// What the output rows of a tile have beside their nibbles
struct TileMetadata {
  f32x16 scale, zero;

  explicit TileMetadata(u32x16 pairs) : scale(f16_to_float(narrow(pairs))), zero(f16_to_float(narrow(pairs >> 16))) {}
};

#if defined(__AVX512BF16__)
// In bf16, lanes 2p and 2p + 1 are row pair p: its first row, p, in one register and its second, p + 8, in another. A
// vector of scales then serves eight rows of a tile at once, and the activations come eight bytes at a time, which a
// load repeats for two products; a tile must be transposed for it, once for all rows of x.

// (maskz, as in simd.h: GCC 12 warns without.)

// Every second quarter of a and b together, from quarter kFirst on
template <int kFirst>
inline __m512i every_second_quarter(__m512i a, __m512i b) {
  return _mm512_maskz_shuffle_i64x2(0xff, a, b, 0b10'00'10'00 + kFirst * 0b01'01'01'01);
}

// The columns of a tile, eight at a time: lanes 2p and 2p + 1 of eighth[m] are words 2m and 2m + 1 of row pair p.
inline void transpose(const uint8_t* tile, u32x16 (&eighth)[8]) {
  const auto pair = [&](int p) { return load<__m512i>(tile + 64 * p); };
  RIVER_UNROLL for (int odd = 0; odd < 2; odd++) {
    __m512i two[4];
    RIVER_UNROLL for (int i = 0; i < 4; i++) two[i] =
        odd ? _mm512_maskz_unpackhi_epi64(0xff, pair(2 * i), pair(2 * i + 1))
            : _mm512_maskz_unpacklo_epi64(0xff, pair(2 * i), pair(2 * i + 1));
    const __m512i even[] = {every_second_quarter<0>(two[0], two[1]), every_second_quarter<0>(two[2], two[3])};
    const __m512i rest[] = {every_second_quarter<1>(two[0], two[1]), every_second_quarter<1>(two[2], two[3])};
    eighth[odd] = u32x16(every_second_quarter<0>(even[0], even[1]));
    eighth[odd + 2] = u32x16(every_second_quarter<0>(rest[0], rest[1]));
    eighth[odd + 4] = u32x16(every_second_quarter<1>(even[0], even[1]));
    eighth[odd + 6] = u32x16(every_second_quarter<1>(rest[0], rest[1]));
  }
}

struct NibbleTable {
  static constexpr float kOffset = 8;  // it holds the bf16 numbers q - 8
  __m512i table;

  NibbleTable() {
    alignas(64) uint16_t entry[32];
    for (int i = 0; i < 32; i++) {
      const float value = float(i % 16) - kOffset;
      uint32_t bits;
      memcpy(&bits, &value, 4);
      entry[i] = uint16_t(bits >> 16);
    }
    table = _mm512_load_si512(entry);
  }
  // vpermw looks at 5 bits of each half, and the table repeats after 4.
  __m512i operator[](u32x16 words) const { return _mm512_permutexvar_epi16(__m512i(words), table); }
};

// What the first or the second rows of the pairs have beside their nibbles
struct RowsMetadata {
  f32x16 scale;
  f32x16 offset;  // times the sum of a vector's values, added once per row: in the odd lanes

  explicit RowsMetadata(const uint8_t* scales_and_zeros) {
    const __m512 both = _mm512_maskz_cvtph_ps(0xffff, load<__m256i>(scales_and_zeros));
    scale = f32x16(_mm512_maskz_moveldup_ps(0xffff, both));
    offset = f32x16(_mm512_maskz_sub_ps(0xaaaa, _mm512_set1_ps(NibbleTable::kOffset), both));
  }
};

// acc[row of a pair][t] += the products of kTiles tiles, from `first` on, with T rows of x
template <bool kHot, int kTiles, int T>
[[gnu::always_inline]] inline void add_tiles(const NibbleTable& table, const uint8_t* strip, int first,
                                             const Operand& x, int t0, Walk& ahead, f32x16 (&acc)[2][T]) {
  const uint8_t* tile = strip + int64_t(first) * river::kTileBytes;
  const auto ask = [&](int line) {
    if constexpr (kHot) ahead.step();
    else ask_memory(reinterpret_cast<const char*>(tile) + kBytesAhead + 64 * line);
  };
  f32x16 low[kTiles][T], high[kTiles][T], scale[kTiles][2];
  RIVER_UNROLL for (int n = 0; n < kTiles; n++) {
    ask(8 * kTiles + n);  // the last lines first: in the order of addresses T = 4 was 5 % slower
    const uint8_t* metadata = tile + n * river::kTileBytes + river::kTileMetadata;
    const RowsMetadata first_rows(metadata), second_rows(metadata + 32);
    scale[n][0] = first_rows.scale, scale[n][1] = second_rows.scale;
    RIVER_UNROLL for (int t = 0; t < T; t++) {
      const float total = x.sums[int64_t(t0 + t) * (x.padded / kGroup) + first + n];
      low[n][t] = first_rows.offset * total, high[n][t] = second_rows.offset * total;
    }
  }
  u32x16 eighth[kTiles][8];
  RIVER_UNROLL for (int n = 0; n < kTiles; n++) transpose(tile + n * river::kTileBytes, eighth[n]);
  const Line* lines = line_at(DType::kBFloat16, x, first * kGroup, t0);
  RIVER_UNROLL for (int m = 0; m < 8; m++) {
    RIVER_UNROLL for (int n = 0; n < kTiles; n++) ask(kTiles * m + n);
    const auto add = [&]<int part>() {
      RIVER_UNROLL for (int n = 0; n < kTiles; n++) {
        const u32x16 words = eighth[n][m] >> 4 * part;
        const __m512i low_rows = table[words], high_rows = table[words >> 8];
        RIVER_UNROLL for (int t = 0; t < T; t++) {
          const char* values = lines[(2 * n + m / 4) * x.rows + t].bytes + m % 4 * 16 + part * 8;
          const __m512i v = _mm512_set1_epi64(load<int64_t>(values));
          low[n][t] = dot_bf16(low[n][t], low_rows, v);
          high[n][t] = dot_bf16(high[n][t], high_rows, v);
        }
      }
    };
    add.template operator()<0>();
    add.template operator()<1>();
  }
  RIVER_UNROLL for (int n = 0; n < kTiles; n++) RIVER_UNROLL for (int t = 0; t < T; t++) {
    acc[0][t] += low[n][t] * scale[n][0];
    acc[1][t] += high[n][t] * scale[n][1];
  }
}

template <bool kHot, int T>
inline void w4_bf16_vectors(const uint8_t* strip, const Operand& x, int t0, Walk& ahead, StripOut& out) {
  constexpr int kTiles = T <= 5 ? 2 : 1;  // few rows: the products of one tile would wait for their sums
  const NibbleTable table;
  const int tiles = x.padded / kGroup;
  f32x16 acc[2][T] = {};
  int tile = 0;
  for (; tile + kTiles <= tiles; tile += kTiles) add_tiles<kHot, kTiles>(table, strip, tile, x, t0, ahead, acc);
  for (; tile < tiles; tile++) add_tiles<kHot, 1>(table, strip, tile, x, t0, ahead, acc);
  RIVER_UNROLL for (int t = 0; t < T; t++)
      store(out[t0 + t], every_second<0>(acc[0][t], acc[1][t]) + every_second<1>(acc[0][t], acc[1][t]));
}
#endif

// In fp32, lanes are the words of a row pair (g, g + 8).

inline Piece small_float(WordPiece q) {
  using Signed = int32_t __attribute__((vector_size(sizeof(WordPiece))));
  return __builtin_convertvector(Signed(q), Piece);
}

// Adds the products of one row pair with T rows to lo and hi.
template <int T>
inline void add_pair(const uint8_t* words, const Operand& x, int t0, int column, Sum (&lo)[T], Sum (&hi)[T]) {
  RIVER_UNROLL for (int piece = 0; piece < kPieces; piece++) {
    const auto w = load<WordPiece>(words + piece * sizeof(WordPiece));
    RIVER_UNROLL for (int part = 0; part < 4; part++) {  // column mod 4
      const int shift = 16 * (part % 2) + 4 * (part / 2);
      const Piece q_lo = small_float((w >> shift) & 15u), q_hi = small_float((w >> (shift + 8)) & 15u);
      RIVER_UNROLL for (int t = 0; t < T; t++) {
        const Line* v = line_at(DType::kFloat32, x, column, t0 + t) + part * x.rows;
        const auto values = load<Piece>(v->bytes + kPieceBytes * piece);
        lo[t].piece[piece] += q_lo * values;
        hi[t].piece[piece] += q_hi * values;
      }
    }
  }
}

// Row pairs in blocks of P, so that 2 x P x T accumulators stay in registers; the first block also sums the
// corrections. A strip is at most some tens of KB, so only the first block reads it from memory.
template <int P, int T>
inline void w4_float_vectors(const uint8_t* strip, const Operand& x, int t0, bool hot, Walk& ahead, StripOut& out) {
  const int tiles = x.padded / kGroup;
  Sum correction[T];
  for (int g0 = 0; g0 < 8; g0 += P) {
    Sum acc[2 * P * T];  // [row of a pair, pair, vector]
    for (int tile = 0; tile < tiles; tile++) {
      const uint8_t* data = strip + int64_t(tile) * river::kTileBytes;
      const TileMetadata metadata(load<u32x16>(data + river::kTileMetadata));
      if (hot) ahead.step();
      else if (g0 == 0)
        for (int line = 0; line < river::kTileBytes; line += 64)
          ask_memory(reinterpret_cast<const char*>(data) + kBytesAhead + line);
      float scale[16];
      store(scale, metadata.scale);
      asm volatile("" : "+m"(scale));  // keeps them in memory, where an FMA broadcasts for free
      if (g0 == 0)
        RIVER_UNROLL for (int t = 0; t < T; t++) correction[t].add(metadata.zero * metadata.scale,
                                                                   x.sums[int64_t(t0 + t) * tiles + tile]);
      RIVER_UNROLL for (int p = 0; p < P; p++) {
        Sum part_lo[T], part_hi[T];
        add_pair<T>(data + 64 * (g0 + p), x, t0, tile * kGroup, part_lo, part_hi);
        RIVER_UNROLL for (int t = 0; t < T; t++) {
          acc[p * T + t].add(part_lo[t], scale[g0 + p]);
          acc[(P + p) * T + t].add(part_hi[t], scale[g0 + p + 8]);
        }
      }
    }
    float sum[2 * P * T];
    reduce_each(acc, sum);
    for (int t = 0; t < T; t++)
      for (int p = 0; p < P; p++) {
        out[t0 + t][g0 + p] = sum[p * T + t];
        out[t0 + t][g0 + p + 8] = sum[(P + p) * T + t];
      }
  }
  for (int t = 0; t < T; t++) store(out[t0 + t], load<f32x16>(out[t0 + t]) - correction[t].all());
}

constexpr int kW4Vectors = kSums / 4;
constexpr int pairs_at_once(int vectors) {
  return vectors == 1 ? kSums / 2 : vectors == 2 ? kSums / 4 : vectors <= 4 ? kSums / 8 : 1;
}

void w4_strip(DType dtype, const uint8_t* strip, const Operand& x, int first, const Ahead& ahead, StripOut& out) {
  const Operand block = block_of(dtype, x, first);
  const bool hot = x.rows > river::kMaxRows;
  const int tiles = x.padded / kGroup;
#if defined(__AVX512BF16__)
  if (dtype == DType::kBFloat16) {
    Walk walk(ahead, int64_t(tiles) * (river::kTileBytes / 64));
    return for_vectors<river::kMaxRows>(block.rows, [&]<int T>(int t0) {
      if (hot) w4_bf16_vectors<true, T>(strip, block, t0, walk, out);
      else w4_bf16_vectors<false, T>(strip, block, t0, walk, out);
    });
  }
#endif
  Walk walk(ahead, tiles);  // each tile goes by once or more
  for_vectors<kW4Vectors>(
      block.rows, [&]<int T>(int t0) { w4_float_vectors<pairs_at_once(T), T>(strip, block, t0, hot, walk, out); });
}

}  // namespace
