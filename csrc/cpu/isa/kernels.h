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

// What strips that follow each other gave one row of a block
struct RowSums {
  const StripOut* strips;
  int t;

  const float* of_strip(int64_t s) const { return strips[s][t]; }  // [16]
};

constexpr int kSplit = 256;  // positions per split of the context

// Softmax state of one query head over some positions: the largest score, the sum of the weights exp(score - max), and
// the values weighted alike. A sum of 0: it saw none, and the value may hold anything.
struct AttentionState {
  float max, sum;
  float* value;  // [head_dim rounded up to 16]
};

// Entries begin to end - 1 of a list
struct Range {
  int begin, end;
};

constexpr int kScores = kSplit + 16;  // room for the scores of a query head over a split, and for a vector past its end

// Query heads that share a KV head, of one row or of several rows of one slot, and a split that they attend to
struct SplitArgs {
  DType dtype;  // of k and v
  int queries;  // query heads of all rows
  int head_dim;
  float softmax_scale;
  const uint32_t* query;     // [queries, head_dim], each as pack_query left it
  const void *k, *v;         // [max_len, head_dim]
  const int32_t* positions;  // [count], those of the split that any query sees, ascending
  int count;                 // 1 to kSplit
  const Range* seen;         // [queries], which of the positions each one sees; may be none
  float* scores;             // [queries, kScores], scratch
  AttentionState* out;       // [queries]
};

// Bytes of later strips, which L2 is asked for while a strip is computed
struct Ahead {
  const char* from;
  int64_t bytes;
};

// Whether L1 asks memory for the lines of a strip that is in no cache, or L2 alone
extern const bool kL1Asks;

struct Kernels {
  const char* name;

  // y = round(x * rsqrt(mean(x^2) + eps) * weight), n values each
  void (*rms_norm)(DType dtype, const void* x, const void* weight, float eps, int n, void* y);
  // Fills row `row` of the operand from x [K]; packed: for w4_strip, else for dense_strip.
  void (*prepare)(DType dtype, const void* x, bool packed, int row, const Operand& operand);
  // out[t][r] = weight[r] . x[first + t] for `count` <= 16 rows of a dense weight [count, K], and a block of rows of x:
  // those from `first` on, at most kMaxRows. If x has more blocks, the strip should be in L2 already.
  void (*dense_strip)(DType dtype, const void* weight, int count, const Operand& x, int first, const Ahead& ahead,
                      StripOut& out);
  // The same for one strip of tiles, [K / 64, 576]: 16 output rows
  void (*w4_strip)(DType dtype, const uint8_t* tiles, const Operand& x, int first, const Ahead& ahead, StripOut& out);
  // out = round(silu(gate) * up), `n` channels, 16 a strip
  void (*swiglu)(DType dtype, const RowSums& gate, const RowSums& up, int n, void* out);
  // The same where the 16 sums of a strip are 8 gates and their 8 ups
  void (*swiglu_pairs)(DType dtype, const RowSums& pairs, int n, void* out);
  // out = round(multiplier * (sums + bias) + addend), `n` output rows; bias and addend may be null
  void (*add_sums)(DType dtype, const RowSums& sums, int n, const float* bias, float multiplier, const void* addend,
                   void* out);
  // Turns entries i and half + i of a head, for i < half, by the angles of cos and sin [half].
  void (*rotate)(const float* cos, const float* sin, int half, float* head);
  // A query head [head_dim] as attend reads it, in at most head_dim words
  void (*pack_query)(DType dtype, const void* query, int head_dim, uint32_t* words);
  void (*attend)(const SplitArgs& args);
  // Adds the state of one more split of the context to that of the splits before it.
  void (*absorb)(const AttentionState& split, int head_dim, AttentionState& before);
  // out [head_dim] = the softmax average of a state; zero if it saw no position
  void (*average)(const AttentionState& state, DType dtype, int head_dim, void* out);
  // The cosine of x and y, n values each
  float (*similarity)(DType dtype, const void* x, const void* y, int n);
  void (*to_float)(DType dtype, const void* x, float* y, int64_t n);
  void (*from_float)(DType dtype, const float* x, void* y, int64_t n);
};

const Kernels& kernels();  // of the instruction set in use

}  // namespace river::cpu
