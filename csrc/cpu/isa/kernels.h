// The primitives that depend on the instruction set. kernels.cpp is compiled once per set, each time into one table of
// functions; they run on one thread and know nothing of layers. The files of csrc/cpu compose them.
#pragma once

#include "../../river.h"

namespace river::cpu {

struct alignas(64) Line {
  char bytes[64];  // 32 bf16 or 16 fp32 values of one row
};

// T activation vectors in the order and type that a linear kernel reads (see prepare). Rows go in blocks of kMaxRows,
// the last one may be smaller: first a line of every row of the block, then the next line of every row.
struct Operand {
  int rows;     // T
  int cols;     // K
  int padded;   // K rounded up to 64; entries past K are zero
  Line* lines;  // [blocks, lines of a row, rows of the block]
  float* sums;  // [T, padded / 64], sums per W4 group of the values; packed only
};

using StripOut = float[kMaxRows][kTileRows];  // fp32 results of 16 output rows, for a block of rows

constexpr int kSplit = 256;  // positions per split of the context

// Softmax state of one query head over one split of the context: max, sum of weights, weighted values
struct AttentionState {
  float max, sum;
  float* value;  // [head_dim rounded up to 16]
};

// The query heads of one KV head, and what they attend to: some positions of one split of one slot
struct SplitArgs {
  DType dtype;  // of k and v
  int group;    // query heads
  int head_dim;
  const float* queries;      // [group, head_dim rounded up to 16], scaled; zero past head_dim
  const void *k, *v;         // [max_len, head_dim]
  const int32_t* positions;  // [count]
  int count;                 // 1 to kSplit
  AttentionState* out;       // the state of head g is out[g * stride]
  int64_t stride;
};

struct Kernels {
  const char* name;

  // y = round(x * rsqrt(mean(x^2) + eps) * weight), n values each
  void (*rms_norm)(DType dtype, const void* x, const void* weight, float eps, int n, void* y);
  // Fills row `row` of the operand from x [K]; packed: for w4_strip, else for dense_strip.
  void (*prepare)(DType dtype, const void* x, bool packed, int row, const Operand& operand);
  // out[t][r] = weight[r] . x[first + t] for `count` <= 16 rows of a dense weight [count, K], and a block of rows of x:
  // those from `first` on, at most kMaxRows
  void (*dense_strip)(DType dtype, const void* weight, int count, const Operand& x, int first, StripOut& out);
  // The same for one strip of tiles, [K / 64, 576]: 16 output rows
  void (*w4_strip)(DType dtype, const uint8_t* tiles, const Operand& x, int first, StripOut& out);
  // out = round(silu(gate) * up) for `n` <= 16 channels; gate, up: 16 entries, past the channels any
  void (*swiglu)(DType dtype, const float* gate, const float* up, void* out, int n);
  // out = round(sums + bias + addend) for `n` <= 16 output rows; bias and addend may be null; sums: 16 entries
  void (*add_sums)(DType dtype, const float* sums, const float* bias, const void* addend, void* out, int n);
  void (*attend)(const SplitArgs& args);
  // out [head_dim rounded up to 16] = the softmax average over `count` splits, merged in order; zero if none saw a
  // position
  void (*merge)(const AttentionState* splits, int count, int head_dim, float* out);
  // The cosine of x and y, n values each
  float (*similarity)(DType dtype, const void* x, const void* y, int n);
  void (*to_float)(DType dtype, const void* x, float* y, int64_t n);
  void (*from_float)(DType dtype, const float* x, void* y, int64_t n);
};

const Kernels& kernels();  // of the instruction set in use

}  // namespace river::cpu
