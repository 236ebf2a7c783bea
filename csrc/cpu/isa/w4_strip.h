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

// What a tile of a strip from memory asks for before it is computed
inline void ask_beyond(const uint8_t* tile) {
  for (int line = 0; line < river::kTileBytes; line += 64) __builtin_prefetch(tile + kBytesAhead + line);
}

#if defined(__AVX512BF16__)
// In bf16, lanes are output rows. A vector of scales then serves a tile and a row at once, and the activations come as
// pairs that a product broadcasts from memory; a tile must be transposed for it, once for all rows.

// (maskz, as in simd.h: GCC 12 warns without.)

// Four row pairs of a tile, transposed: lane 4l + p of words[j] is word 4l + j of pair p.
struct FourPairs {
  __m512i words[4];

  explicit FourPairs(const uint8_t* pairs) {
    const __m512i a = load<__m512i>(pairs), b = load<__m512i>(pairs + 64);
    const __m512i c = load<__m512i>(pairs + 128), d = load<__m512i>(pairs + 192);
    const __m512i low_ab = _mm512_maskz_unpacklo_epi32(0xffff, a, b),
                  low_cd = _mm512_maskz_unpacklo_epi32(0xffff, c, d);
    const __m512i high_ab = _mm512_maskz_unpackhi_epi32(0xffff, a, b),
                  high_cd = _mm512_maskz_unpackhi_epi32(0xffff, c, d);
    words[0] = _mm512_maskz_unpacklo_epi64(0xff, low_ab, low_cd);
    words[1] = _mm512_maskz_unpackhi_epi64(0xff, low_ab, low_cd);
    words[2] = _mm512_maskz_unpacklo_epi64(0xff, high_ab, high_cd);
    words[3] = _mm512_maskz_unpackhi_epi64(0xff, high_ab, high_cd);
  }
};

// Lanes of a tile's words: rows 0-3, 8-11, 4-7, 12-15. Exchanging the middle quarters gives their natural order, and
// takes it back.
inline __m512i middle_exchanged(__m512i v) { return _mm512_maskz_shuffle_i32x4(0xffff, v, v, 0b11011000); }

// The columns of a tile, four at a time
struct TileWords {
  FourPairs low, high;

  explicit TileWords(const uint8_t* tile) : low(tile), high(tile + 256) {}

  // Word i of all row pairs: the low byte of each half holds columns 4i to 4i + 3 of a lane's row.
  template <int i>
  u32x16 word() const {
    const u32x16 shift = {0, 0, 0, 0, 8, 8, 8, 8, 0, 0, 0, 0, 8, 8, 8, 8};  // the pair's second row is a byte higher
    return u32x16(_mm512_maskz_shuffle_i32x4(0xffff, low.words[i % 4], high.words[i % 4], i / 4 * 0b01010101)) >> shift;
  }
};

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

// sum += even columns' pairs, more += odd columns' pairs of a tile with T rows
template <int T, int... i>
[[gnu::always_inline]] inline void add_tile(std::integer_sequence<int, i...>, const NibbleTable& table,
                                            const TileWords& tile, const Line* lines, int rows, f32x16 (&sum)[T],
                                            f32x16 (&more)[T]) {
  const auto add = [&]<int word>() {
    const u32x16 words = tile.template word<word>();
    const __m512i first = table[words], second = table[words >> 4];
    RIVER_UNROLL for (int t = 0; t < T; t++) {
      const char* pairs = lines[word / 8 * rows + t].bytes + word % 8 * 8;
      sum[t] = dot_bf16(sum[t], first, _mm512_set1_epi32(load<int>(pairs)));
      more[t] = dot_bf16(more[t], second, _mm512_set1_epi32(load<int>(pairs + 4)));
    }
  };
  (add.template operator()<i>(), ...);
}

template <int T>
inline void w4_bf16_vectors(const uint8_t* strip, const Operand& x, int t0, bool hot, Walk& ahead, StripOut& out) {
  const NibbleTable table;
  const int tiles = x.padded / kGroup;
  const Line* lines = line_at(DType::kBFloat16, x, 0, t0);
  f32x16 acc[T] = {};
  for (int tile = 0; tile < tiles; tile++, lines += 2 * x.rows) {
    const uint8_t* data = strip + int64_t(tile) * river::kTileBytes;
    if (hot) ahead.step();
    else ask_beyond(data);
    const TileMetadata metadata(u32x16(middle_exchanged(load<__m512i>(data + river::kTileMetadata))));
    f32x16 sum[T], more[T] = {};
    RIVER_UNROLL for (int t = 0; t < T; t++) sum[t] =
        (NibbleTable::kOffset - metadata.zero) * x.sums[int64_t(t0 + t) * tiles + tile];
    add_tile<T>(std::make_integer_sequence<int, 16>(), table, TileWords(data), lines, x.rows, sum, more);
    RIVER_UNROLL for (int t = 0; t < T; t++) acc[t] += (sum[t] + more[t]) * metadata.scale;
  }
  RIVER_UNROLL for (int t = 0; t < T; t++) store(out[t0 + t], middle_exchanged(__m512i(acc[t])));
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
      else if (g0 == 0) ask_beyond(data);
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
  Walk walk(ahead, x.padded / kGroup);  // each tile goes by once or more
#if defined(__AVX512BF16__)
  if (dtype == DType::kBFloat16)
    return for_vectors<river::kMaxRows>(block.rows,
                                        [&]<int T>(int t0) { w4_bf16_vectors<T>(strip, block, t0, hot, walk, out); });
#endif
  for_vectors<kW4Vectors>(
      block.rows, [&]<int T>(int t0) { w4_float_vectors<pairs_at_once(T), T>(strip, block, t0, hot, walk, out); });
}

}  // namespace
