// Attention of one row over one split of its context, by a block: kHeads query heads of one KV head at a time, which
// share every K and V that is read. The functions of SplitAttention stand in the order in which a block calls them;
// each ends in a barrier of the block. Sums and softmax are fp32.
//
// To read K or V, kLanes lanes take a position, 8 dims each, so that a warp reads 32 / kLanes positions at a time, and
// each lane has kAhead loads under way. For the softmax a warp has one query head.
#pragma once

#include "activations.cuh"

namespace river::device {

constexpr int kAttentionThreads = 128;
constexpr int kAttentionWarps = kAttentionThreads / kWarp;
constexpr int kHeads = 4;       // query heads per pass over a split
constexpr int kAhead = 4;       // loads of a lane under way at a time
constexpr int kMaxSplit = 256;  // positions
static_assert(kAttentionWarps == kHeads);

// ---- how a context is cut -----------------------------------------------------------------------

// Positions of a split, of `seen` ones: 64, until that makes 16 splits; then 16 splits of more positions each, up to
// kMaxSplit; then more splits.
__host__ __device__ inline int split_size(int seen) {
  return seen <= 16 * 64 ? 64 : seen <= 16 * 128 ? 128 : kMaxSplit;
}

// The splits of one row. They begin at multiples of their size and depend on nothing but the row's own position.
struct ContextSplits {
  int first, last;  // positions that the row sees, both included
  int size, start, count;

  RIVER_DEVICE ContextSplits(const AttentionArgs& a, int position)
      : first(a.sliding_window > 0 ? max(int64_t(0), position - a.sliding_window + 1) : 0), last(position),
        size(split_size(last - first + 1)), start(first / size * size), count((last - start) / size + 1) {}

  RIVER_DEVICE int begin(int split) const { return start + split * size; }
};

// ---- what a split leaves for the merge ----------------------------------------------------------

// Of each (row, query head, split): the largest score, the sum of exp(score - largest), the values weighted alike.
struct Partials {
  static constexpr int kLargest = 0, kSum = 1, kValues = 2;

  float* memory;  // [T, heads, splits, 2 + head_dim]
  int heads, splits, head_dim;

  RIVER_DEVICE float* at(int row, int head, int split) const {
    return memory + ((int64_t(row) * heads + head) * splits + split) * (kValues + head_dim);
  }
};

// ---- one split ----------------------------------------------------------------------------------

template <int kLanes>
struct AttentionMemory {
  float query[kHeads][kLanes * 8];                   // times softmax_scale
  float weight[kHeads][kMaxSplit];                   // of positions: scores first. In the merge: of splits
  float value[kHeads][kAttentionWarps][kLanes * 8];  // weighted values, by warp
  float state[kHeads][2];                            // kLargest, kSum
};

// Consecutive query heads, 1 to kHeads
struct HeadRange {
  int first, count;
};

RIVER_DEVICE float warp_max(float x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = fmaxf(x, shuffle_xor(x, lanes));
  return x;
}

RIVER_DEVICE float warp_sum(float x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
  return x;
}

template <class T, int kLanes>
struct SplitAttention {
  static constexpr int kPositions = kAttentionThreads / kLanes;  // that the block reads at a time

  const AttentionArgs& a;
  const Partials& partials;
  const ContextSplits& context;
  AttentionMemory<kLanes>& shared;
  int row, slot, kv_head;

  RIVER_DEVICE void load_query(HeadRange heads) const {
    const T* query = static_cast<const T*>(a.query) + (int64_t(row) * a.num_heads + heads.first) * a.head_dim;
    for (int i = threadIdx.x; i < heads.count * a.head_dim; i += kAttentionThreads)
      shared.query[i / a.head_dim][i % a.head_dim] = to_float(load_written(query + i)) * a.softmax_scale;
    __syncthreads();
  }

  // weight = query . K; -inf where the row sees nothing
  RIVER_DEVICE void score(int split, HeadRange heads) const {
    for (int i0 = offset(); i0 < context.size; i0 += kAhead * kPositions) {
      uint4 ahead[kAhead];
      bool valid[kAhead];
      load_ahead(a.k_cache, context.begin(split) + i0, ahead, valid);
#pragma unroll
      for (int n = 0; n < kAhead; n++) {
        float k[8], sum[kHeads] = {};
        unpack<T>(ahead[n], k);
        if (in_head()) {
#pragma unroll
          for (int h = 0; h < kHeads; h++)
            for (int j = 0; j < 8; j++) sum[h] += k[j] * shared.query[h][dim() + j];
        }
        for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
          for (int h = 0; h < kHeads; h++) sum[h] += shuffle_xor(sum[h], lanes);
        for (int h = 0; h < kHeads; h++)
          if (dim() == 0 && h < heads.count) shared.weight[h][i0 + n * kPositions] = valid[n] ? sum[h] : -INFINITY;
      }
    }
    __syncthreads();
  }

  // weight = exp(weight - largest), and the state
  RIVER_DEVICE void softmax(HeadRange heads) const {
    if (const int h = warp_id(); h < heads.count) {
      float (&weight)[kMaxSplit] = shared.weight[h];
      float largest = -INFINITY, sum = 0;
      for (int i = lane_id(); i < context.size; i += kWarp) largest = fmaxf(largest, weight[i]);
      largest = warp_max(largest);
      for (int i = lane_id(); i < context.size; i += kWarp) {
        const float w = weight[i] == -INFINITY ? 0.f : expf(weight[i] - largest);
        weight[i] = w;
        sum += w;
      }
      sum = warp_sum(sum);
      if (lane_id() == 0) shared.state[h][Partials::kLargest] = largest, shared.state[h][Partials::kSum] = sum;
    }
    __syncthreads();
  }

  // value = weight . V: a lane has its 8 dims of its positions; then come the lanes of the warp that have the same
  // dims.
  RIVER_DEVICE void weigh_values(int split, HeadRange heads) const {
    float sum[kHeads][8] = {};
    for (int i0 = offset(); i0 < context.size; i0 += kAhead * kPositions) {
      uint4 ahead[kAhead];
      bool valid[kAhead];
      load_ahead(a.v_cache, context.begin(split) + i0, ahead, valid);
#pragma unroll
      for (int n = 0; n < kAhead; n++) {
        if (!valid[n] || !in_head()) continue;
        float v[8];
        unpack<T>(ahead[n], v);
        for (int h = 0; h < kHeads; h++) {
          const float w = h < heads.count ? shared.weight[h][i0 + n * kPositions] : 0.f;
          for (int j = 0; j < 8; j++) sum[h][j] += w * v[j];
        }
      }
    }
    for (int h = 0; h < kHeads; h++)
      for (int j = 0; j < 8; j++) {
        for (int lanes = kWarp / 2; lanes >= kLanes; lanes /= 2) sum[h][j] += shuffle_xor(sum[h][j], lanes);
        if (lane_id() < kLanes) shared.value[h][warp_id()][dim() + j] = sum[h][j];
      }
    __syncthreads();
  }

  // The warps' sums are added in order.
  RIVER_DEVICE void write_partials(int split, HeadRange heads) const {
    for (int i = threadIdx.x; i < heads.count * a.head_dim; i += kAttentionThreads) {
      const int h = i / a.head_dim, d = i % a.head_dim;
      float total = 0;
      for (int warp = 0; warp < kAttentionWarps; warp++) total += shared.value[h][warp][d];
      float* partial = partials.at(row, heads.first + h, split);
      partial[Partials::kValues + d] = total;
      if (d < Partials::kValues) partial[d] = shared.state[h][d];
    }
    __syncthreads();
  }

 private:
  RIVER_DEVICE int offset() const { return threadIdx.x / kLanes; }
  RIVER_DEVICE int dim() const { return threadIdx.x % kLanes * 8; }
  RIVER_DEVICE bool in_head() const { return dim() < a.head_dim; }

  RIVER_DEVICE bool sees(int p) const {
    return p >= context.first && p <= context.last && (!a.kv_valid || a.kv_valid[int64_t(slot) * a.max_len + p]);
  }

  // This lane's dims of the positions p0, p0 + kPositions, ...: all are under way before the first is looked at.
  RIVER_DEVICE void load_ahead(const void* cache, int p0, uint4 (&out)[kAhead], bool (&valid)[kAhead]) const {
    const T* head = static_cast<const T*>(cache) + (int64_t(slot) * a.num_kv_heads + kv_head) * a.max_len * a.head_dim;
#pragma unroll
    for (int n = 0; n < kAhead; n++) {
      const int p = p0 + n * kPositions;
      valid[n] = sees(p);
      out[n] = valid[n] && in_head() ? load_activations(head + int64_t(p) * a.head_dim + dim()) : uint4{};
    }
  }
};

}  // namespace river::device
