// The model dtypes in kernels: conversions, pairs for the tensor cores, and the step from a DType to a type.
#pragma once

#include <type_traits>

#include "../../river.h"
#include "arch.cuh"

namespace river::device {

using bf16 = __nv_bfloat16;
using fp16 = __half;

RIVER_DEVICE float to_float(float x) { return x; }
RIVER_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
RIVER_DEVICE float to_float(fp16 x) { return __half2float(x); }

template <class T>
RIVER_DEVICE T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
  else return __float2half_rn(x);
}

// Orders numbers by magnitude; infinity and NaN are 0x7f800000 and above.
RIVER_DEVICE uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Two 16-bit values as a register of the tensor cores, `low` at the lower address
template <class T>
RIVER_DEVICE uint32_t pair(T low, T high) {
  if constexpr (std::is_same_v<T, bf16>) return __bfloat16_as_ushort(low) | uint32_t(__bfloat16_as_ushort(high)) << 16;
  else return __half_as_ushort(low) | uint32_t(__half_as_ushort(high)) << 16;
}

template <class T>
RIVER_DEVICE float2 to_float2(uint32_t pair) {
  const auto low = uint16_t(pair), high = uint16_t(pair >> 16);
  if constexpr (std::is_same_v<T, bf16>)
    return {__bfloat162float(__ushort_as_bfloat16(low)), __bfloat162float(__ushort_as_bfloat16(high))};
  else return {__half2float(__ushort_as_half(low)), __half2float(__ushort_as_half(high))};
}

// 16 values to memory aligned to 16 bytes
template <class T>
RIVER_DEVICE void store16(T* p, const float (&in)[16]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 16; i += 4)
      *reinterpret_cast<float4*>(p + i) = make_float4(in[i], in[i + 1], in[i + 2], in[i + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < 16; i += 8) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; j++) words[j] = pair<T>(from_float<T>(in[i + 2 * j]), from_float<T>(in[i + 2 * j + 1]));
      *reinterpret_cast<uint4*>(p + i) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// 8 values from 16 bytes
template <class T>
RIVER_DEVICE void unpack(const uint4& v, float (&out)[8]) {
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; i++) {
    const float2 two = to_float2<T>(word[i]);
    out[2 * i] = two.x, out[2 * i + 1] = two.y;
  }
}

// 16 bytes from 8 values, each rounded once
template <class T>
RIVER_DEVICE uint4 repack(const float (&v)[8]) {
  uint32_t word[4];
  for (int i = 0; i < 4; i++) word[i] = pair<T>(from_float<T>(v[2 * i]), from_float<T>(v[2 * i + 1]));
  return {word[0], word[1], word[2], word[3]};
}

// A nibble under a magic exponent is the exact value kNibbleOffset + nibble.
template <class T>
constexpr uint32_t kNibbleMagic = std::is_same_v<T, bf16> ? 0x43004300u : 0x64006400u;
template <class T>
constexpr float kNibbleOffset = std::is_same_v<T, bf16> ? 128.f : 1024.f;

// Pair i of a W4 word: i = 0, 1, 2, 3 are the registers a0, a2, a1, a3 of an mma (layout: river_ext/quant/w4.py).
template <class T>
RIVER_DEVICE uint32_t nibble_pair(uint32_t word, int i) {
  return ((word >> (4 * i)) & 0x000f000fu) | kNibbleMagic<T>;
}

// Calls f<T>() with the type of a DType. float is for kernels where it costs nothing.
template <class F>
void with_dtype(DType dtype, F f) {
  if (dtype == DType::kBFloat16) f.template operator()<bf16>();
  else if (dtype == DType::kFloat16) f.template operator()<fp16>();
  else f.template operator()<float>();
}

// The same for kernels that need 16-bit types; float32 was refused by the op.
template <class F>
void with_16bit_dtype(DType dtype, F f) {
  if (dtype == DType::kBFloat16) f.template operator()<bf16>();
  else f.template operator()<fp16>();
}

}  // namespace river::device
