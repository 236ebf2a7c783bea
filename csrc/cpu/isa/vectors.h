// What turns one vector into another: RMSNorm, SwiGLU, what ends a linear, conversions between model dtype and fp32.
#pragma once

#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace {

using river::DType;

void rms_norm(DType dtype, const void* x, const void* weight, float eps, int n, void* y) {
  Sum squares;
  for_lanes(dtype, x, n, [&](int64_t, f32x16 v) { squares.add(v, v); });
  const float inverse = 1.f / sqrtf(reduce(squares.all()) / float(n) + eps);
  for_lanes(dtype, x, n, [&](int64_t i, f32x16 v) {
    const f32x16 w = i + 16 <= n ? load_as_float(dtype, weight, i) : load_tail(dtype, weight, i, n);
    store_lanes(dtype, y, i, n, v * inverse * w);
  });
}

void swiglu(DType dtype, const float* gate, const float* up, void* out, int n) {
  const f32x16 g = load<f32x16>(gate), e = vexp(f32x16(u32x16(g) | 0x80000000u));  // of -|g|: no overflow
  store_lanes(dtype, out, 0, n, g * (g >= 0.f ? splat(1) : e) / (1.f + e) * load<f32x16>(up));
}

void add_sums(DType dtype, const float* sums, const float* bias, float multiplier, const void* addend, void* out,
              int n) {
  const auto lanes = [n](DType type, const void* p) {
    return n < 16 ? load_tail(type, p, 0, n) : load_as_float(type, p, 0);
  };
  f32x16 y = load<f32x16>(sums);
  if (bias) y += lanes(DType::kFloat32, bias);
  y *= splat(multiplier);
  if (addend) y += lanes(dtype, addend);
  store_lanes(dtype, out, 0, n, y);
}

void to_float(DType dtype, const void* x, float* y, int64_t n) {
  for_lanes(dtype, x, n, [&](int64_t i, f32x16 v) { store_lanes(DType::kFloat32, y, i, n, v); });
}

void from_float(DType dtype, const float* x, void* y, int64_t n) {
  for_lanes(DType::kFloat32, x, n, [&](int64_t i, f32x16 v) { store_lanes(dtype, y, i, n, v); });
}

}  // namespace
