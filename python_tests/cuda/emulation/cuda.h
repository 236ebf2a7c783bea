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
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __constant__
#define __align__(n) alignas(n)

#define threadIdx (::river::emulation::current->index)
#define blockIdx (::river::emulation::current->block->index)
#define blockDim (::river::emulation::current->block->grid->launch.block)
#define gridDim (::river::emulation::current->block->grid->launch.grid)
constexpr int warpSize = 32;

struct CUstream_st;
using cudaStream_t = CUstream_st*;

// ---- vector types -----------------------------------------------------------------------------

#define RIVER_VECTOR(T, name)                                \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
RIVER_VECTOR(float, float)
RIVER_VECTOR(int, int)
RIVER_VECTOR(unsigned, uint)
RIVER_VECTOR(unsigned short, ushort)
#undef RIVER_VECTOR

// ---- arithmetic ---------------------------------------------------------------------------------

using std::max;
using std::min;

// glibc declares some of these names without defining them
#define __expf expf
#define __exp2f exp2f
#define __logf logf
#define __log2f log2f
#define __sinf sinf
#define __cosf cosf

inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }  // the emulation is compiled without contraction
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __ffs(unsigned x) { return x ? std::countr_zero(x) + 1 : 0; }
inline int __clz(unsigned x) { return std::countl_zero(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}

// ---- atomics: one thread runs at a time -----------------------------------------------------------

template <class T>
T river_exchange(T* p, T v) {
  const T old = *p;
  *p = v;
  return old;
}
template <class T, class U>
T atomicAdd(T* p, U v) {
  return river_exchange(p, static_cast<T>(*p + static_cast<T>(v)));
}
template <class T, class U>
T atomicMax(T* p, U v) {
  return river_exchange(p, std::max(*p, static_cast<T>(v)));
}
template <class T, class U>
T atomicMin(T* p, U v) {
  return river_exchange(p, std::min(*p, static_cast<T>(v)));
}
template <class T, class U>
T atomicOr(T* p, U v) {
  return river_exchange(p, static_cast<T>(*p | static_cast<T>(v)));
}
template <class T, class U>
T atomicExch(T* p, U v) {
  return river_exchange(p, static_cast<T>(v));
}
template <class T, class U, class V>
T atomicCAS(T* p, U expected, V v) {
  return river_exchange(p, *p == static_cast<T>(expected) ? static_cast<T>(v) : *p);
}
inline unsigned atomicInc(unsigned* p, unsigned limit) { return river_exchange(p, *p >= limit ? 0 : *p + 1); }

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { river::emulation::spin(); }
[[noreturn]] inline void __trap() { river::emulation::fail("__trap()"); }

// ---- barriers and warps: the line of the call is part of what must agree -----------------------------

inline void __syncthreads(int line = __builtin_LINE()) {
  river::emulation::sync_block(0, 0, "__syncthreads", line, false);
}
inline int __syncthreads_or(int value, int line = __builtin_LINE()) {
  return river::emulation::sync_block(0, 0, "__syncthreads_or", line, value != 0);
}
inline int __syncthreads_and(int value, int line = __builtin_LINE()) {
  return !river::emulation::sync_block(0, 0, "__syncthreads_and", line, value == 0);
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
inline int river_lane() { return river::emulation::current->lane; }

template <class T>
T __shfl_sync(uint32_t mask, T value, int lane, int width = 32, int line = __builtin_LINE()) {
  return river_shuffle("__shfl_sync", line, mask, value, river_lane() / width * width + lane % width);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, int line = __builtin_LINE()) {
  const int lane = river_lane(), source = lane ^ lanes;
  return river_shuffle("__shfl_xor_sync", line, mask, value, source / width > lane / width ? lane : source);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int by, int width = 32, int line = __builtin_LINE()) {
  const int lane = river_lane();
  return river_shuffle("__shfl_down_sync", line, mask, value, lane % width + by < width ? lane + by : lane);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int by, int width = 32, int line = __builtin_LINE()) {
  const int lane = river_lane();
  return river_shuffle("__shfl_up_sync", line, mask, value, lane % width >= by ? lane - by : lane);
}

inline uint32_t __ballot_sync(uint32_t mask, int value, int line = __builtin_LINE()) {
  auto& c = river::emulation::join(mask, "__ballot_sync", line, &value, sizeof(value), nullptr);
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; lane++) {
    int vote = 0;
    if (c.mask >> lane & 1) memcpy(&vote, c.slots[lane], sizeof(vote));
    votes |= static_cast<uint32_t>(vote != 0) << lane;
  }
  river::emulation::leave(c);
  return votes;
}
inline int __any_sync(uint32_t mask, int value, int line = __builtin_LINE()) {
  return __ballot_sync(mask, value, line) != 0;
}
inline int __all_sync(uint32_t mask, int value, int line = __builtin_LINE()) {
  return __ballot_sync(mask, !value, line) == 0;
}
