// Activations as the linears want them: blocks of eight rows, of each a line of columns beside those of the others; and
// the walk over the bytes that a strip asks for ahead of their use.
#pragma once

#include <utility>  // integer_sequence, a type

#include "kernels.h"
#include "simd.h"

namespace {

using river::DType;
using river::cpu::Ahead;
using river::cpu::Line;
using river::cpu::Operand;

// From the bytes of a cold strip in use to those asked for: what memory sends while it answers, and a small part of L1.
// Each line is asked for once: twice the requests, by L2 and then by L1, kept a core busy for a tenth of the time.
constexpr int kBytesAhead = 8 << 10;

inline void ask_memory(const char* line) {
  if (river::cpu::kL1Asks) __builtin_prefetch(line);
  else __builtin_prefetch(line, 0, 2);
}

constexpr int kGroup = river::kTileCols;  // columns of a tile, one (scale, zero) pair per output row

#if defined(__AVX512BF16__)
constexpr bool kBf16Dot = true;
inline f32x16 dot_bf16(f32x16 acc, __m512i a, __m512i b) {
  return f32x16(_mm512_dpbf16_ps(__m512(acc), __m512bh(a), __m512bh(b)));
}
#else
constexpr bool kBf16Dot = false;
#endif

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

// Packed operands in bf16 come by two such words: columns 0, 1, 4, 5, then 2, 3, 6, 7 of every eight.
inline void regroup_pairs(u32x16 (&v)[2]) {
  for (u32x16& pairs : v) {
#if defined(RIVER_SHUFFLE)
    pairs = RIVER_SHUFFLE(pairs, pairs, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
#else
    const u32x16 columns = pairs;
    for (int i = 1; i < 16; i += 4) pairs[i] = columns[i + 1], pairs[i + 1] = columns[i];
#endif
  }
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
      if (packed) regroup_pairs(pairs);
      put(pairs);
    } else {
      if (packed) regroup_float(v);
      put(v);
    }
  }
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

}  // namespace
