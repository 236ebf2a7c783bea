// decode_attention on a CPU. The context of each (row, KV head) is cut into splits at multiples of kSplit positions, so
// that the cut depends on nothing but the position. Splits run in parallel, each for all query heads of its KV head,
// and are merged in order.
#include <algorithm>
#include <cstring>

#include "linear.h"

namespace river::cpu {

namespace {

struct Attention {
  const AttentionArgs& a;
  int group;       // query heads per KV head
  int64_t padded;  // head_dim in whole vectors of 16 lanes
  int64_t splits;  // of the longest context

  explicit Attention(const AttentionArgs& args)
      : a(args), group(a.num_heads / a.num_kv_heads), padded(round_up(a.head_dim, 16)), splits(1) {
    for (int row = 0; row < a.rows; row++)
      if (a.slots[row] >= 0) splits = std::max<int64_t>(splits, a.positions[row] / kSplit + 1);
  }

  // Lists the positions of a split that the row sees; returns how many.
  int positions(int row, int64_t split, int32_t (&out)[kSplit]) const {
    if (a.slots[row] < 0) return 0;
    const int64_t last = a.positions[row];
    const int64_t first = a.sliding_window > 0 ? std::max<int64_t>(0, last - a.sliding_window + 1) : 0;
    const int64_t end = std::min(last + 1, (split + 1) * kSplit);
    int count = 0;
    for (int64_t p = std::max(first, split * kSplit); p < end; p++)
      if (!a.kv_valid || a.kv_valid[int64_t(a.slots[row]) * a.max_len + p]) out[count++] = int32_t(p);
    return count;
  }

  // The query heads from `head` of [T, heads] on, scaled, in fp32: [group, padded]
  void load_queries(int64_t head, float* queries) const {
    for (int g = 0; g < group; g++) {
      float* query = queries + g * padded;
      memset(query, 0, padded * sizeof(float));
      kernels().to_float(a.dtype, at(a.query, a.dtype, (head + g) * a.head_dim), query, a.head_dim);
      for (int i = 0; i < a.head_dim; i++) query[i] *= a.softmax_scale;
    }
  }

  void run_split(int row, int kv_head, int64_t split, AttentionState* states) const {
    float queries[kMaxGroup * kMaxHeadDim];
    int32_t seen[kSplit];
    const int count = positions(row, split, seen);
    if (count == 0) return;
    const int64_t head = int64_t(row) * a.num_heads + kv_head * group;
    load_queries(head, queries);
    const int64_t cache = (int64_t(a.slots[row]) * a.num_kv_heads + kv_head) * a.max_len * a.head_dim;
    kernels().attend({.dtype = a.dtype,
                      .group = group,
                      .head_dim = a.head_dim,
                      .queries = queries,
                      .k = at(a.k_cache, a.dtype, cache),
                      .v = at(a.v_cache, a.dtype, cache),
                      .positions = seen,
                      .count = count,
                      .out = &states[head * splits + split],
                      .stride = splits});
  }

  void merge(int64_t head, const AttentionState* states) const {
    float merged[kMaxHeadDim];
    kernels().merge(&states[head * splits], int(splits), a.head_dim, merged);
    kernels().from_float(a.dtype, merged, at(a.out, a.dtype, head * a.head_dim), a.head_dim);
  }

  void run(const Parallel& parallel) const {
    const int64_t heads = int64_t(a.rows) * a.num_heads;
    auto states = scratch<AttentionState>(heads * splits);  // [T, heads, splits]
    auto values = scratch<float>(heads * splits * padded);  // [T, heads, splits, padded]
    for (int64_t i = 0; i < heads * splits; i++) states[i] = {.max = 0, .sum = 0, .value = &values[i * padded]};

    const int64_t split_bytes = 2 * std::min<int64_t>(kSplit, a.max_len) * a.head_dim * size_of(a.dtype);
    const int64_t pieces = int64_t(a.rows) * a.num_kv_heads * splits;  // [T, kv_heads, splits]
    parallel(pieces, ceil_div(kPieceBytes, split_bytes), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t row_head = i / splits;
        run_split(int(row_head / a.num_kv_heads), int(row_head % a.num_kv_heads), i % splits, states.get());
      }
    });
    for (int64_t head = 0; head < heads; head++) merge(head, states.get());
  }
};

}  // namespace

void launch_decode_attention(const AttentionArgs& args, const Parallel& parallel) { Attention(args).run(parallel); }

}  // namespace river::cpu
