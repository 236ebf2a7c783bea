// A weight cut into strips of 16 output rows, the activations that go through it, and the loop over strips in parallel:
// what the ops on a CPU are made of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "buffers.h"

namespace river::cpu {

constexpr int64_t kPieceBytes = 64 << 10;  // weights per piece of parallel work; less is not worth a thread

// The rows of a step that an op computes
struct Rows {
  int count = 0;
  int index[kMaxRows];  // [count]

  void add(int row) { index[count++] = row; }

  static Rows all(int rows) {
    Rows all;
    for (int row = 0; row < rows; row++) all.add(row);
    return all;
  }
  static Rows active(const int32_t* slots, int rows) {
    Rows active;
    for (int row = 0; row < rows; row++)
      if (slots[row] >= 0) active.add(row);
    return active;
  }
};

// Some rows of a tensor
struct Vectors {
  DType dtype;
  const void* data;  // [T, cols]
  int64_t cols;
  const Rows& rows;

  const void* row(int t) const { return at(data, dtype, rows.index[t] * cols); }
};

struct RmsNorm {
  const void* weight;  // [cols]
  float eps;
};

// Vectors, as they are or normalised, in the order and type that strips read: those of a packed or of a dense weight
class Activations {
 public:
  Activations(const Vectors& x, bool packed);
  Activations(const Vectors& x, const RmsNorm& norm, bool packed);

  const Operand& operand() const { return operand_; }
  int rows() const { return operand_.rows; }

 private:
  Activations(int rows, int64_t cols);

  std::unique_ptr<float[]> values_;  // [rows, padded cols]
  std::unique_ptr<float[]> sums_;    // [rows, padded cols / 64]
  Operand operand_;
};

struct Weight {
  DType dtype;
  bool packed;
  const void* data;  // [rows, cols], or packed [rows / 16, cols / 64, 576]
  int64_t rows, cols;

  int64_t strips() const { return ceil_div(rows, kTileRows); }
  int strip_rows(int64_t s) const { return int(std::min<int64_t>(kTileRows, rows - s * kTileRows)); }
  int64_t strip_bytes() const {
    return packed ? ceil_div(cols, kTileCols) * kTileBytes : kTileRows * cols * size_of(dtype);
  }
  int64_t grain() const { return ceil_div(kPieceBytes, strip_bytes()); }

  // out[t][r] = row r of strip s . x[t]
  void strip(int64_t s, const Activations& x, StripOut& out) const {
    const auto* start = static_cast<const uint8_t*>(data) + s * strip_bytes();
    if (packed) kernels().w4_strip(dtype, start, x.operand(), out);
    else kernels().dense_strip(dtype, start, strip_rows(s), x.operand(), out);
  }
};

// Calls f(first output row, rows in the strip, results) for every strip of the weight.
template <class F>
void for_strips(const Weight& weight, const Activations& x, const Parallel& parallel, F f) {
  parallel(weight.strips(), weight.grain(), [&](int64_t begin, int64_t end) {
    StripOut out;
    for (int64_t s = begin; s < end; s++) {
      weight.strip(s, x, out);
      f(s * kTileRows, weight.strip_rows(s), out);
    }
  });
}

// W x[t] in fp32, [rows of x, rows of the weight]
std::unique_ptr<float[]> project(const Weight& weight, const Activations& x, const Parallel& parallel);

// What is added to a linear, and where its results go: out[row] = round(addend[row] + bias + W x[t])
struct LinearOut {
  const void* bias;    // [rows of the weight] or null
  const void* addend;  // [T, rows of the weight] or null
  void* out;           // the same
  const Rows& rows;    // t -> row
};

void linear_into(const Weight& weight, const Activations& x, const LinearOut& to, const Parallel& parallel);

}  // namespace river::cpu
