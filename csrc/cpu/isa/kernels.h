// The primitives that depend on the instruction set. kernels.cpp is compiled once per set, each time into
// one table of functions; they run on one thread and know nothing of layers. layers.cpp composes them.
#pragma once

#include "../../river.h"

namespace river::cpu {

// T activation vectors in the order and type that a linear kernel reads (see prepare).
struct Operand {
  int rows;      // T
  int cols;      // K
  int padded;    // K rounded up to 64; entries past K are zero
  void* values;  // [T, padded], bf16 or fp32
  float* sums;   // [T, padded / 64], sums per W4 group of the values; packed only
};

// Softmax state of one query head over one split of the context: max, sum of weights, weighted values
struct AttentionState {
  float max, sum;
  float* value;  // [head_dim rounded up to 16]
};

using StripOut = float[kMaxRows][kTileRows];  // fp32 results of 16 output rows

struct Kernels {
  const char* name;

  // y = round(x * rsqrt(mean(x^2) + eps) * weight)
  void (*rms_norm)(DType dtype, const void* x, const void* weight, float eps, int n, void* y);
  // Fills row `row` of the operand from x [K]; packed: for w4_strip, else for dense_strip.
  void (*prepare)(DType dtype, const void* x, bool packed, int row, const Operand& operand);
  // out[t][r] = weight[r] . x[t] for `count` <= 16 rows of a dense row-major weight
  void (*dense_strip)(DType dtype, const void* weight, int count, const Operand& x, StripOut& out);
  // the same for one row of tiles, 16 output rows
  void (*w4_strip)(DType dtype, const uint8_t* tiles, const Operand& x, StripOut& out);
  // out = silu(gate) * up for 16 channels, fp32
  void (*swiglu)(const float* gate, const float* up, float* out);
  // Query heads of one KV head over `count` positions of the cache; out[g * stride] is the state of head g
  void (*attend)(DType dtype, const float* query, int group, int head_dim, const void* k, const void* v,
                 const int32_t* positions, int count, AttentionState* out, int64_t stride);
  // out [head_dim] = the softmax average over `count` splits, merged in order; zero if none saw a position
  void (*merge)(const AttentionState* splits, int count, int head_dim, float* out);
  float (*similarity)(DType dtype, const void* x, const void* y, int n);
  void (*to_float)(DType dtype, const void* x, float* y, int64_t n);
  void (*from_float)(DType dtype, const float* x, void* y, int64_t n);
};

constexpr int kSplit = 256;  // positions per split of the context

const Kernels& kernels();  // of the instruction set in use

}  // namespace river::cpu
