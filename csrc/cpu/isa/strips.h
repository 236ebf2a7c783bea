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
using river::cpu::Ahead;
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

// A walk over the bytes ahead: each step asks for the next line, if that many steps are to ask for all of them.
struct Walk {
  const char* at;
  int64_t stride;

  Walk(const Ahead& ahead, int64_t steps) : at(ahead.from), stride(river::ceil_div(ahead.bytes, steps)) {
    if (stride > 64) stride = 64;
  }
  void step() {
    __builtin_prefetch(at, 0, 2);
    at += stride;
  }
};

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

// A W4 word i of a row pair holds columns 4i..4i+3, so packed operands in fp32 group the columns of a tile by
// their index mod 4: [0 x 16][1 x 16][2 x 16][3 x 16].
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
      const u32x16 pairs[] = {load<u32x16>(group), load<u32x16>(group + 64)};
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
// strip is in L2 already, and asks for later ones.
template <DType D, bool kHot, int R, int T>
[[gnu::always_inline]] inline void add_products(const char* weight, const Operand& x, int t0, int begin, int end,
                                                Walk& ahead, Sum (&acc)[R * T]) {
  using Columns = ::Columns<D>;
  const int64_t row_bytes = x.cols * river::size_of(D);
  const Line* line = x.lines + int64_t(begin / Columns::kCount) * x.rows + t0;
  Walk walk = ahead;  // in a register
  const auto step = [&](auto load_weight) {
    if (kHot) walk.step();
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
  ahead = walk;
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
inline void dense_vectors(const char* weight, int count, const Operand& x, int t0, Walk& ahead, StripOut& out) {
  for_rows<rows_at_once(T)>(count, [&]<int R>(int r0) {
    Sum acc[R * T];
    add_products<D, kHot, R, T>(weight + r0 * x.cols * river::size_of(D), x, t0, 0, x.cols, ahead, acc);
    put_sums<R, T>(acc, t0, r0, out);
  });
}

// The same of a hot strip, with so many columns at once that L1 holds those of the rows while all output rows go by
template <DType D, int T>
inline void dense_vectors_by_parts(const char* weight, int count, const Operand& x, int t0, Walk& ahead,
                                   StripOut& out) {
  f32x16 sums[river::kTileRows * T];  // of the columns before `begin`
  for (int begin = 0, end; begin < x.cols; begin = end) {
    end = x.cols - begin <= kPart<D> ? x.cols : begin + kPart<D>;
    for_rows<rows_at_once(T)>(count, [&]<int R>(int r0) {
      Sum acc[R * T];
      if (begin > 0) RIVER_UNROLL for (int i = 0; i < R * T; i++) acc[i] = Sum{sums[r0 * T + i]};
      add_products<D, true, R, T>(weight + r0 * x.cols * river::size_of(D), x, t0, begin, end, ahead, acc);
      if (end == x.cols) return put_sums<R, T>(acc, t0, r0, out);
      RIVER_UNROLL for (int i = 0; i < R * T; i++) sums[r0 * T + i] = acc[i].all();
    });
  }
}

// Steps of a whole block, as many rows at a time as can be
template <DType D>
int64_t dense_steps(int count, int cols) {
  constexpr int R = rows_at_once(kDenseVectors);
  return int64_t(river::kMaxRows / kDenseVectors) * (count / R + count % R) * (cols / Columns<D>::kCount + 1);
}

void dense_strip(DType dtype, const void* weight, int count, const Operand& x, int first, const Ahead& ahead,
                 StripOut& out) {
  const Operand block = block_of(dtype, x, first);
  const bool hot = x.rows > river::kMaxRows;  // else it comes from memory, best in one go
  with_dtype(dtype, [&]<DType D>() {
    Walk walk(ahead, dense_steps<D>(count, x.cols));
    for_vectors<kDenseVectors>(block.rows, [&]<int T>(int t0) {
      const auto* rows = static_cast<const char*>(weight);
      if (!hot) dense_vectors<D, false, T>(rows, count, block, t0, walk, out);
      else if (x.cols <= kPart<D>) dense_vectors<D, true, T>(rows, count, block, t0, walk, out);
      else dense_vectors_by_parts<D, T>(rows, count, block, t0, walk, out);
    });
  });
}

// ---- W4 ---------------------------------------------------------------------------------------

// What the output rows of a tile have beside their nibbles
struct TileMetadata {
  f32x16 scale, zero;

  explicit TileMetadata(u32x16 pairs) : scale(f16_to_float(narrow(pairs))), zero(f16_to_float(narrow(pairs >> 16))) {}
};

// What a tile of a strip from memory asks for before it is computed
inline void ask_beyond(const uint8_t* tile) {
  for (int line = 0; line < river::kTileBytes; line += 64) {
    __builtin_prefetch(tile + kAheadL2 + line, 0, 2);
    __builtin_prefetch(tile + kAheadL1 + line);
  }
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
