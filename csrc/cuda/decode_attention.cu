// decode_attention: T rows against the cache, grouped queries. A block = (row, KV head, split of the context); how a
// context is cut depends on the row's own position, so that a short one still fills the GPU. All query heads of the group
// share each K and V read. Softmax state is fp32; the last block of a (row, KV head) merges the splits in order. The grid
// is fixed, so that positions may be device data, and one that the GPU takes at once: a block goes through the splits by
// the grid's width, and a block without a split returns.
#include <algorithm>

#include "device/cache_places.cuh"
#include "device/launch.h"

namespace river::cuda {
namespace {

using namespace device;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kHeads = 4;        // query heads per pass over a split
constexpr int kAhead = 4;        // loads of a lane under way at a time
constexpr int kMaxSplit = 256;   // positions
constexpr int kBlocksPerSm = 3;  // enough loads under way for the memory

// Positions of a split: 16 splits, from 64 positions each on, up to kMaxSplit; then more splits
__host__ __device__ inline int split_size(int seen) {
  return seen <= 16 * 64 ? 64 : seen <= 16 * 128 ? 128 : kMaxSplit;
}

// Of any row
inline int most_splits(const AttentionArgs& a) {
  const int seen = a.sliding_window > 0 ? std::min<int64_t>(a.sliding_window, a.max_len) : a.max_len;
  int most = 0;
  for (int n : {std::min(seen, 16 * 64), std::min(seen, 16 * 128), seen})
    most = std::max<int>(most, ceil_div(n, split_size(n)));
  return most + (a.sliding_window > 0);  // a window may begin inside of a split
}

// The splits of one row; they begin at multiples of their size
struct ContextSplits {
  int first, position;  // seen, both included
  int size, start, count;
  RIVER_DEVICE ContextSplits(const AttentionArgs& a, int position)
      : first(a.sliding_window > 0 ? max(int64_t(0), position - a.sliding_window + 1) : 0), position(position),
        size(split_size(position - first + 1)), start(first / size * size), count((position - start) / size + 1) {}
};

template <class T>
struct AttentionKernelArgs {
  AttentionArgs a;
  int most_splits;
  float* partials;     // [T, heads, splits, 2 + head_dim]: max, sum, weighted values
  uint32_t* counters;  // [T, kv_heads]

  RIVER_DEVICE float* partial(int row, int head, int split) const {
    return partials + ((int64_t(row) * a.num_heads + head) * most_splits + split) * (2 + a.head_dim);
  }
};

// What one block works on: the shared memory of kHeads query heads, and where its K and V lie.
// kLanes lanes read one position, 8 dims each; a warp reads 32 / kLanes positions at a time.
template <class T, int kLanes>
struct SplitAttention {
  static constexpr int kPositions = kThreads / kLanes;  // of the block at a time

  const AttentionKernelArgs<T>& args;
  const ContextSplits& context;
  int row, slot, kv_head, begin;  // begin: first position of the split
  float (&query)[kHeads][kLanes * 8];
  float (&weight)[kHeads][kMaxSplit];
  float (&value)[kHeads][kWarps][kLanes * 8];
  float (&state)[kHeads][2];

  RIVER_DEVICE int offset() const { return threadIdx.x / kLanes; }
  RIVER_DEVICE int dim() const { return threadIdx.x % kLanes * 8; }
  RIVER_DEVICE bool in_head() const { return dim() < args.a.head_dim; }
  RIVER_DEVICE int first_head(int head0) const { return kv_head * (args.a.num_heads / args.a.num_kv_heads) + head0; }

  RIVER_DEVICE bool seen(int p) const {
    const AttentionArgs& a = args.a;
    return p >= context.first && p <= context.position && (!a.kv_valid || a.kv_valid[int64_t(slot) * a.max_len + p]);
  }

  // This lane's dims of kAhead of its positions, i0, i0 + kPositions, ...: all under way before the first is looked at
  RIVER_DEVICE void load_ahead(const void* cache, int i0, uint4 (&out)[kAhead], bool (&valid)[kAhead]) const {
    const AttentionArgs& a = args.a;
    const T* head = static_cast<const T*>(cache) + (int64_t(slot) * a.num_kv_heads + kv_head) * a.max_len * a.head_dim;
#pragma unroll
    for (int n = 0; n < kAhead; n++) {
      const int p = begin + i0 + n * kPositions;
      valid[n] = seen(p);
      out[n] = valid[n] && in_head() ? load_activations(head + int64_t(p) * a.head_dim + dim()) : uint4{};
    }
  }

  RIVER_DEVICE void load_query(int head0, int heads) const {
    const AttentionArgs& a = args.a;
    const T* source = static_cast<const T*>(a.query) + (int64_t(row) * a.num_heads + first_head(head0)) * a.head_dim;
    for (int i = threadIdx.x; i < heads * a.head_dim; i += kThreads)
      query[i / a.head_dim][i % a.head_dim] = to_float(load_written(source + i)) * a.softmax_scale;
    __syncthreads();
  }

  RIVER_DEVICE void scores(int heads) const {
    for (int i0 = offset(); i0 < context.size; i0 += kAhead * kPositions) {
      uint4 ahead[kAhead];
      bool valid[kAhead];
      load_ahead(args.a.k_cache, i0, ahead, valid);
#pragma unroll
      for (int n = 0; n < kAhead; n++) {
        float k[8], score[kHeads] = {};
        unpack<T>(ahead[n], k);
        if (in_head()) {
#pragma unroll
          for (int h = 0; h < kHeads; h++)
            for (int j = 0; j < 8; j++) score[h] += k[j] * query[h][dim() + j];
        }
        for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
          for (int h = 0; h < kHeads; h++) score[h] += shuffle_xor(score[h], lanes);
        for (int h = 0; h < kHeads; h++)
          if (dim() == 0 && h < heads) weight[h][i0 + n * kPositions] = valid[n] ? score[h] : -INFINITY;
      }
    }
    __syncthreads();
  }

  // One warp per head: max, weights, sum
  RIVER_DEVICE void softmax(int heads) const {
    for (int h = warp_id(); h < heads; h += kWarps) {
      float largest = -INFINITY, sum = 0;
      for (int i = lane_id(); i < context.size; i += kWarp) largest = fmaxf(largest, weight[h][i]);
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) largest = fmaxf(largest, shuffle_xor(largest, lanes));
      for (int i = lane_id(); i < context.size; i += kWarp) {
        const float w = weight[h][i] == -INFINITY ? 0.f : expf(weight[h][i] - largest);
        weight[h][i] = w;
        sum += w;
      }
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
      if (lane_id() == 0) state[h][0] = largest, state[h][1] = sum;
    }
    __syncthreads();
  }

  // Weighted values: each lane its 8 dims over its positions, then over the lanes and the warps
  RIVER_DEVICE void values(int heads) const {
    float sum[kHeads][8] = {};
    for (int i0 = offset(); i0 < context.size; i0 += kAhead * kPositions) {
      uint4 ahead[kAhead];
      bool valid[kAhead];
      load_ahead(args.a.v_cache, i0, ahead, valid);
#pragma unroll
      for (int n = 0; n < kAhead; n++) {
        if (!valid[n] || !in_head()) continue;
        float v[8];
        unpack<T>(ahead[n], v);
        for (int h = 0; h < kHeads; h++) {
          const float w = h < heads ? weight[h][i0 + n * kPositions] : 0.f;
          for (int j = 0; j < 8; j++) sum[h][j] += w * v[j];
        }
      }
    }
    for (int h = 0; h < kHeads; h++)
      for (int j = 0; j < 8; j++) {
        for (int lanes = kWarp / 2; lanes >= kLanes; lanes /= 2) sum[h][j] += shuffle_xor(sum[h][j], lanes);
        if (lane_id() < kLanes) value[h][warp_id()][dim() + j] = sum[h][j];
      }
    __syncthreads();
  }

  RIVER_DEVICE void write_partials(int split, int head0, int heads) const {
    const int head_dim = args.a.head_dim;
    for (int i = threadIdx.x; i < heads * head_dim; i += kThreads) {
      const int h = i / head_dim, d = i % head_dim;
      float total = 0;
      for (int warp = 0; warp < kWarps; warp++) total += value[h][warp][d];
      float* partial = args.partial(row, first_head(head0) + h, split);
      partial[2 + d] = total;
      if (d < 2) partial[d] = state[h][d];
    }
    __syncthreads();
  }

  RIVER_DEVICE float partial(int head0, int h, int split, int what) const {
    return load_written(args.partial(row, first_head(head0) + h, split) + what);
  }

  // Sums of all splits for kHeads query heads, kMaxSplit splits at a time: their factors by a warp per head, then each
  // thread its dims of all heads, so that many loads are under way.
  RIVER_DEVICE void merge(int head0, int heads, T* out) const {
    constexpr int kDims = (kLanes * 8 + kThreads - 1) / kThreads;  // of a thread
    float total[kHeads][kDims] = {}, sum = 0, largest = -INFINITY;
    if (warp_id() < heads)  // kWarps = kHeads: warp h has head h
      for (int s = lane_id(); s < context.count; s += kWarp) largest = fmaxf(largest, partial(head0, warp_id(), s, 0));
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) largest = fmaxf(largest, shuffle_xor(largest, lanes));
    for (int s0 = 0; s0 < context.count; s0 += kMaxSplit) {
      const int splits = min(kMaxSplit, context.count - s0);
      if (warp_id() < heads)
        for (int s = lane_id(); s < splits; s += kWarp) {
          const float part = partial(head0, warp_id(), s0 + s, 1);  // 0: saw nothing
          const float factor = part == 0 ? 0.f : expf(partial(head0, warp_id(), s0 + s, 0) - largest);
          weight[warp_id()][s] = factor;
          sum += part * factor;
        }
      __syncthreads();
#pragma unroll 4
      for (int s = 0; s < splits; s++)
#pragma unroll
        for (int h = 0; h < kHeads; h++)
#pragma unroll
          for (int i = 0; i < kDims; i++)
            if (const int d = threadIdx.x + i * kThreads; h < heads && d < args.a.head_dim)
              total[h][i] += weight[h][s] * partial(head0, h, s0 + s, 2 + d);
      __syncthreads();
    }
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
    if (lane_id() == 0) state[warp_id()][1] = sum;
    __syncthreads();
    for (int h = 0; h < heads; h++)
      for (int i = 0; i < kDims; i++)
        if (const int d = threadIdx.x + i * kThreads; d < args.a.head_dim)
          out[(head0 + h) * args.a.head_dim + d] = from_float<T>(state[h][1] == 0 ? 0.f : total[h][i] / state[h][1]);
    __syncthreads();
  }
};

// The K and V of this block's first split, to L2. The places may still be those of the step before: then this asks for
// what may not be needed, inside of the cache.
RIVER_DEVICE void prefetch_context(const AttentionArgs& a, int row, int kv_head) {
  if (threadIdx.x >= 2) return;
  const int slot = load_hint(a.slots + row), position = load_hint(a.positions + row);
  if (slot < 0 || slot >= a.num_slots || position < 0 || position >= a.max_len) return;
  const ContextSplits context(a, position);
  const int first = context.start + blockIdx.x * context.size, end = min(first + context.size, position + 1);
  if (first >= end) return;
  const auto* cache = static_cast<const unsigned char*>(threadIdx.x == 0 ? a.k_cache : a.v_cache);
  const int64_t place = (int64_t(slot) * a.num_kv_heads + kv_head) * a.max_len + first, bytes = 2 * a.head_dim;
  bulk_prefetch_to_l2(cache + place * bytes, (end - first) * bytes);
}

// Budget: 128 threads, 168 registers
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    decode_attention_kernel(AttentionKernelArgs<T> args, bool early) {
  static_assert(kWarps == kHeads);
  RIVER_SHARED(float, query, [kHeads][kLanes * 8]);
  RIVER_SHARED(float, weight, [kHeads][kMaxSplit]);
  RIVER_SHARED(float, value, [kHeads][kWarps][kLanes * 8]);
  RIVER_SHARED(float, state, [kHeads][2]);
  const AttentionArgs& a = args.a;
  const int kv_head = blockIdx.y, row = blockIdx.z, group = a.num_heads / a.num_kv_heads;
  if (warp_id() == 0) {
    if (early) prefetch_context(a, row, kv_head);
    dependency_trigger();  // behind that: the next kernel's weights would stand before K and V in the memory's queue
  }
  dependency_wait();
  const Place place = place_in_cache(a, row);
  T* out = static_cast<T*>(a.out) + (int64_t(row) * a.num_heads + kv_head * group) * a.head_dim;
  if (!place.active()) {
    if (blockIdx.x == 0)
      for (int i = threadIdx.x; i < group * a.head_dim; i += kThreads) out[i] = from_float<T>(0.f);
    return;
  }
  const ContextSplits context(a, place.position);
  SplitAttention<T, kLanes> attention{args, context, row, place.slot, kv_head, 0, query, weight, value, state};
  const int blocks = min(context.count, static_cast<int>(gridDim.x));
  if (int(blockIdx.x) >= blocks) return;
  for (int split = blockIdx.x; split < context.count; split += blocks) {
    attention.begin = context.start + split * context.size;
    for (int head0 = 0; head0 < group; head0 += kHeads) {
      const int heads = min(kHeads, group - head0);
      attention.load_query(head0, heads);
      attention.scores(heads);
      attention.softmax(heads);
      attention.values(heads);
      attention.write_partials(split, head0, heads);
    }
  }
  if (!block_arrives_last(args.counters + row * a.num_kv_heads + kv_head, blocks)) return;
  for (int head0 = 0; head0 < group; head0 += kHeads) attention.merge(head0, min(kHeads, group - head0), out);
}

}  // namespace

WorkspaceSize decode_attention_workspace(const AttentionArgs& a) {
  return {0, a.rows * a.num_kv_heads, 4 * int64_t(a.rows) * a.num_heads * most_splits(a) * (2 + a.head_dim)};
}

void launch_decode_attention(const AttentionArgs& a, const Workspace& workspace, Stream stream) {
  with_16bit_dtype(a.dtype, [&]<class T>() {
    const AttentionKernelArgs<T> args{a, most_splits(a), static_cast<float*>(workspace.scratch), workspace.counters};
    const int width = std::max(1, kBlocksPerSm * workspace.blocks / (a.num_kv_heads * a.rows));
    const dim3 grid(std::min(args.most_splits, width), a.num_kv_heads, a.rows);
    auto run = [&](auto kernel) {
      launch(kernel, grid, kThreads, 0, stream, {"decode_attention", workspace.overlap != Overlap::kNone}, args,
             workspace.variants.early_attention && workspace.overlap == Overlap::kPrefetch);
    };
    if (a.head_dim <= 64) run(decode_attention_kernel<T, 8>);
    else if (a.head_dim <= 128) run(decode_attention_kernel<T, 16>);
    else run(decode_attention_kernel<T, 32>);
  });
}

}  // namespace river::cuda
