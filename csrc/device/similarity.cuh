// State transition similarity: the pieces of every kernel that computes a cosine, so that all get the same bits. A
// vector's sums run over strips of 16 values: within a strip a fixed tree, then strip after strip in order.
#pragma once

#include "types.cuh"

namespace river::device {

constexpr int kStrip = 16;

struct Triple {  // sums over one strip, or over a vector
  float dot, a, b;
};

// A factor in two halves: applied one after the other they stay in range for any input.
struct Scaling {
  bool usable;  // false: a zero or non-finite vector
  float first, second;
};

RIVER_DEVICE uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// From the largest magnitude of a vector, as bits: 1 where squares are safe, else the power of two that brings the
// largest to [1, 2).
RIVER_DEVICE Scaling safe_scaling(uint32_t largest) {
  const float max = __uint_as_float(largest);
  if (largest == 0 || largest >= 0x7f800000u) return {false, 0.f, 0.f};
  if (max >= 0x1p-40f && max <= 0x1p40f) return {true, 1.f, 1.f};
  const int exponent = -ilogbf(max);
  return {true, ldexpf(1.f, exponent / 2), ldexpf(1.f, exponent - exponent / 2)};
}

// lane[i] + lane[i + 8], then 4, 2, 1 apart. Explicit roundings: a contracted product would change the bits.
RIVER_DEVICE float strip_dot(const float (&u)[kStrip], const float (&v)[kStrip]) {
  float lane[kStrip];
#pragma unroll
  for (int i = 0; i < kStrip; i++) lane[i] = __fmul_rn(u[i], v[i]);
#pragma unroll
  for (int width = kStrip / 2; width > 0; width /= 2)
#pragma unroll
    for (int i = 0; i < width; i++) lane[i] = __fadd_rn(lane[i], lane[i + width]);
  return lane[0];
}

RIVER_DEVICE Triple strip_triple(const float (&u)[kStrip], const float (&v)[kStrip]) {
  return {strip_dot(u, v), strip_dot(u, u), strip_dot(v, v)};
}

RIVER_DEVICE float cosine(Triple sum) {
  const float value = sum.dot / __fmul_rn(sqrtf(sum.a), sqrtf(sum.b));
  return fminf(1.f, fmaxf(-1.f, value));
}

}  // namespace river::device
