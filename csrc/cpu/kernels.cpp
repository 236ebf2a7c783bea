// One instruction set's table of primitives. Compiled once per set with -DRIVER_ISA=<name> and its -m flags.
// No STL here: an inline library function compiled for one set must not be linked into another's path.
#include "kernels.h"

#include <math.h>

#include "linear.h"
#include "simd.h"

namespace {

void rms_norm(DType dtype, const void* x, const void* weight, float eps, int n, void* y) {
  Sum squares;
  for_lanes(dtype, x, n, [&](int64_t, f32x16 v) { squares.add(v, v); });
  const float inverse = 1.f / sqrtf(reduce(squares.value()) / (float)n + eps);
  for_lanes(dtype, x, n, [&](int64_t i, f32x16 v) {
    const f32x16 w = i + 16 <= n ? load_as_float(dtype, weight, i) : load_tail(dtype, weight, i, n);
    store_lanes(dtype, y, i, n, v * inverse * w);
  });
}

void swiglu(const float* gate, const float* up, float* out) {
  const f32x16 g = load<f32x16>(gate), e = vexp((f32x16)((u32x16)g | 0x80000000u));  // of -|g|: no overflow
  store(out, g * (g >= 0.f ? splat(1) : e) / (1.f + e) * load<f32x16>(up));
}

// Head vectors live in fp32 buffers of whole lanes, zero past head_dim.
void load_head(DType dtype, const void* x, int64_t offset, int head_dim, float* out) {
  for_lanes(dtype, (const char*)x + offset * river::size_of(dtype), head_dim,
            [&](int64_t i, f32x16 v) { store(out + i, v); });
}

// k, v: one KV head of one slot, [max_len, head_dim]. query: [group, padded head_dim], already scaled.
// Two passes over the split: scores of all positions, then the weighted values.
void attend(DType dtype, const float* query, int group, int head_dim, const void* k, const void* v,
            const int32_t* positions, int count, river::cpu::AttentionState* out, int64_t stride) {
  static_assert(river::cpu::kSplit % 16 == 0);
  const int padded = (int)river::round_up(head_dim, 16);
  alignas(64) float head[river::kMaxHeadDim], weight[river::kMaxGroup][river::cpu::kSplit];
  for (int p = 0; p < count; p++) {
    load_head(dtype, k, (int64_t)positions[p] * head_dim, head_dim, head);
    for (int g = 0; g < group; g++) {
      Sum sum;
      for (int i = 0; i < padded; i += 16) sum.add(load<f32x16>(head + i), load<f32x16>(query + g * padded + i));
      weight[g][p] = reduce(sum.value());
    }
  }
  for (int g = 0; g < group; g++) {
    float max = weight[g][0];
    for (int p = 1; p < count; p++) max = weight[g][p] > max ? weight[g][p] : max;
    for (int p = count; p % 16 != 0; p++) weight[g][p] = -__builtin_inff();
    if (max == -__builtin_inff()) max = 0;  // all weights are then 0, and merge skips the split
    f32x16 sum{};
    for (int p = 0; p < count; p += 16) {
      const f32x16 e = vexp(load<f32x16>(weight[g] + p) - max);
      store(weight[g] + p, e);
      sum += e;
    }
    out[g * stride].max = max;
    out[g * stride].sum = reduce(sum);
    memset(out[g * stride].value, 0, padded * sizeof(float));
  }
  for (int p = 0; p < count; p++) {
    load_head(dtype, v, (int64_t)positions[p] * head_dim, head_dim, head);
    for (int g = 0; g < group; g++) {
      float* value = out[g * stride].value;
      for (int i = 0; i < padded; i += 16)
        store(value + i, load<f32x16>(value + i) + load<f32x16>(head + i) * weight[g][p]);
    }
  }
}

void merge(const river::cpu::AttentionState* splits, int count, int head_dim, float* out) {
  const int padded = (int)river::round_up(head_dim, 16);
  float max = -__builtin_inff(), sum = 0;
  for (int s = 0; s < count; s++)
    if (splits[s].sum > 0 && splits[s].max > max) max = splits[s].max;
  memset(out, 0, padded * sizeof(float));
  for (int s = 0; s < count; s++) {
    const auto& split = splits[s];
    if (split.sum == 0) continue;  // saw nothing; NaN scores give a NaN sum and go on
    const float factor = vexp(splat(split.max - max))[0];
    sum += split.sum * factor;
    for (int i = 0; i < padded; i += 16)
      store(out + i, load<f32x16>(out + i) + load<f32x16>(split.value + i) * factor);
  }
  if (sum == 0) return;
  for (int i = 0; i < padded; i += 16) store(out + i, load<f32x16>(out + i) / sum);
}

// Exponents of two halves of a factor: applied one after the other they stay in range for any input.
struct Scaling {
  bool usable;  // false: a zero or non-finite vector
  float first = 1, second = 1;
};

// 1 where squares are safe, else the power of two that brings the largest magnitude to [1, 2).
Scaling safe_scaling(DType dtype, const void* x, int n) {
  f32x16 largest{}, check{};
  for_lanes(dtype, x, n, [&](int64_t, f32x16 v) {
    const f32x16 magnitude = (f32x16)((u32x16)v & 0x7fffffffu);
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
// (dot, a, b) triple per strip and get the same bits.
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

void to_float(DType dtype, const void* x, float* y, int64_t n) {
  for_lanes(dtype, x, n, [&](int64_t i, f32x16 v) { store_lanes(DType::kFloat32, y, i, n, v); });
}

void from_float(DType dtype, const float* x, void* y, int64_t n) {
  for_lanes(DType::kFloat32, x, n, [&](int64_t i, f32x16 v) { store_lanes(dtype, y, i, n, v); });
}

}  // namespace

#define RIVER_JOIN_(a, b) a##b
#define RIVER_JOIN(a, b) RIVER_JOIN_(a, b)
#define RIVER_TEXT_(a) #a
#define RIVER_TEXT(a) RIVER_TEXT_(a)

namespace river::cpu {
extern const Kernels RIVER_JOIN(kernels_, RIVER_ISA);
const Kernels RIVER_JOIN(kernels_, RIVER_ISA) = {
    RIVER_TEXT(RIVER_ISA), rms_norm, prepare, dense_strip, w4_strip, swiglu,
    attend,                merge,    similarity, to_float, from_float,
};
}  // namespace river::cpu
