// State transition similarity: what every kernel that needs a cosine calls, so that all get the same bits. A warp takes
// a pair of vectors in strips of 16 values: within a strip a fixed tree; a lane adds its strips (lane, lane + 32, ...)
// in order; then a tree over the lanes.
#pragma once

#include "types.cuh"

namespace river::device {

constexpr int kStrip = 16;

struct Triple {  // sums over one strip, or over a vector
  float dot, a, b;
};

// 16 values that another kernel wrote, from L2
template <class T>
RIVER_DEVICE void load_strip(const T* p, float (&out)[kStrip]) {
  constexpr int kPer16Bytes = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < kStrip; i += kPer16Bytes) {
    const float4 v = load_shared_between_blocks(reinterpret_cast<const float4*>(p + i));
    if constexpr (sizeof(T) == 4) {
      out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
    } else {
      const float words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float2 two = to_float2<T>(__float_as_uint(words[j]));
        out[i + 2 * j] = two.x, out[i + 2 * j + 1] = two.y;
      }
    }
  }
}

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
template <int kWidth>
RIVER_DEVICE void fold(float (&lane)[kStrip]) {
#pragma unroll
  for (int i = 0; i < kWidth; i++) lane[i] = __fadd_rn(lane[i], lane[i + kWidth]);
  if constexpr (kWidth > 1) fold<kWidth / 2>(lane);
}

RIVER_DEVICE float strip_dot(const float (&u)[kStrip], const float (&v)[kStrip]) {
  float lane[kStrip];
#pragma unroll
  for (int i = 0; i < kStrip; i++) lane[i] = __fmul_rn(u[i], v[i]);
  fold<kStrip / 2>(lane);
  return lane[0];
}

// The sums over x and y [hidden_size], scaled; and the largest magnitudes before scaling. The same in all lanes.
template <class T>
RIVER_DEVICE Triple warp_triple(const T* x, const T* y, int hidden_size, Scaling sx, Scaling sy,
                                uint32_t& largest_x, uint32_t& largest_y) {
  Triple sum{};
  largest_x = largest_y = 0;
  for (int i = lane_id() * kStrip; i < hidden_size; i += kWarp * kStrip) {
    float u[kStrip], v[kStrip];
    load_strip(x + i, u);
    load_strip(y + i, v);
#pragma unroll
    for (int j = 0; j < kStrip; j++) {
      largest_x = max(largest_x, magnitude_bits(u[j]));
      largest_y = max(largest_y, magnitude_bits(v[j]));
      u[j] = u[j] * sx.first * sx.second;
      v[j] = v[j] * sy.first * sy.second;
    }
    sum.dot = __fadd_rn(sum.dot, strip_dot(u, v));
    sum.a = __fadd_rn(sum.a, strip_dot(u, u));
    sum.b = __fadd_rn(sum.b, strip_dot(v, v));
  }
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    sum.dot = __fadd_rn(sum.dot, shuffle_xor(sum.dot, lanes));
    sum.a = __fadd_rn(sum.a, shuffle_xor(sum.a, lanes));
    sum.b = __fadd_rn(sum.b, shuffle_xor(sum.b, lanes));
    largest_x = max(largest_x, shuffle_xor(largest_x, lanes));
    largest_y = max(largest_y, shuffle_xor(largest_y, lanes));
  }
  return sum;
}

// Cosine of x and y [hidden_size], a multiple of 16, by one warp; the same in all its lanes.
template <class T>
RIVER_DEVICE float warp_cosine(const T* x, const T* y, int hidden_size) {
  const Scaling none{true, 1.f, 1.f};
  uint32_t largest_x, largest_y;
  Triple sum = warp_triple(x, y, hidden_size, none, none, largest_x, largest_y);
  const Scaling sx = safe_scaling(largest_x), sy = safe_scaling(largest_y);
  if (!sx.usable || !sy.usable) return 0.f;
  if (sx.first != 1.f || sy.first != 1.f) sum = warp_triple(x, y, hidden_size, sx, sy, largest_x, largest_y);
  const float value = sum.dot / __fmul_rn(sqrtf(sum.a), sqrtf(sum.b));
  return fminf(1.f, fmaxf(-1.f, value));
}

}  // namespace river::device
