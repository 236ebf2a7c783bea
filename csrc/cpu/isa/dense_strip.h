// A strip of a dense linear: sixteen output rows for T = 1..8 activation vectors, out[t][r] = w[r] . x[t].
//
// Decoding reads every weight once, so the loops work on several output rows at once, with T accumulators each. Each
// (output row, t) has one accumulator that runs over K in order, whatever T is: a result never depends on its
// neighbours. With AVX512_BF16, bf16 products go through vdpbf16ps; all other cases run in fp32.
#pragma once

#include <algorithm>

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

// The walk over the output rows that a cold strip reads next, line by line as they lie in memory. One stream in the
// order of the addresses gets all that memory can give, since the processor's own prefetchers join in: asking for a
// line of each of several rows in turn got four fifths of it.
struct RowWalk {
  const char *at, *end;  // of the part of an output row that is asked for
  int64_t part_bytes, row_bytes;

  void step(int bytes) {
    ask_memory(at);
    at += bytes;
  }
  void next_row_if_done() {
    if (at < end) return;
    end += row_bytes;
    at = end - part_bytes;
  }
};

// Adds the products of columns `begin` to `end` - 1 of R output rows with T rows of a block: acc[r * T + t]. A hot
// strip is in L2 already, and asks for what lies at `ahead`; a cold one asks for the output rows from `next` on.
template <DType D, bool kHot, int R, int T>
[[gnu::always_inline]] inline void add_products(const char* weight, const char* next, const Operand& x, int t0,
                                                int begin, int end, Walk& ahead, Sum (&acc)[R * T]) {
  using Columns = ::Columns<D>;
  constexpr int64_t kSize = river::size_of(D);
  const int64_t row_bytes = x.cols * kSize, part_bytes = (end - begin) * kSize;
  const Line* line = x.lines + int64_t(begin / Columns::kCount) * x.rows + t0;
  Walk walk = ahead;  // in a register
  RowWalk rows{.at = next, .end = next + part_bytes, .part_bytes = part_bytes, .row_bytes = row_bytes};
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
  for (; k + Columns::kCount <= end; k += Columns::kCount) {
    if constexpr (kHot) walk.step();
    else {
      RIVER_UNROLL for (int r = 0; r < R; r++) rows.step(Columns::kCount * kSize);
      rows.next_row_if_done();
    }
    step([&](const char* row) { return Columns::load_weight(row, k); });
  }
  if (k < end) step([&](const char* row) { return Columns::load_last(row, k, end); });
  ahead = walk;
}

// Output rows of a strip, R at a time. Where threes leave four, these are two pairs: one alone would leave multipliers
// idle.
template <int R, class F>
inline void for_rows(int count, F f) {
  int r = 0;
  for (; count - r >= R && !(R == 3 && count - r == 4); r += R) f.template operator()<R>(r);
  if constexpr (R == 3)
    for (; count - r >= 2; r += 2) f.template operator()<2>(r);
  for (; r < count; r++) f.template operator()<1>(r);
}

template <int R, int T>
inline void put_sums(const Sum (&acc)[R * T], int t0, int r0, StripOut& out) {
  float sum[R * T];
  reduce_each(acc, sum);
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) out[t0 + t][r0 + r] = sum[r * T + t];
}

inline void put_row(const f32x16 (&sums)[river::kTileRows], float (&out)[river::kTileRows]) {
  Sum sum[river::kTileRows];
  RIVER_UNROLL for (int r = 0; r < river::kTileRows; r++) sum[r] = Sum{sums[r]};
  reduce_each(sum, out);
}

// Rows and output rows at a time: as many as there are registers for their sums.
constexpr int kDenseVectors = kPieces == 1 ? river::kMaxRows : kSums / 4;
constexpr int rows_at_once(int vectors) { return vectors <= 2 ? kSums / 2 : vectors <= 6 ? kSums / 4 : 3; }

// out[t0 + t][r] for T rows of a block, R output rows and `part` columns at a time. Parts are for what L1 should hold
// while all output rows go by: those columns of the rows of x. A hot strip's sums are added up when they are all there,
// 16 at a time; a cold one's at once, while memory answers.
template <DType D, bool kHot, int R, int T>
inline void dense_vectors(const char* weight, int count, const Operand& x, int t0, int part, Walk& ahead,
                          StripOut& out) {
  constexpr int64_t kSize = river::size_of(D);
  const int64_t row_bytes = x.cols * kSize;
  const int rows_ahead = std::max(R, int(river::ceil_div(kBytesAhead, std::min(part, x.cols) * kSize)));
  f32x16 sums[T][river::kTileRows];  // of the columns before `begin`
  if (kHot && count < river::kTileRows) memset(sums, 0, sizeof(sums));
  for (int begin = 0, end; begin < x.cols; begin = end) {
    end = x.cols - begin <= part ? x.cols : begin + part;
    const char* next_part = weight + (end < x.cols ? end * kSize : count * row_bytes);
    for_rows<R>(count, [&]<int r>(int r0) {
      Sum acc[r * T];
      if (begin > 0) RIVER_UNROLL for (int i = 0; i < r * T; i++) acc[i] = Sum{sums[i % T][r0 + i / T]};
      const int next = r0 + rows_ahead;
      add_products<D, kHot, r, T>(
          weight + r0 * row_bytes,
          next < count ? weight + next * row_bytes + begin * kSize : next_part + (next - count) * row_bytes, x, t0,
          begin, end, ahead, acc);
      if (!kHot && end == x.cols) return put_sums<r, T>(acc, t0, r0, out);
      RIVER_UNROLL for (int i = 0; i < r * T; i++) sums[i % T][r0 + i / T] = acc[i].all();
    });
  }
  if constexpr (kHot)
    for (int t = 0; t < T; t++) put_row(sums[t], out[t0 + t]);
}

// A strip from memory. As long as L1, of 48 KB on Zen 5 and 32 on Zen 4, holds all of the rows of x beside what comes,
// output rows go by almost one by one, in memory's order; else several share what L2 gives of x. Zen 4 loads a line a
// cycle, and has a product for each: there two share a load wherever L1 has the room.
template <DType D, int T>
inline void cold_vectors(const char* weight, int count, const Operand& x, int t0, Walk& ahead, StripOut& out) {
  constexpr int kAlone = kPieces == 1 ? 1 : 2;  // where x takes two loads for a product, two share them
  constexpr int kShared = T <= 6 ? kSums / 4 : kSums / 8;
  const bool zen5 = river::cpu::kL1Asks;
  const int64_t bytes = T * int64_t(sizeof(Line)) * (x.padded / Columns<D>::kCount);  // of x
  const auto share = [&]<int R>(int part) { dense_vectors<D, false, R, T>(weight, count, x, t0, part, ahead, out); };
  if (bytes > (zen5 ? 26 : 29) << 10) {  // in parts: of whole pages of an output row, where there is room for as many
    share.template operator()<kShared>(T <= 6 ? x.cols : (zen5 ? 64 : 32) * Columns<D>::kCount);
  } else if (T <= 4 || zen5 || bytes > 26 << 10) {
    share.template operator()<kAlone>(x.cols);
  } else {
    share.template operator()<2>(x.cols);
  }
}

// Steps of a whole block, as many rows at a time as can be
template <DType D>
int64_t dense_steps(int count, int cols) {
  const int64_t groups = river::ceil_div(count, rows_at_once(kDenseVectors));
  return river::kMaxRows / kDenseVectors * groups * (cols / Columns<D>::kCount + 1);
}

void dense_strip(DType dtype, const void* weight, int count, const Operand& x, int first, const Ahead& ahead,
                 StripOut& out) {
  const Operand block = block_of(dtype, x, first);
  const bool hot = x.rows > river::kMaxRows;  // else it comes from memory
  with_dtype(dtype, [&]<DType D>() {
    Walk walk(ahead, dense_steps<D>(count, x.cols));
    for_vectors<kDenseVectors>(block.rows, [&]<int T>(int t0) {
      constexpr int kPart = 48 * Columns<D>::kCount;
      const auto* rows = static_cast<const char*>(weight);
      if (hot) dense_vectors<D, true, rows_at_once(T), T>(rows, count, block, t0, kPart, walk, out);
      else cold_vectors<D, T>(rows, count, block, t0, walk, out);
    });
  });
}

}  // namespace
