// bf16 and fp16 with CUDA's names, as far as the kernels use them: storage and correctly rounded conversions.
#pragma once

#include <bit>
#include <cstdint>

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};  // CUDA's canonical NaN
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  // 2^112 moves the exponent bias from 15 to 127 and makes subnormals right
  uint32_t bits = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  if ((x.bits & 0x7c00) == 0x7c00) bits = magnitude | 0x7f800000u;
  return std::bit_cast<float>(bits | sign);
}

inline __half __float2half_rn(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t out = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;  // rebias, nearest even
  if (magnitude < 0x38800000u)  // subnormal: an addition aligns and rounds
    out = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  if (magnitude >= 0x477ff000u) out = 0x7c00;
  if (magnitude > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>(out | sign)};
}

inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t x) { return {x}; }
inline __half __ushort_as_half(uint16_t x) { return {x}; }
