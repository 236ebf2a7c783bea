// A strip of a dense or W4 linear: sixteen output rows for T = 1..8 activation vectors, out[t][r] = w[r] . x[t].
//
// Decoding reads every weight once, so the loops work on several output rows at once, with T accumulators each. Each
// (output row, t) has one accumulator that runs over K in order, whatever T is: a result never depends on its
// neighbours. With AVX512_BF16, bf16 products go through vdpbf16ps; all other cases run in fp32. W4 nibbles become
// exact small numbers first; scale and zero are applied in fp32.
#pragma once

#include <utility>  // integer_sequence, a type

#include "kernels.h"
#include "simd.h"

namespace {

using river::DType;
using river::cpu::Line;
using river::cpu::Operand;
using river::cpu::StripOut;

constexpr int kGroup = river::kTileCols;  // columns of a tile, one (scale, zero) pair per output row

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

inline int values_of_a_line(DType dtype) { return uses_bf16(dtype) ? 32 : 16; }

// The block of rows from `first` on
inline Operand block_of(DType dtype, const Operand& x, int first) {
  const int left = x.rows - first;
  Operand block = x;
  block.rows = left < river::kMaxRows ? left : river::kMaxRows;
  block.lines += int64_t(first) * (x.padded / values_of_a_line(dtype));
  block.sums += int64_t(first) * (x.padded / kGroup);
  return block;
}

// The line of row t of a block that begins with column k
inline Line* line_at(DType dtype, const Operand& block, int k, int t) {
  return block.lines + int64_t(k / values_of_a_line(dtype)) * block.rows + t;
}

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
inline void regroup_bf16(u32x16 (&pairs)[2]) {
  const u32x16 low = pairs[0], high = pairs[1];
  pairs[0] = every_second<0>(low, high);
  pairs[1] = every_second<1>(low, high);
}

inline void regroup_float(f32x16 (&v)[4]) {
  const f32x16 even[] = {every_second<0>(v[0], v[1]), every_second<0>(v[2], v[3])};
  const f32x16 odd[] = {every_second<1>(v[0], v[1]), every_second<1>(v[2], v[3])};
  v[0] = every_second<0>(even[0], even[1]);
  v[1] = every_second<0>(odd[0], odd[1]);
  v[2] = every_second<1>(even[0], even[1]);
  v[3] = every_second<1>(odd[0], odd[1]);
}

void prepare(DType dtype, const void* x, bool packed, int row, const Operand& operand) {
  const bool bf16 = uses_bf16(dtype);
  const int64_t size = river::size_of(dtype);
  const int t = row % river::kMaxRows;
  const Operand block = block_of(dtype, operand, row - t);
  for (int k = 0; k < operand.padded; k += kGroup) {
    const char* group = static_cast<const char*>(x) + k * size;
    char tail[kGroup * sizeof(float)];
    if (operand.cols - k < kGroup) {
      memset(tail, 0, sizeof(tail));
      memcpy(tail, group, (operand.cols - k) * size);
      group = tail;
    }
    Line* line = line_at(dtype, block, k, t);
    const auto put = [&](auto& vectors) {
      for (const auto& v : vectors) store(line, v), line += block.rows;
    };
    f32x16 v[4];
    if (packed || !bf16) {
      for (int i = 0; i < 4; i++) v[i] = load_as_float(dtype, group, 16 * i);
    }
    if (packed) block.sums[t * (block.padded / kGroup) + k / kGroup] = reduce(((v[0] + v[1]) + v[2]) + v[3]);
    if (bf16) {
      u32x16 pairs[] = {load<u32x16>(group), load<u32x16>(group + 64)};
      if (packed) regroup_bf16(pairs);
      put(pairs);
    } else {
      if (packed) regroup_float(v);
      put(v);
    }
  }
}

// ---- dense ------------------------------------------------------------------------------------

// A line of columns of a dense weight: how it is read, and its products with a line of activations
template <DType D>
struct Columns {
  static constexpr int kCount = 16;
  using Vector = Values;

  static Vector load_weight(const char* row, int k) { return load_as_float(D, row, k); }
  static Vector load_last(const char* row, int k, int cols) { return load_tail(D, row, k, cols); }
  static Vector load_line(const Line& line) { return load<f32x16>(&line); }
  static void add(Sum& sum, const Vector& w, const Vector& v) { sum.add(w, v); }
};

#if defined(__AVX512BF16__)
template <>
struct Columns<DType::kBFloat16> {
  static constexpr int kCount = 32;
  using Vector = __m512i;

  static Vector load_weight(const char* row, int k) {
    Vector w = _mm512_loadu_si512(row + 2 * int64_t(k));
    asm("" : "+v"(w));  // one load, not one per row
    return w;
  }
  static Vector load_last(const char* row, int k, int cols) {
    return _mm512_maskz_loadu_epi16((1u << (cols - k)) - 1, row + 2 * int64_t(k));
  }
  static Vector load_line(const Line& line) { return _mm512_load_si512(&line); }
  static void add(Sum& sum, const Vector& w, const Vector& v) { sum.piece[0] = dot_bf16(sum.piece[0], w, v); }
};
#endif

constexpr int kRowsAhead = 8;  // output rows from those in use to those asked for, into L2

// Adds the products of columns `begin` to `end` - 1 of R output rows with T rows of a block: acc[r * T + t]. A hot
// strip is in L2 already.
template <DType D, bool kHot, int R, int T>
[[gnu::always_inline]] inline void add_products(const char* weight, const Operand& x, int t0, int begin, int end,
                                                Sum (&acc)[R * T]) {
  using Columns = ::Columns<D>;
  const int64_t row_bytes = x.cols * river::size_of(D);
  const Line* line = x.lines + int64_t(begin / Columns::kCount) * x.rows + t0;
  const auto step = [&](auto load_weight) {
    typename Columns::Vector w[R];
    RIVER_UNROLL for (int r = 0; r < R; r++) w[r] = load_weight(weight + r * row_bytes);
    RIVER_UNROLL for (int t = 0; t < T; t++) {
      const auto v = Columns::load_line(line[t]);
      RIVER_UNROLL for (int r = 0; r < R; r++) Columns::add(acc[r * T + t], w[r], v);
    }
    line += x.rows;
  };
  int k = begin;
  for (; k + Columns::kCount <= end; k += Columns::kCount)
    step([&](const char* row) {
      if (!kHot) __builtin_prefetch(row + kRowsAhead * row_bytes + k * river::size_of(D), 0, 2);
      return Columns::load_weight(row, k);
    });
  if (k < end) step([&](const char* row) { return Columns::load_last(row, k, end); });
}

// Calls f<T>(t0) for the rows t0 .. t0 + T - 1 of a block, kVectors at a time
template <int kVectors, class F>
inline void for_vectors(int rows, F f) {
  for (int t0 = 0; t0 < rows; t0 += kVectors) {
    const int count = rows - t0 < kVectors ? rows - t0 : kVectors;
    [&]<int... T>(std::integer_sequence<int, T...>) {
      ((count == T + 1 ? f.template operator()<T + 1>(t0) : void()), ...);
    }(std::make_integer_sequence<int, kVectors>());
  }
}

// Output rows of a strip in blocks of R, the last ones alone
template <int R, class F>
inline void for_rows(int count, F f) {
  int r = 0;
  for (; r + R <= count; r += R) f.template operator()<R>(r);
  for (; r < count; r++) f.template operator()<1>(r);
}

template <DType D>
constexpr int kPart = 48 * Columns<D>::kCount;  // columns that L1 holds of a block of rows

template <int R, int T>
inline void put_sums(const Sum (&acc)[R * T], int t0, int r0, StripOut& out) {
  float sum[R * T];
  reduce_each(acc, sum);
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) out[t0 + t][r0 + r] = sum[r * T + t];
}

// As many rows and output rows at a time as there are registers for their sums
constexpr int kDenseVectors = kPieces == 1 ? river::kMaxRows : kSums / 4;
constexpr int rows_at_once(int vectors) { return vectors <= 2 ? kSums / 2 : vectors <= 6 ? kSums / 4 : 3; }

// All columns at once: out[t0 + t][r] for T rows of a block
template <DType D, bool kHot, int T>
inline void dense_vectors(const char* weight, int count, const Operand& x, int t0, StripOut& out) {
  for_rows<rows_at_once(T)>(count, [&]<int R>(int r0) {
    Sum acc[R * T];
    add_products<D, kHot, R, T>(weight + r0 * x.cols * river::size_of(D), x, t0, 0, x.cols, acc);
    put_sums<R, T>(acc, t0, r0, out);
  });
}

// The same of a hot strip, with so many columns at once that L1 holds those of the rows while all output rows go by
template <DType D, int T>
inline void dense_vectors_by_parts(const char* weight, int count, const Operand& x, int t0, StripOut& out) {
  f32x16 sums[river::kTileRows * T];  // of the columns before `begin`
  for (int begin = 0, end; begin < x.cols; begin = end) {
    end = x.cols - begin <= kPart<D> ? x.cols : begin + kPart<D>;
    for_rows<rows_at_once(T)>(count, [&]<int R>(int r0) {
      Sum acc[R * T];
      if (begin > 0) RIVER_UNROLL for (int i = 0; i < R * T; i++) acc[i] = Sum{sums[r0 * T + i]};
      add_products<D, true, R, T>(weight + r0 * x.cols * river::size_of(D), x, t0, begin, end, acc);
      if (end == x.cols) return put_sums<R, T>(acc, t0, r0, out);
      RIVER_UNROLL for (int i = 0; i < R * T; i++) sums[r0 * T + i] = acc[i].all();
    });
  }
}

void dense_strip(DType dtype, const void* weight, int count, const Operand& x, int first, StripOut& out) {
  const Operand block = block_of(dtype, x, first);
  const bool hot = x.rows > river::kMaxRows;  // else it comes from memory, best in one go
  with_dtype(dtype, [&]<DType D>() {
    for_vectors<kDenseVectors>(block.rows, [&]<int T>(int t0) {
      const auto* rows = static_cast<const char*>(weight);
      if (!hot) dense_vectors<D, false, T>(rows, count, block, t0, out);
      else if (x.cols <= kPart<D>) dense_vectors<D, true, T>(rows, count, block, t0, out);
      else dense_vectors_by_parts<D, T>(rows, count, block, t0, out);
    });
  });
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
  inline void dot(const uint8_t* words, const Operand& x, int t0, int column, Sum (&lo)[T], Sum (&hi)[T]) const {
    __m512i w = _mm512_loadu_si512(words);  // vpermw looks at 5 bits, the table repeats after 4
    asm("" : "+v"(w));                      // one load, not one per shift: there is one 64-byte load a cycle
    const __m512i lo0 = _mm512_permutexvar_epi16(w, table);
    const __m512i lo1 = _mm512_permutexvar_epi16(__m512i(u32x16(w) >> 4), table);
    const __m512i hi0 = _mm512_permutexvar_epi16(__m512i(u32x16(w) >> 8), table);
    const __m512i hi1 = _mm512_permutexvar_epi16(__m512i(u32x16(w) >> 12), table);
    for (int t = 0; t < T; t++) {
      const Line* v = line_at(DType::kBFloat16, x, column, t0 + t);
      const __m512i v0 = _mm512_load_si512(v), v1 = _mm512_load_si512(v + x.rows);
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
  inline void dot(const uint8_t* words, const Operand& x, int t0, int column, Sum (&lo)[T], Sum (&hi)[T]) const {
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
      if (T > 2) {  // there is more to compute: each pass asks for its part of the next strip
        const uint8_t* next = data + int64_t(tiles) * river::kTileBytes;
        for (int p = 0; p < P; p++) __builtin_prefetch(next + 64 * (g0 + p), 0, 2);
        if (g0 == 0) __builtin_prefetch(next + river::kTileMetadata, 0, 2);
      }
      float scale[16];
      store(scale, scales);
      asm volatile("" : "+m"(scale));  // keeps them in memory, where an FMA broadcasts for free
      if (g0 == 0)
        RIVER_UNROLL for (int t = 0; t < T; t++) correction[t].add(offsets, x.sums[int64_t(t0 + t) * tiles + tile]);
      RIVER_UNROLL for (int p = 0; p < P; p++) {
        Sum part_lo[T], part_hi[T];
        nibbles.template dot<T>(data + 64 * (g0 + p), x, t0, tile * kGroup, part_lo, part_hi);
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

constexpr int kW4Vectors = kSums / 4;
constexpr int pairs_at_once(int vectors) {
  return vectors == 1 ? kSums / 2 : vectors == 2 ? kSums / 4 : vectors <= 4 ? kSums / 8 : 1;
}

template <class Nibbles>
void w4_strip_by(const Nibbles& nibbles, const uint8_t* strip, const Operand& x, StripOut& out) {
  for_vectors<kW4Vectors>(x.rows, [&]<int T>(int t0) { w4_vectors<pairs_at_once(T), T>(nibbles, strip, x, t0, out); });
}

void w4_strip(DType dtype, const uint8_t* strip, const Operand& x, int first, StripOut& out) {
  const Operand block = block_of(dtype, x, first);
#if defined(__AVX512BF16__)
  if (dtype == DType::kBFloat16) return w4_strip_by(Bf16Nibbles(), strip, block, out);
#endif
  w4_strip_by(FloatNibbles(), strip, block, out);
}

}  // namespace
