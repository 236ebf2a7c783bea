// What turns one vector into another: RMSNorm, SwiGLU, what ends a linear, conversions between model dtype and fp32.
#pragma once

#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace {

using river::DType;
using river::cpu::RowSums;

void rms_norm(DType dtype, const void* x, const void* weight, float eps, int n, void* y) {
  Sum squares;
  for_lanes(dtype, x, n, [&](int64_t, f32x16 v) { squares.add(v, v); });
  const float inverse = 1.f / sqrtf(reduce(squares.all()) / float(n) + eps);
  for_lanes(dtype, x, n, [&](int64_t i, f32x16 v) {
    const f32x16 w = i + 16 <= n ? load_as_float(dtype, weight, i) : load_tail(dtype, weight, i, n);
    store_lanes(dtype, y, i, n, v * inverse * w);
  });
}

inline f32x16 silu(f32x16 x) {
  const f32x16 e = vexp(f32x16(u32x16(x) | 0x80000000u));  // of -|x|: no overflow
  return x * (x >= 0.f ? splat(1) : e) / (1.f + e);
}

void swiglu(DType dtype, const RowSums& gate, const RowSums& up, int n, void* out) {
  for (int i = 0; i < n; i += 16)
    store_lanes(dtype, out, i, n, silu(load<f32x16>(gate.of_strip(i / 16))) * load<f32x16>(up.of_strip(i / 16)));
}

void swiglu_pairs(DType dtype, const RowSums& pairs, int n, void* out) {
  for (int i = 0; i < n; i += 16) {
    const f32x16 first = load<f32x16>(pairs.of_strip(i / 8)),
                 second = i + 8 < n ? load<f32x16>(pairs.of_strip(i / 8 + 1)) : first;
    const f32x16 gate =
        __builtin_shuffle(first, second, u32x16{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23});
    const f32x16 up =
        __builtin_shuffle(first, second, u32x16{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
    store_lanes(dtype, out, i, n, silu(gate) * up);
  }
}

void add_sums(DType dtype, const RowSums& sums, int n, const float* bias, float multiplier, const void* addend,
              void* out) {
  for (int i = 0; i < n; i += 16) {
    const auto lanes = [&](DType type, const void* p) {
      return i + 16 <= n ? load_as_float(type, p, i) : load_tail(type, p, i, n);
    };
    f32x16 y = load<f32x16>(sums.of_strip(i / 16));
    if (bias) y += lanes(DType::kFloat32, bias);
    y *= splat(multiplier);
    if (addend) y += lanes(dtype, addend);
    store_lanes(dtype, out, i, n, y);
  }
}

void rotate(const float* cos, const float* sin, int half, float* head) {
  constexpr DType f = DType::kFloat32;
  for (int i = 0; i < half; i += 16) {
    const auto lanes = [&](const float* p) {
      return i + 16 <= half ? load_as_float(f, p, i) : load_tail(f, p, i, half);
    };
    const f32x16 c = lanes(cos), s = lanes(sin), lo = lanes(head), hi = lanes(head + half);
    store_lanes(f, head, i, half, lo * c - hi * s);
    store_lanes(f, head + half, i, half, hi * c + lo * s);
  }
}

void to_float(DType dtype, const void* x, float* y, int64_t n) {
  for_lanes(dtype, x, n, [&](int64_t i, f32x16 v) { store_lanes(DType::kFloat32, y, i, n, v); });
}

void from_float(DType dtype, const float* x, void* y, int64_t n) {
  for_lanes(DType::kFloat32, x, n, [&](int64_t i, f32x16 v) { store_lanes(dtype, y, i, n, v); });
}

}  // namespace
