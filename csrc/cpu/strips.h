// A weight cut into strips of 16 output rows, the activations that go through it, and the loop over strips in parallel:
// what the ops on a CPU are made of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "isa/kernels.h"

namespace river::cpu {

constexpr int64_t kPieceBytes = 64 << 10;  // weights per piece of parallel work; less is not worth a thread

inline const char* at(const void* p, DType dtype, int64_t i) { return (const char*)p + i * size_of(dtype); }
inline char* at(void* p, DType dtype, int64_t i) { return (char*)p + i * size_of(dtype); }

template <class T>
std::unique_ptr<T[]> scratch(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

// A weight as strips of 16 output rows
struct Weight {
  DType dtype;
  bool packed;
  const void* data;
  int64_t rows, cols;

  int64_t strips() const { return ceil_div(rows, kTileRows); }
  int64_t strip_bytes() const {
    return packed ? ceil_div(cols, kTileCols) * kTileBytes : kTileRows * cols * size_of(dtype);
  }
  int64_t grain() const { return ceil_div(kPieceBytes, strip_bytes()); }

  void strip(int64_t s, const Operand& x, StripOut& out) const {
    const char* start = (const char*)data + s * strip_bytes();
    if (packed) kernels().w4_strip(dtype, (const uint8_t*)start, x, out);
    else kernels().dense_strip(dtype, start, (int)std::min<int64_t>(kTileRows, rows - s * kTileRows), x, out);
  }
};

// Activations ready for a Weight
class Activations {
 public:
  Activations(DType dtype, bool packed, int rows, int64_t cols)
      : dtype_(dtype), packed_(packed), operand_{rows, (int)cols, (int)round_up(cols, kTileCols), nullptr, nullptr} {
    values_ = scratch<float>((int64_t)rows * operand_.padded);
    sums_ = scratch<float>((int64_t)rows * operand_.padded / kTileCols);
    operand_.values = values_.get();
    operand_.sums = sums_.get();
  }
  void set(int row, const void* x) { kernels().prepare(dtype_, x, packed_, row, operand_); }
  const Operand& operand() const { return operand_; }

 private:
  DType dtype_;
  bool packed_;
  Operand operand_;
  std::unique_ptr<float[]> values_, sums_;
};

// Calls f(first output row, rows in the strip, results) for every strip of the weight
template <class F>
void for_strips(const Weight& weight, const Activations& x, const Parallel& parallel, F f) {
  parallel(weight.strips(), weight.grain(), [&](int64_t begin, int64_t end) {
    StripOut out;
    for (int64_t s = begin; s < end; s++) {
      weight.strip(s, x.operand(), out);
      f(s * kTileRows, (int)std::min<int64_t>(kTileRows, weight.rows - s * kTileRows), out);
    }
  });
}

}  // namespace river::cpu
