// Sixteen fp32 lanes as one GCC/Clang vector; the compiler maps it to the instruction set of the build.
// Included only by kernels.cpp. Everything lies in an anonymous namespace: the same names exist once per set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../../river.h"

namespace {

using f32x16 = float __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));

template <class V>
inline V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
inline void store(void* p, V v) {
  memcpy(p, &v, sizeof(V));
}

// For loops over arrays of vectors, which should stay in registers: GCC unrolls some loops too late for that.
#define RIVER_UNROLL _Pragma("GCC unroll 32")

inline f32x16 splat(float x) { return x - f32x16{}; }

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)  // GCC 12
#define RIVER_SHUFFLE __builtin_shufflevector
#endif

// The sum of the lanes by a fixed tree: halves, quarters, eighths
#if defined(RIVER_SHUFFLE)
inline float reduce(f32x16 v) {
  const auto eight = RIVER_SHUFFLE(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + RIVER_SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto four = RIVER_SHUFFLE(eight, eight, 0, 1, 2, 3) + RIVER_SHUFFLE(eight, eight, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
#else
inline float reduce(f32x16 v) {
  float lane[16];
  store(lane, v);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lane[i] += lane[i + width];
  return lane[0];
}
#endif

// Sixteen values in pieces that fit a register. Where registers are shorter than 64 bytes, GCC keeps a variable of 16
// lanes that a loop carries along, or that two branches set, in memory, and copies it eight bytes at a time.
#if defined(__AVX512F__)
constexpr int kPieceBytes = 64;
#elif defined(__AVX__)
constexpr int kPieceBytes = 32;
#else
constexpr int kPieceBytes = 16;
#endif
constexpr int kPieces = 64 / kPieceBytes;
using Piece = float __attribute__((vector_size(kPieceBytes)));
using WordPiece = uint32_t __attribute__((vector_size(kPieceBytes)));

struct Values {
  Piece piece[kPieces] = {};

  Values() = default;
  Values(f32x16 v) { memcpy(piece, &v, sizeof(piece)); }
  f32x16 all() const { return load<f32x16>(piece); }
};

struct Sum : Values {
  void add(const Values& a, const Values& b) {
    RIVER_UNROLL for (int i = 0; i < kPieces; i++) piece[i] += a.piece[i] * b.piece[i];
  }
  void add(const Values& a, float factor) {
    RIVER_UNROLL for (int i = 0; i < kPieces; i++) piece[i] += a.piece[i] * factor;
  }
};

// Sums at a time: they stay in registers, of which there are 32 with AVX-512, else 16 that hold half a sum each.
constexpr int kSums = kPieces == 1 ? 16 : 8;

// The lanes of each sum added up, bit-equal to reduce: each step adds the halves of every vector and packs two results
// into one, so that all of them take a third of the instructions. Inline by force: sums that a function gets would lie
// in memory in the loop that makes them.
#if defined(__AVX512F__) && defined(RIVER_SHUFFLE)
template <int kFirst, int N>
[[gnu::always_inline]] inline void reduce_from(const Sum (&sums)[N], float (&out)[N]) {  // 16 of them, or those left
  constexpr int kCount = N - kFirst < 16 ? N - kFirst : 16;
  f32x16 eight[8] = {}, four[4], two[2];
  RIVER_UNROLL for (int i = 0; i < kCount; i += 2) {  // lanes 0-7 of a and b + lanes 8-15 of a and b
    const f32x16 a = sums[kFirst + i].all(), b = i + 1 < kCount ? sums[kFirst + i + 1].all() : f32x16{};
    eight[i / 2] = RIVER_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                   RIVER_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  RIVER_UNROLL for (int i = 0; i < 4; i++) {
    const f32x16 a = eight[2 * i], b = eight[2 * i + 1];
    four[i] = RIVER_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
              RIVER_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
  RIVER_UNROLL for (int i = 0; i < 2; i++) {  // from here on within four lanes: the sums come out in another order
    const f32x16 a = four[2 * i], b = four[2 * i + 1];
    two[i] = RIVER_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
             RIVER_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  const f32x16 a = two[0], b = two[1];
  const f32x16 one = RIVER_SHUFFLE(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
                     RIVER_SHUFFLE(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
  const f32x16 in_order = RIVER_SHUFFLE(one, one, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  memcpy(out + kFirst, &in_order, kCount * sizeof(float));
}

template <int N>
[[gnu::always_inline]] inline void reduce_each(const Sum (&sums)[N], float (&out)[N]) {
  static_assert(N <= 32);
  reduce_from<0>(sums, out);
  if constexpr (N > 16) reduce_from<16>(sums, out);
}
#else
template <int N>
[[gnu::always_inline]] inline void reduce_each(const Sum (&sums)[N], float (&out)[N]) {
  for (int i = 0; i < N; i++) out[i] = reduce(sums[i].all());
}
#endif

#if defined(__AVX512F__)  // one instruction each, where GCC makes several; maskz: GCC 12 warns without
inline u16x16 narrow(u32x16 v) { return u16x16(_mm512_maskz_cvtepi32_epi16(0xffff, __m512i(v))); }
inline u32x16 widen(u16x16 v) { return u32x16(_mm512_maskz_cvtepu16_epi32(0xffff, __m256i(v))); }
#else
inline u16x16 narrow(u32x16 v) { return __builtin_convertvector(v, u16x16); }
inline u32x16 widen(u16x16 v) { return __builtin_convertvector(v, u32x16); }
#endif

inline f32x16 bf16_to_float(u16x16 v) { return f32x16(widen(v) << 16); }

inline u16x16 float_to_bf16(f32x16 v) {  // nearest even; NaN stays NaN
  u32x16 bits = u32x16(v);
  u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return narrow(v == v ? rounded : ((bits >> 16) | 0x40u));
}

#if defined(__F16C__)
inline f32x16 f16_to_float(u16x16 v) {
#if defined(__AVX512F__)
  return f32x16(_mm512_maskz_cvtph_ps(0xffff, __m256i(v)));
#else
  __m128i half[2];
  memcpy(half, &v, 32);
  __m256 wide[2] = {_mm256_cvtph_ps(half[0]), _mm256_cvtph_ps(half[1])};
  return load<f32x16>(wide);
#endif
}

inline u16x16 float_to_f16(f32x16 v) {
  __m256 wide[2];
  memcpy(wide, &v, 64);
  __m128i half[2] = {_mm256_cvtps_ph(wide[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                     _mm256_cvtps_ph(wide[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  return load<u16x16>(half);
}
#else
inline f32x16 f16_to_float(u16x16 v) {
  u32x16 half = widen(v), magnitude = (half & 0x7fffu) << 13;
  // 2^112 moves the exponent bias from 15 to 127 and makes subnormals right
  f32x16 scaled = f32x16(magnitude) * 0x1p112f;
  u32x16 special = magnitude | 0x7f800000u;
  u32x16 bits = (half & 0x7c00u) == 0x7c00u ? special : u32x16(scaled);
  return f32x16(bits | ((half & 0x8000u) << 16));
}

inline u16x16 float_to_f16(f32x16 v) {
  u32x16 bits = u32x16(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // normal: rebias and round to nearest even; subnormal: let an addition align and round
  u32x16 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  u32x16 subnormal = u32x16(f32x16(magnitude) + 0.5f) - 0x3f000000u;
  u32x16 out = magnitude < 0x38800000u ? subnormal : normal;
  out = magnitude >= 0x477ff000u ? (u32x16{} + 0x7c00u) : out;  // rounds to infinity
  out = magnitude > 0x7f800000u ? (u32x16{} + 0x7e00u) : out;   // NaN
  return narrow(out | sign);
}
#endif

// Calls f<D>() for the dtype D.
template <class F>
inline void with_dtype(river::DType dtype, F f) {
  switch (dtype) {
    case river::DType::kFloat32: return f.template operator()<river::DType::kFloat32>();
    case river::DType::kBFloat16: return f.template operator()<river::DType::kBFloat16>();
    case river::DType::kFloat16: return f.template operator()<river::DType::kFloat16>();
  }
}

// 16 elements of the model dtype from index i
inline f32x16 load_as_float(river::DType dtype, const void* p, int64_t i) {
  switch (dtype) {
    case river::DType::kBFloat16: return bf16_to_float(load<u16x16>(static_cast<const uint16_t*>(p) + i));
    case river::DType::kFloat16: return f16_to_float(load<u16x16>(static_cast<const uint16_t*>(p) + i));
    default: return load<f32x16>(static_cast<const float*>(p) + i);
  }
}

inline void store_as(river::DType dtype, void* p, int64_t i, f32x16 v) {
  switch (dtype) {
    case river::DType::kBFloat16: return store(static_cast<uint16_t*>(p) + i, float_to_bf16(v));
    case river::DType::kFloat16: return store(static_cast<uint16_t*>(p) + i, float_to_f16(v));
    default: return store(static_cast<float*>(p) + i, v);
  }
}

// The last n - i < 16 elements, zero-filled
inline f32x16 load_tail(river::DType dtype, const void* p, int64_t i, int64_t n) {
  char buffer[64] = {};
  const int64_t size = river::size_of(dtype);
  memcpy(buffer, static_cast<const char*>(p) + i * size, (n - i) * size);
  return load_as_float(dtype, buffer, 0);
}

inline void store_tail(river::DType dtype, void* p, int64_t i, int64_t n, f32x16 v) {
  char buffer[64];
  const int64_t size = river::size_of(dtype);
  store_as(dtype, buffer, 0, v);
  memcpy(static_cast<char*>(p) + i * size, buffer, (n - i) * size);
}

// Calls f(i, lanes) for each 16 elements of x, the last ones zero-filled
template <class F>
inline void for_lanes(river::DType dtype, const void* x, int64_t n, F f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) f(i, load_as_float(dtype, x, i));
  if (i < n) f(i, load_tail(dtype, x, i, n));
}

inline void store_lanes(river::DType dtype, void* y, int64_t i, int64_t n, f32x16 v) {
  if (i + 16 <= n) store_as(dtype, y, i, v);
  else store_tail(dtype, y, i, n, v);
}

// e^x within 2 ulp; 0 below -87.3, clamped above 88
inline Piece exp_piece(Piece x) {
  const Piece clamped_above = x < 88.f ? x : Piece{} + 88.f;
  const Piece clamped = clamped_above > -87.3f ? clamped_above : Piece{} - 87.3f;
  const float round = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const Piece shifted = clamped * 1.44269504f + round;
  const Piece n = shifted - round;
  const Piece r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  Piece p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const WordPiece exponent = (WordPiece(shifted) - WordPiece(Piece{} + round)) << 23;
  const Piece result = x < -87.3f ? Piece{} : Piece(WordPiece(p) + exponent);
  return x == x ? result : x;
}

inline f32x16 vexp(f32x16 x) {
  Values v = x;
  RIVER_UNROLL for (int i = 0; i < kPieces; i++) v.piece[i] = exp_piece(v.piece[i]);
  return v.all();
}

}  // namespace
