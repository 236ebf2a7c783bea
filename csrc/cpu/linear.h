// A weight cut into strips of 16 output rows, the activations that go through it, and the loop over strips in parallel:
// what the ops on a CPU are made of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "buffers.h"

namespace river::cpu {

constexpr int64_t kPieceBytes = 64 << 10;  // read per piece of parallel work; less is not worth a thread
constexpr int64_t kRowBytes = 8 << 10;     // of activations per piece: there is more to compute for each byte
constexpr int64_t kHotBytes = 256 << 10;   // weights that stay in L2 while many rows go through them
constexpr int64_t kMostHot = 16;           // strips of them, whose results are kept until they are used at once

// The rows that an op computes
struct Rows {
  std::vector<int> index;

  int count() const { return int(index.size()); }
  void add(int row) { index.push_back(row); }

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

// Calls f(t) for each of many rows, of some bytes each.
template <class F>
void for_rows(int rows, int64_t bytes, const Parallel& parallel, F f) {
  parallel(rows, ceil_div(kRowBytes, bytes), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) f(int(t));
  });
}

// Some rows of a tensor
struct Vectors {
  DType dtype;
  const void* data;  // [T, cols]
  int64_t cols;
  const Rows& rows;

  const void* row(int t) const { return at(data, dtype, rows.index[t] * cols); }
  int64_t bytes() const { return cols * size_of(dtype); }  // of one
};

struct RmsNorm {
  const void* weight;  // [cols]
  float eps;
};

// Vectors, as they are or normalised, in the order and type that strips read: those of a packed or of a dense weight
class Activations {
 public:
  Activations(const Vectors& x, bool packed, const Parallel& parallel);
  Activations(const Vectors& x, const RmsNorm& norm, bool packed, const Parallel& parallel);

  const Operand& operand() const { return operand_; }
  int rows() const { return operand_.rows; }

 private:
  Activations(int rows, int64_t cols);

  std::unique_ptr<Line[]> lines_;
  std::unique_ptr<float[]> sums_;  // [rows, padded cols / 64]
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

  // out[t][r] = row r of strip s . x[first + t], for a block of rows
  void strip(int64_t s, const Activations& x, int first, const Ahead& ahead, StripOut& out) const {
    if (packed) kernels().w4_strip(dtype, at_strip(s), x.operand(), first, ahead, out);
    else kernels().dense_strip(dtype, at_strip(s), strip_rows(s), x.operand(), first, ahead, out);
  }

  // A part of strip s; of none past the last one
  Ahead part(int64_t s, int part, int parts) const {
    const int64_t bytes = s < strips() ? strip_rows(s) * strip_bytes() / kTileRows : 0;
    return {.from = reinterpret_cast<const char*>(at_strip(s)) + bytes * part / parts, .bytes = bytes / parts};
  }

  const uint8_t* at_strip(int64_t s) const { return static_cast<const uint8_t*>(data) + s * strip_bytes(); }
};

// Calls f(t, first output row, output rows, results) for every row of x and some strips of the weights at a time.
// The weights have one shape; results[i] are the strips of weights[i]. All rows, a block after the other, go through
// these strips while they are in L2, and the next ones come from memory meanwhile.
template <size_t N, class F>
void for_strips(const Weight (&weights)[N], const Activations& x, const Parallel& parallel, F f) {
  const Weight& shape = weights[0];
  const int64_t hot = std::clamp<int64_t>(kHotBytes / (int64_t(N) * shape.strip_bytes()), 1, kMostHot);
  const int blocks = int(ceil_div(x.rows(), kMaxRows));
  parallel(shape.strips(), shape.grain(), [&](int64_t begin, int64_t end) {
    StripOut out[N][kMostHot];
    for (int64_t first = begin; first < end; first += hot) {
      const int64_t past = std::min(first + hot, end);
      for (int block = 0; block < blocks; block++) {
        const int row = block * kMaxRows;
        for (int64_t s = first; s < past; s++)
          for (size_t i = 0; i < N; i++)
            weights[i].strip(s, x, row, weights[i].part(s + hot, block, blocks), out[i][s - first]);
        const int64_t from = first * kTileRows, count = std::min(past * kTileRows, shape.rows) - from;
        for (int t = 0; t < std::min(kMaxRows, x.rows() - row); t++) {
          RowSums results[N];
          for (size_t i = 0; i < N; i++) results[i] = {.strips = out[i], .t = t};
          f(row + t, from, int(count), results);
        }
      }
    }
  });
}

// W x[t] in fp32, [rows of x, rows of the weight]
std::unique_ptr<float[]> project(const Weight& weight, const Activations& x, const Parallel& parallel);

// What is added to a linear, and where its results go: out[row] = round(addend[row] + multiplier * (bias + W x[t]))
struct LinearOut {
  const void* bias;  // [rows of the weight] or null
  float multiplier;
  const void* addend;  // [T, rows of the weight] or null
  void* out;           // the same
  const Rows& rows;    // t -> row
};

void linear_into(const Weight& weight, const Activations& x, const LinearOut& to, const Parallel& parallel);

}  // namespace river::cpu
