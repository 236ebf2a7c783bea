// A weight cut into strips of 16 output rows, the activations that go through it, and the loop over strips in parallel:
// what the ops on a CPU are made of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "buffers.h"

namespace river::cpu {

constexpr int64_t kPieceBytes = 64 << 10;  // read per piece of parallel work; less is not worth a thread
constexpr int64_t kRowBytes = 8 << 10;     // of activations per piece: there is more to compute for each byte
constexpr int64_t kOwnBytes = 32 << 10;    // of activations that each thread prepares for itself, rather than have them
                                           // from another's cache
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

constexpr Parallel kOneThread = {.count = 1,
                                 .run =
                                     [](void*, int64_t n, int64_t, Parallel::Body body, void* context) {
                                       if (n > 0) body(0, n, context);
                                     },
                                 .state = nullptr};

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

// What goes through a linear: vectors, as they are or normalised
struct Input {
  Vectors x;
  const void* norm = nullptr;  // [cols], weight of an RMSNorm, or null
  float eps = 0;

  int64_t bytes() const { return x.rows.count() * x.bytes(); }
};

// An input in the order and type that strips read: those of a packed or of a dense weight
class Activations {
 public:
  Activations(const Input& input, bool packed, const Parallel& parallel);

  const Operand& operand() const { return operand_; }
  int rows() const { return operand_.rows; }

 private:
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

  // A part of the strips from `begin` to `end` - 1
  Ahead part(int64_t begin, int64_t end, int64_t part, int64_t parts) const {
    const int64_t output_rows = std::max<int64_t>(0, std::min(end * kTileRows, rows) - begin * kTileRows);
    const int64_t bytes = output_rows * strip_bytes() / kTileRows;
    return {.from = reinterpret_cast<const char*>(at_strip(begin)) + bytes * part / parts, .bytes = bytes / parts};
  }

  const uint8_t* at_strip(int64_t s) const { return static_cast<const uint8_t*>(data) + s * strip_bytes(); }
};

// Weights of one shape, and what becomes of the results of their strips: f(t, first output row, output rows, results),
// for every row and some strips at a time; results[i] are the strips of weights[i].
template <size_t N, class F>
struct Linear {
  Weight weights[N];
  F f;

  const Weight& shape() const { return weights[0]; }

  // The strips from `begin` to `end` - 1. All rows, a block after the other, go through some of them while they are in
  // L2, and the next ones come from memory meanwhile. For the first ones nothing is done meanwhile, so a thread begins
  // with one strip, and goes on with twice as many each time.
  void run(const Activations& x, int64_t begin, int64_t end) const {
    const int64_t hot = std::clamp<int64_t>(kHotBytes / (int64_t(N) * shape().strip_bytes()), 1, kMostHot);
    const int blocks = int(ceil_div(x.rows(), kMaxRows));
    StripOut out[N][kMostHot];
    for (int64_t first = begin, past = begin + 1; first < end;) {
      const int64_t strips = past - first, next = std::min(past + std::min(2 * strips, hot), end);
      for (int block = 0; block < blocks; block++) {
        const int row = block * kMaxRows;
        for (int64_t s = first; s < past; s++)
          for (size_t i = 0; i < N; i++) {
            const Ahead ahead = weights[i].part(past, next, block * strips + s - first, blocks * strips);
            weights[i].strip(s, x, row, ahead, out[i][s - first]);
          }
        const int64_t from = first * kTileRows, count = std::min(past * kTileRows, shape().rows) - from;
        for (int t = 0; t < std::min(kMaxRows, x.rows() - row); t++) {
          RowSums results[N];
          for (size_t i = 0; i < N; i++) results[i] = {.strips = out[i], .t = t};
          f(row + t, from, int(count), results);
        }
      }
      first = past;
      past = next;
    }
  }
};

template <size_t N, class F>
Linear<N, F> linear(const Weight (&weights)[N], F f) {
  Linear<N, F> linear{.weights = {}, .f = f};
  std::copy(weights, weights + N, linear.weights);
  return linear;
}

// Runs linears of one input, which threads share as if they were one: all packed, or all dense.
template <class First, class... Others>
void run_linears(const Input& input, const Parallel& parallel, const First& linear, const Others&... others) {
  const bool packed = linear.shape().packed, alone = input.bytes() <= kOwnBytes;
  std::optional<Activations> prepared;
  if (!alone) prepared.emplace(input, packed, parallel);
  const int64_t blocks = ceil_div(input.x.rows.count(), kMaxRows);
  const int64_t strips = (linear.shape().strips() + ... + others.shape().strips());
  parallel(strips, ceil_div(linear.shape().grain(), blocks), [&](int64_t begin, int64_t end) {
    std::optional<Activations> own;
    if (alone) own.emplace(input, packed, kOneThread);
    const auto run = [&](const auto& part) {
      const int64_t count = part.shape().strips();
      part.run(own ? *own : *prepared, std::max<int64_t>(begin, 0), std::min(end, count));
      begin -= count;
      end -= count;
    };
    run(linear);
    (run(others), ...);
  });
}

// Its results in fp32, to y [rows of the input, rows of the weight]
inline auto linear_to(const Weight& weight, float* y) {
  return linear({weight}, [y, rows = weight.rows](int t, int64_t first, int count, const RowSums(&sums)[1]) {
    float* to = y + t * rows + first;
    for (int i = 0; i < count; i += kTileRows)
      memcpy(to + i, sums[0].of_strip(i / kTileRows), std::min(kTileRows, count - i) * sizeof(float));
  });
}

// What is added to a linear, and where its results go: out[row] = round(addend[row] + multiplier * (bias + W x[t]))
struct LinearOut {
  const void* bias;  // [rows of the weight] or null
  float multiplier;
  const void* addend;  // [T, rows of the weight] or null
  void* out;           // the same
  const Rows& rows;    // t -> row
};

void linear_into(const Weight& weight, const Input& input, const LinearOut& to, const Parallel& parallel);

}  // namespace river::cpu
