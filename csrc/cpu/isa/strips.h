// A strip of a dense or W4 linear: sixteen output rows for T = 1..8 activation vectors, out[t][r] = w[r] . x[t].
//
// Decoding reads every weight once, so the loops work on several output rows at once, with T accumulators each. Each
// (output row, t) has one accumulator that runs over K in order, whatever T is: a result never depends on its
// neighbours. With AVX512_BF16, bf16 products go through vdpbf16ps; all other cases run in fp32. W4 nibbles become
// exact small numbers first; scale and zero are applied in fp32.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using river::DType;
using river::cpu::Operand;
using river::cpu::StripOut;

constexpr int kGroup = river::kTileCols;  // columns of a tile, one (scale, zero) pair per output row
constexpr int kVectors = kSums / 4;       // activation vectors per pass

#if defined(__AVX512BF16__)
constexpr bool kBf16Dot = true;
inline f32x16 dot_bf16(f32x16 acc, __m512i a, __m512i b) {
  return f32x16(_mm512_dpbf16_ps(__m512(acc), __m512bh(a), __m512bh(b)));
}
#else
constexpr bool kBf16Dot = false;
#endif

// Bytes from W4 data in use to data asked for: into L2 early enough for memory, into L1 early enough for L2.
// Hardware prefetchers stop at the end of a page; asking for L1 directly, 4 KB ahead, was a sixth slower.
constexpr int kAheadL2 = 12 << 10, kAheadL1 = 2 << 10;

inline bool uses_bf16(DType dtype) { return kBf16Dot && dtype == DType::kBFloat16; }

// ---- activations ------------------------------------------------------------------------------

// Every second lane of a and b together, from lane kFirst on
template <int kFirst, class V>
inline V every_second(V a, V b) {
  constexpr int k = kFirst;
#if defined(RIVER_SHUFFLE)
  return RIVER_SHUFFLE(a, b, k, k + 2, k + 4, k + 6, k + 8, k + 10, k + 12, k + 14, k + 16, k + 18, k + 20, k + 22,
                       k + 24, k + 26, k + 28, k + 30);
#else
  V v;
  for (int i = 0; i < 8; i++) v[i] = a[2 * i + k], v[i + 8] = b[2 * i + k];
  return v;
#endif
}

// A W4 word i of a row pair holds columns 4i..4i+3, so packed operands group the columns of a tile by
// their index mod 4: bf16 as pairs [(0, 1) x 16][(2, 3) x 16], fp32 as [0 x 16][1 x 16][2 x 16][3 x 16].
inline void regroup_bf16(const void* group, void* out) {
  const auto low = load<u32x16>(group), high = load<u32x16>(static_cast<const char*>(group) + 64);  // pairs
  store(out, every_second<0>(low, high));
  store(static_cast<char*>(out) + 64, every_second<1>(low, high));
}

inline void regroup_float(const f32x16 (&v)[4], float* out) {
  const f32x16 even[] = {every_second<0>(v[0], v[1]), every_second<0>(v[2], v[3])};
  const f32x16 odd[] = {every_second<1>(v[0], v[1]), every_second<1>(v[2], v[3])};
  store(out, every_second<0>(even[0], even[1]));
  store(out + 16, every_second<0>(odd[0], odd[1]));
  store(out + 32, every_second<1>(even[0], even[1]));
  store(out + 48, every_second<1>(odd[0], odd[1]));
}

void prepare(DType dtype, const void* x, bool packed, int row, const Operand& operand) {
  const bool bf16 = uses_bf16(dtype);
  const int64_t size = river::size_of(dtype);
  if (bf16 && !packed) {
    auto* y = static_cast<uint16_t*>(operand.values) + int64_t(row) * operand.padded;
    memcpy(y, x, operand.cols * 2);
    memset(y + operand.cols, 0, (operand.padded - operand.cols) * 2);
    return;
  }
  for (int base = 0; base < operand.padded; base += kGroup) {
    const char* group = static_cast<const char*>(x) + base * size;
    char tail[kGroup * sizeof(float)];
    if (operand.cols - base < kGroup) {
      memset(tail, 0, sizeof(tail));
      memcpy(tail, group, (operand.cols - base) * size);
      group = tail;
    }
    f32x16 v[4];
    for (int i = 0; i < 4; i++) v[i] = load_as_float(dtype, group, 16 * i);
    const int64_t at = int64_t(row) * operand.padded + base;
    if (packed) operand.sums[at / kGroup] = reduce(((v[0] + v[1]) + v[2]) + v[3]);
    if (!packed) memcpy(static_cast<float*>(operand.values) + at, v, sizeof(v));
    else if (bf16) regroup_bf16(group, static_cast<uint16_t*>(operand.values) + at);
    else regroup_float(v, static_cast<float*>(operand.values) + at);
  }
}

// ---- dense ------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
template <int R, int T>
inline void dense_rows_bf16(const uint16_t* weight, const Operand& x, int t0, int r0, StripOut& out) {
  const auto* values = static_cast<const uint16_t*>(x.values) + int64_t(t0) * x.padded;
  Sum acc[R * T];
  auto step = [&](int k, __mmask32 mask) {
    __m512i w[R];
    RIVER_UNROLL for (int r = 0; r < R; r++) {
      const uint16_t* row = weight + int64_t(r0 + r) * x.cols + k;
      if (t0 == 0) __builtin_prefetch(row + int64_t(R) * x.cols, 0, 2);  // the next block of rows, into L2
      w[r] = _mm512_maskz_loadu_epi16(mask, row);
    }
    RIVER_UNROLL for (int t = 0; t < T; t++) {
      const __m512i v = _mm512_loadu_si512(values + int64_t(t) * x.padded + k);
      RIVER_UNROLL for (int r = 0; r < R; r++) acc[r * T + t].piece[0] = dot_bf16(acc[r * T + t].piece[0], w[r], v);
    }
  };
  int k = 0;
  for (; k + 32 <= x.cols; k += 32) step(k, ~0u);
  if (k < x.cols) step(k, (1u << (x.cols - k)) - 1);
  float sum[R * T];
  reduce_each(acc, sum);
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) out[t0 + t][r0 + r] = sum[r * T + t];
}
#endif

template <DType D, int R, int T>
inline void dense_rows_float(const char* weight, const Operand& x, int t0, int r0, StripOut& out) {
  const float* values = static_cast<const float*>(x.values) + int64_t(t0) * x.padded;
  const int64_t row_bytes = x.cols * river::size_of(D);
  Sum acc[R * T];
  auto step = [&](int k, auto load_weight) {
    Values w[R];
    RIVER_UNROLL for (int r = 0; r < R; r++) w[r] = load_weight(weight + (r0 + r) * row_bytes);
    RIVER_UNROLL for (int t = 0; t < T; t++) {
      const Values v = load<f32x16>(values + int64_t(t) * x.padded + k);
      RIVER_UNROLL for (int r = 0; r < R; r++) acc[r * T + t].add(w[r], v);
    }
  };
  int k = 0;
  for (; k + 16 <= x.cols; k += 16) step(k, [&](const char* row) { return load_as_float(D, row, k); });
  if (k < x.cols) step(k, [&](const char* row) { return load_tail(D, row, k, x.cols); });
  float sum[R * T];
  reduce_each(acc, sum);
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) out[t0 + t][r0 + r] = sum[r * T + t];
}

// Calls f<T>(t0) for the activation vectors t0 .. t0 + T - 1, kVectors at a time
template <class F>
inline void for_vectors(int rows, F f) {
  for (int t0 = 0; t0 < rows; t0 += kVectors) {
    const int count = rows - t0 < kVectors ? rows - t0 : kVectors;
    if (count == 1) f.template operator()<1>(t0);
    else if (count == 2) f.template operator()<2>(t0);
    else if (count == 3) f.template operator()<3>(t0);
    else f.template operator()<kVectors>(t0);
  }
}

// Output rows of a strip in blocks of R, the last ones alone
template <int R, class F>
inline void for_rows(int count, F f) {
  int r = 0;
  for (; r + R <= count; r += R) f.template operator()<R>(r);
  for (; r < count; r++) f.template operator()<1>(r);
}

constexpr int rows_at_once(int vectors) { return vectors <= 2 ? kSums / 2 : kSums / 4; }

template <DType D>
void dense_rows_all(const void* weight, int count, const Operand& x, StripOut& out) {
  for_vectors(x.rows, [&]<int T>(int t0) {
    for_rows<rows_at_once(T)>(count, [&]<int R>(int r0) {
#if defined(__AVX512BF16__)
      if constexpr (D == DType::kBFloat16)
        return dense_rows_bf16<R, T>(static_cast<const uint16_t*>(weight), x, t0, r0, out);
#endif
      dense_rows_float<D, R, T>(static_cast<const char*>(weight), x, t0, r0, out);
    });
  });
}

void dense_strip(DType dtype, const void* weight, int count, const Operand& x, StripOut& out) {
  with_dtype(dtype, [&]<DType D>() { dense_rows_all<D>(weight, count, x, out); });
}

// ---- W4 ---------------------------------------------------------------------------------------

// The scales of a tile's 16 rows, and what multiplies the sum of activations: (offset - zero) * scale
inline void tile_metadata(const uint8_t* tile, float offset, f32x16& scale, f32x16& correction) {
  const u32x16 pairs = load<u32x16>(tile + river::kTileMetadata);
  scale = f16_to_float(narrow(pairs));
  correction = (splat(offset) - f16_to_float(narrow(pairs >> 16))) * scale;
}

// Adds the products of one row pair (g, g + 8) of a tile with T operands to lo and hi; lanes are words.
#if defined(__AVX512BF16__)
struct Bf16Nibbles {
  static constexpr float kOffset = 8;  // the table holds q - 8
  __m512i table;

  Bf16Nibbles() {
    alignas(64) uint16_t entry[32];
    for (int i = 0; i < 32; i++) {
      const float value = float(i % 16) - kOffset;
      uint32_t bits;
      memcpy(&bits, &value, 4);
      entry[i] = uint16_t(bits >> 16);
    }
    table = _mm512_load_si512(entry);
  }

  template <int T>
  inline void dot(const uint8_t* words, const Operand& x, int t0, int64_t column, Sum (&lo)[T], Sum (&hi)[T]) const {
    __m512i w = _mm512_loadu_si512(words);  // vpermw looks at 5 bits, the table repeats after 4
    asm("" : "+v"(w));                      // one load, not one per shift: there is one 64-byte load a cycle
    const __m512i lo0 = _mm512_permutexvar_epi16(w, table);
    const __m512i lo1 = _mm512_permutexvar_epi16(__m512i(u32x16(w) >> 4), table);
    const __m512i hi0 = _mm512_permutexvar_epi16(__m512i(u32x16(w) >> 8), table);
    const __m512i hi1 = _mm512_permutexvar_epi16(__m512i(u32x16(w) >> 12), table);
    for (int t = 0; t < T; t++) {
      const auto* v = static_cast<const uint16_t*>(x.values) + int64_t(t0 + t) * x.padded + column;
      const __m512i v0 = _mm512_loadu_si512(v), v1 = _mm512_loadu_si512(v + 32);
      lo[t].piece[0] = dot_bf16(dot_bf16(lo[t].piece[0], lo0, v0), lo1, v1);
      hi[t].piece[0] = dot_bf16(dot_bf16(hi[t].piece[0], hi0, v0), hi1, v1);
    }
  }
};
#endif

struct FloatNibbles {  // low nibbles are row g, the next ones row g + 8
  static constexpr float kOffset = 0;

  static Piece small_float(WordPiece q) {
    using Signed = int32_t __attribute__((vector_size(sizeof(WordPiece))));
    return __builtin_convertvector(Signed(q), Piece);
  }

  template <int T>
  inline void dot(const uint8_t* words, const Operand& x, int t0, int64_t column, Sum (&lo)[T], Sum (&hi)[T]) const {
    RIVER_UNROLL for (int piece = 0; piece < kPieces; piece++) {
      const auto w = load<WordPiece>(words + piece * sizeof(WordPiece));
      RIVER_UNROLL for (int part = 0; part < 4; part++) {  // column mod 4
        const int shift = 16 * (part % 2) + 4 * (part / 2);
        const Piece q_lo = small_float((w >> shift) & 15u), q_hi = small_float((w >> (shift + 8)) & 15u);
        RIVER_UNROLL for (int t = 0; t < T; t++) {
          const float* v = static_cast<const float*>(x.values) + int64_t(t0 + t) * x.padded + column;
          const Piece values = load<Piece>(v + 16 * part + kPieceBytes / 4 * piece);
          lo[t].piece[piece] += q_lo * values;
          hi[t].piece[piece] += q_hi * values;
        }
      }
    }
  }
};

// Row pairs in blocks of P, so that 2 x P x T accumulators stay in registers; the first block also sums the
// corrections. A strip is at most some tens of KB, so only the first block reads it from memory.
template <int P, int T, class Nibbles>
inline void w4_vectors(const Nibbles& nibbles, const uint8_t* strip, const Operand& x, int t0, StripOut& out) {
  const int tiles = x.padded / kGroup;
  Sum correction[T];
  for (int g0 = 0; g0 < 8; g0 += P) {
    Sum acc[2 * P * T];  // [row of a pair, pair, vector]
    for (int tile = 0; tile < tiles; tile++) {
      const uint8_t* data = strip + int64_t(tile) * river::kTileBytes;
      f32x16 scales, offsets;
      tile_metadata(data, Nibbles::kOffset, scales, offsets);
      if (T <= 2 && g0 == 0)
        for (int line = 0; line < river::kTileBytes; line += 64) {
          __builtin_prefetch(data + kAheadL2 + line, 0, 2);
          __builtin_prefetch(data + kAheadL1 + line);
        }
      float scale[16];
      store(scale, scales);
      asm volatile("" : "+m"(scale));  // keeps them in memory, where an FMA broadcasts for free
      if (g0 == 0)
        RIVER_UNROLL for (int t = 0; t < T; t++) correction[t].add(offsets, x.sums[int64_t(t0 + t) * tiles + tile]);
      RIVER_UNROLL for (int p = 0; p < P; p++) {
        Sum part_lo[T], part_hi[T];
        nibbles.template dot<T>(data + 64 * (g0 + p), x, t0, int64_t(tile) * kGroup, part_lo, part_hi);
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
  for (int t = 0; t < T; t++) store(out[t0 + t], load<f32x16>(out[t0 + t]) + correction[t].all());
}

constexpr int pairs_at_once(int vectors) { return vectors == 1 ? kSums / 2 : vectors == 2 ? kSums / 4 : kSums / 8; }

template <class Nibbles>
void w4_strip_by(const Nibbles& nibbles, const uint8_t* strip, const Operand& x, StripOut& out) {
  for_vectors(x.rows, [&]<int T>(int t0) { w4_vectors<pairs_at_once(T), T>(nibbles, strip, x, t0, out); });
}

void w4_strip([[maybe_unused]] DType dtype, const uint8_t* strip, const Operand& x, StripOut& out) {
#if defined(__AVX512BF16__)
  if (dtype == DType::kBFloat16) return w4_strip_by(Bf16Nibbles(), strip, x, out);
#endif
  w4_strip_by(FloatNibbles(), strip, x, out);
}

}  // namespace
