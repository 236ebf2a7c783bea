// The cosine of two vectors, within the range of fp32 whatever their magnitudes are.
#pragma once

#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace {

using river::DType;

// Exponents of two halves of a factor: applied one after the other they stay in range for any input.
struct Scaling {
  bool usable;  // false: a zero or non-finite vector
  float first = 1, second = 1;
};

// 1 where squares are safe, else the power of two that brings the largest magnitude to [1, 2).
Scaling safe_scaling(DType dtype, const void* x, int n) {
  f32x16 largest{}, check{};
  for_lanes(dtype, x, n, [&](int64_t, f32x16 v) {
    const f32x16 magnitude = f32x16(u32x16(v) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
    check += v * 0.f;  // NaN once any entry is not finite
  });
  float max = 0;
  for (int i = 0; i < 16; i++) max = largest[i] > max ? largest[i] : max;
  if (max == 0 || reduce(check) != 0) return {false};
  if (max >= 0x1p-40f && max <= 0x1p40f) return {true};
  const int exponent = -ilogbf(max);
  return {true, ldexpf(1.f, exponent / 2), ldexpf(1.f, exponent - exponent / 2)};
}

// Sums of 16 products each, added in order, so that a kernel that produces 16 rows at a time can keep one
// (dot, a, b) triple per chunk and get the same bits.
float similarity(DType dtype, const void* x, const void* y, int n) {
  const Scaling sx = safe_scaling(dtype, x, n), sy = safe_scaling(dtype, y, n);
  if (!sx.usable || !sy.usable) return 0;
  float dot = 0, a = 0, b = 0;
  for (int i = 0; i < n; i += 16) {
    const f32x16 u = load_as_float(dtype, x, i) * sx.first * sx.second;
    const f32x16 v = load_as_float(dtype, y, i) * sy.first * sy.second;
    dot += reduce(u * v);
    a += reduce(u * u);
    b += reduce(v * v);
  }
  const float cosine = dot / (sqrtf(a) * sqrtf(b));
  return cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;
}

}  // namespace
