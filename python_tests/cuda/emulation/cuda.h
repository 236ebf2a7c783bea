// What CUDA C++ has and C++ lacks, for kernels compiled by a C++ compiler: qualifiers, built-in variables, vector
// types, intrinsics, atomics, barriers and shuffles. Each does what the programming guide says, or fails loudly.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "float16.h"
#include "runtime.h"

#define __global__ static
#define __device__
#define __host__
#define __launch_bounds__(...)

#define threadIdx (::river::emulation::current->index)
#define blockIdx (::river::emulation::current->block->index)
#define gridDim (::river::emulation::current->block->grid->launch.grid)

struct CUstream_st;
using cudaStream_t = CUstream_st*;

// ---- vector types -----------------------------------------------------------------------------

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- arithmetic ---------------------------------------------------------------------------------

using std::max;
using std::min;

inline float __fadd_rn(float a, float b) { return a + b; }  // the emulation is compiled without contraction
inline float __fmul_rn(float a, float b) { return a * b; }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }

// ---- atomics: one thread runs at a time -----------------------------------------------------------

template <class T>
T river_exchange(T* p, T v) {
  const T old = *p;
  *p = v;
  return old;
}
template <class T, class U>
T atomicMax(T* p, U v) {
  return river_exchange(p, std::max(*p, static_cast<T>(v)));
}
template <class T, class U>
T atomicExch(T* p, U v) {
  return river_exchange(p, static_cast<T>(v));
}
inline unsigned atomicInc(unsigned* p, unsigned limit) { return river_exchange(p, *p >= limit ? 0 : *p + 1); }

// ---- barriers and warps: the line of the call is part of what must agree -----------------------------

inline void __syncthreads(int line = __builtin_LINE()) {
  river::emulation::sync_block(0, 0, "__syncthreads", line, false);
}
inline int __syncthreads_or(int value, int line = __builtin_LINE()) {
  return river::emulation::sync_block(0, 0, "__syncthreads_or", line, value != 0);
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, int line = __builtin_LINE()) {
  river::emulation::leave(river::emulation::join(mask, "__syncwarp", line, nullptr, 0, nullptr));
}

template <class T>
T river_shuffle(const char* name, int line, uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  auto& c = river::emulation::join(mask, name, line, &value, sizeof(T), nullptr);
  if (!(c.mask >> source & 1)) river::emulation::fail(std::string(name) + " reads a lane outside of the mask");
  memcpy(&value, c.slots[source], sizeof(T));
  river::emulation::leave(c);
  return value;
}

inline uint32_t __ballot_sync(uint32_t mask, bool value, int line = __builtin_LINE()) {
  auto& c = river::emulation::join(mask, "__ballot_sync", line, &value, sizeof(value), nullptr);
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; lane++)
    if (c.mask >> lane & 1 && c.slots[lane][0]) votes |= 1u << lane;
  river::emulation::leave(c);
  return votes;
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int lane, int line = __builtin_LINE()) {
  return river_shuffle("__shfl_sync", line, mask, value, lane % 32);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int line = __builtin_LINE()) {
  return river_shuffle("__shfl_xor_sync", line, mask, value, river::emulation::current->lane ^ lanes);
}
