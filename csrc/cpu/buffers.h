// Arrays in the model dtype: places in them, fp32 copies of them; and scratch memory.
#pragma once

#include <cstdint>
#include <memory>

#include "isa/kernels.h"

namespace river::cpu {

// Entry i of an array
inline const char* at(const void* p, DType dtype, int64_t i) {
  return static_cast<const char*>(p) + i * size_of(dtype);
}
inline char* at(void* p, DType dtype, int64_t i) { return static_cast<char*>(p) + i * size_of(dtype); }

// Room for n elements, not initialised
template <class T>
std::unique_ptr<T[]> scratch(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

// The n values of x in fp32; null for null
inline std::unique_ptr<float[]> floats(DType dtype, const void* x, int64_t n) {
  if (!x) return nullptr;
  auto y = scratch<float>(n);
  kernels().to_float(dtype, x, y.get(), n);
  return y;
}

}  // namespace river::cpu
