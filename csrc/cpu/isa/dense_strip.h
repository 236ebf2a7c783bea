// A strip of a dense linear: sixteen output rows for T = 1..8 activation vectors, out[t][r] = w[r] . x[t].
//
// Decoding reads every weight once, so the loops work on several output rows at once, with T accumulators each. Each
// (output row, t) has one accumulator that runs over K in order, whatever T is: a result never depends on its
// neighbours. With AVX512_BF16, bf16 products go through vdpbf16ps; all other cases run in fp32.
#pragma once

#include "lines.h"

namespace {

using river::cpu::StripOut;

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

}  // namespace
