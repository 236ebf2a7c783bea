// Arrays in the model dtype: places in them, fp32 copies of them.
#pragma once

#include <cstdint>

#include "isa/kernels.h"
#include "scratch.h"

namespace river::cpu {

// Entry i of an array
inline const char* at(const void* p, DType dtype, int64_t i) {
  return static_cast<const char*>(p) + i * size_of(dtype);
}
inline char* at(void* p, DType dtype, int64_t i) { return static_cast<char*>(p) + i * size_of(dtype); }

// The n values of x in fp32; null for null
inline Scratch<float> floats(DType dtype, const void* x, int64_t n) {
  if (!x) return nullptr;
  auto y = scratch<float>(n);
  kernels().to_float(dtype, x, y.get(), n);
  return y;
}

}  // namespace river::cpu
