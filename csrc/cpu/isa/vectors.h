// What turns one vector into another: RMSNorm, SwiGLU, conversions between the model dtype and fp32.
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

void swiglu(const float* gate, const float* up, float* out) {
  const f32x16 g = load<f32x16>(gate), e = vexp(f32x16(u32x16(g) | 0x80000000u));  // of -|g|: no overflow
  store(out, g * (g >= 0.f ? splat(1) : e) / (1.f + e) * load<f32x16>(up));
}

void to_float(DType dtype, const void* x, float* y, int64_t n) {
  for_lanes(dtype, x, n, [&](int64_t i, f32x16 v) { store_lanes(DType::kFloat32, y, i, n, v); });
}

void from_float(DType dtype, const float* x, void* y, int64_t n) {
  for_lanes(DType::kFloat32, x, n, [&](int64_t i, f32x16 v) { store_lanes(dtype, y, i, n, v); });
}

}  // namespace
