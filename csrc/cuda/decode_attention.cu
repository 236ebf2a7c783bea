// decode_attention: T rows against the cache, grouped queries. A block has (a split of the context, a KV head, a row),
// and all query heads of the KV head's group; how a context is cut depends on the row's own position, so that a short
// one still fills the GPU. The last block of a (row, KV head) merges the splits in order.
//
// Positions are device data, so the grid is fixed, and one that the GPU takes at once: a block goes through the splits
// by the grid's width, and a block without a split returns. What a block does with a split: device/attention.cuh.
#include <algorithm>

#include "device/attention.cuh"
#include "device/launch.h"

namespace river::cuda {
namespace {

using namespace device;

constexpr int kBlocksPerSm = 3;  // enough loads under way for the memory

// The K and V of this block's first split, to L2. The places may still be those of the step before: then this asks for
// what may not be needed, inside of the cache.
RIVER_DEVICE void prefetch_context(const AttentionArgs& a, int row, int kv_head) {
  if (threadIdx.x >= 2) return;  // one for K, one for V
  const int slot = load_hint(a.slots + row), position = load_hint(a.positions + row);
  if (slot < 0 || slot >= a.num_slots || position < 0 || position >= a.max_len) return;
  const ContextSplits context(a, position);
  const int first = context.begin(blockIdx.x), end = min(first + context.size, position + 1);
  if (first >= end) return;
  const auto* cache = static_cast<const unsigned char*>(threadIdx.x == 0 ? a.k_cache : a.v_cache);
  const int64_t place = (int64_t(slot) * a.num_kv_heads + kv_head) * a.max_len + first, bytes = 2 * a.head_dim;
  bulk_prefetch_to_l2(cache + place * bytes, (end - first) * bytes);
}

// The softmax over all splits of a row, for some of its query heads. Warp h finds the factors of query head h; then
// each thread has its dims of all heads, so that many loads are under way.
template <class T, int kLanes>
struct SplitMerge {
  const Partials& partials;
  AttentionMemory<kLanes>& shared;
  int row, splits;

  // out: [heads.count, head_dim]
  RIVER_DEVICE void merge(HeadRange heads, T* out) const {
    constexpr int kDims = (kLanes * 8 + kAttentionThreads - 1) / kAttentionThreads;  // of a thread
    float total[kHeads][kDims] = {}, sum = 0;
    const float largest = largest_score(heads);
    for (int first = 0; first < splits; first += kMaxSplit) {  // as many as there are weights in shared memory
      const int count = min(kMaxSplit, splits - first);
      find_factors(heads, first, count, largest, sum);
      __syncthreads();
      add_values(heads, first, count, total);
      __syncthreads();
    }
    sum = warp_sum(sum);
    if (lane_id() == 0) shared.state[warp_id()][Partials::kSum] = sum;
    __syncthreads();
    for (int h = 0; h < heads.count; h++) {
      const float weights = shared.state[h][Partials::kSum];  // 0: the row sees nothing
      for (int i = 0; i < kDims; i++)
        if (const int d = threadIdx.x + i * kAttentionThreads; d < partials.head_dim)
          out[h * partials.head_dim + d] = from_float<T>(weights == 0 ? 0.f : total[h][i] / weights);
    }
    __syncthreads();
  }

 private:
  RIVER_DEVICE float partial(int head, int split, int what) const {
    return load_written(partials.at(row, head, split) + what);
  }

  RIVER_DEVICE float largest_score(HeadRange heads) const {
    float largest = -INFINITY;
    if (warp_id() < heads.count)
      for (int s = lane_id(); s < splits; s += kWarp)
        largest = fmaxf(largest, partial(heads.first + warp_id(), s, Partials::kLargest));
    return warp_max(largest);
  }

  // Leaves the factors of `count` splits from `first` on in shared.weight, and adds this lane's share of all weights.
  RIVER_DEVICE void find_factors(HeadRange heads, int first, int count, float largest, float& sum) const {
    if (warp_id() >= heads.count) return;
    const int head = heads.first + warp_id();
    for (int s = lane_id(); s < count; s += kWarp) {
      const float part = partial(head, first + s, Partials::kSum);  // 0: saw nothing
      const float factor = part == 0 ? 0.f : expf(partial(head, first + s, Partials::kLargest) - largest);
      shared.weight[warp_id()][s] = factor;
      sum += part * factor;
    }
  }

  // Adds the values of the same splits, in order.
  template <int kDims>
  RIVER_DEVICE void add_values(HeadRange heads, int first, int count, float (&total)[kHeads][kDims]) const {
#pragma unroll 4
    for (int s = 0; s < count; s++)
#pragma unroll
      for (int h = 0; h < kHeads; h++)
#pragma unroll
        for (int i = 0; i < kDims; i++)
          if (const int d = threadIdx.x + i * kAttentionThreads; h < heads.count && d < partials.head_dim)
            total[h][i] += shared.weight[h][s] * partial(heads.first + h, first + s, Partials::kValues + d);
  }
};

// Budget: 128 threads, 168 registers
template <class T, int kLanes>
__global__ void __launch_bounds__(kAttentionThreads, kBlocksPerSm)
    decode_attention_kernel(AttentionArgs a,     // shapes: river.h
                            Partials partials,   // [T, heads, splits, 2 + head_dim]
                            uint32_t* counters,  // [T, kv_heads]
                            bool early) {        // ask L2 for K and V before the kernels ahead have ended
  RIVER_SHARED(AttentionMemory<kLanes>, shared, [1]);
  const int kv_head = blockIdx.y, row = blockIdx.z, group = a.num_heads / a.num_kv_heads;
  if (warp_id() == 0) {
    if (early) prefetch_context(a, row, kv_head);
    dependency_trigger();  // behind that: the next kernel's weights would stand before K and V in the memory's queue
  }
  dependency_wait();
  const Place place = place_in_cache(a, row);
  const int first_head = kv_head * group;
  T* out = static_cast<T*>(a.out) + (int64_t(row) * a.num_heads + first_head) * a.head_dim;  // [group, head_dim]
  if (!place.active()) {
    if (blockIdx.x == 0)
      for (int i = threadIdx.x; i < group * a.head_dim; i += kAttentionThreads) out[i] = from_float<T>(0.f);
    return;
  }
  const ContextSplits context(a, place.position);
  const int blocks = min(context.count, int(gridDim.x));
  if (int(blockIdx.x) >= blocks) return;
  const auto heads_from = [&](int n) { return HeadRange{first_head + n, min(kHeads, group - n)}; };
  const SplitAttention<T, kLanes> attention{.a = a,
                                            .partials = partials,
                                            .context = context,
                                            .shared = shared[0],
                                            .row = row,
                                            .slot = place.slot,
                                            .kv_head = kv_head};
  for (int split = blockIdx.x; split < context.count; split += blocks) {
    for (int n = 0; n < group; n += kHeads) {
      const HeadRange heads = heads_from(n);
      attention.load_query(heads);
      attention.score(split, heads);
      attention.softmax(heads);
      attention.weigh_values(split, heads);
      attention.write_partials(split, heads);
    }
  }
  if (!block_arrives_last(counters + row * a.num_kv_heads + kv_head, blocks)) return;
  const SplitMerge<T, kLanes> splits{.partials = partials, .shared = shared[0], .row = row, .splits = context.count};
  for (int n = 0; n < group; n += kHeads) splits.merge(heads_from(n), out + n * a.head_dim);
}

// The most splits that a row can have, wherever it is
int most_splits(const AttentionArgs& a) {
  const int seen = a.sliding_window > 0 ? std::min<int64_t>(a.sliding_window, a.max_len) : a.max_len;
  int most = 0;
  for (int n : {std::min(seen, 16 * 64), std::min(seen, 16 * 128), seen})
    most = std::max<int>(most, ceil_div(n, split_size(n)));
  return most + (a.sliding_window > 0);  // a window may begin inside of a split
}

}  // namespace

WorkspaceSize decode_attention_workspace(const AttentionArgs& a) {
  const int64_t partials = int64_t(a.rows) * a.num_heads * most_splits(a);
  return {.partials = 0,
          .counters = a.rows * a.num_kv_heads,
          .scratch = partials * (Partials::kValues + a.head_dim) * int64_t(sizeof(float))};
}

void launch_decode_attention(const AttentionArgs& a, const Workspace& workspace, Stream stream) {
  const Partials partials{.memory = static_cast<float*>(workspace.scratch),
                          .heads = a.num_heads,
                          .splits = most_splits(a),
                          .head_dim = a.head_dim};
  const int width = std::max(1, kBlocksPerSm * workspace.blocks / (a.num_kv_heads * a.rows));
  const dim3 grid(std::min(partials.splits, width), a.num_kv_heads, a.rows);
  const bool early = workspace.variants.early_attention && workspace.overlap == Overlap::kPrefetch;
  const LaunchOptions options{.name = "decode_attention", .pdl = workspace.overlap != Overlap::kNone};
  const auto run = [&](auto kernel) {
    launch(kernel, grid, kAttentionThreads, 0, stream, options, a, partials, workspace.counters, early);
  };
  with_16bit_dtype(a.dtype, [&]<class T>() {
    if (a.head_dim <= 64) run(decode_attention_kernel<T, 8>);
    else if (a.head_dim <= 128) run(decode_attention_kernel<T, 16>);
    else run(decode_attention_kernel<T, 32>);
  });
}

}  // namespace river::cuda
