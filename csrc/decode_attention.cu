// decode_attention: T rows against the cache, grouped queries. A block = (row, KV head, split of the context); splits
// are cut at multiples of kSplit positions, whatever the row. All query heads of the group share each K and V read.
// Softmax state is fp32; the last block of a (row, KV head) merges the splits in order. The grid is fixed at the
// largest number of splits, so that positions may be device data: surplus blocks return.
#include <algorithm>

#include "device/activations.cuh"

namespace river::cuda {
namespace {

using namespace device;

constexpr int kSplit = 256;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kHeads = 4;  // query heads per pass over a split
constexpr int kAhead = 4;  // loads of a lane under way at a time

__host__ __device__ inline int splits_of(int max_len) { return (max_len + kSplit - 1) / kSplit; }

template <class T>
struct AttentionKernelArgs {
  AttentionArgs a;
  float* partials;     // [T, heads, splits, 2 + head_dim]: max, sum, weighted values
  uint32_t* counters;  // [T, kv_heads]

  RIVER_DEVICE float* partial(int row, int head, int split) const {
    return partials + ((int64_t(row) * a.num_heads + head) * splits_of(a.max_len) + split) * (2 + a.head_dim);
  }
};

// kLanes lanes read one position, 8 dims each; a warp reads 32 / kLanes positions at a time.
// Budget: 128 threads, 112 registers
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, 4) decode_attention_kernel(AttentionKernelArgs<T> args) {
  const AttentionArgs& a = args.a;
  constexpr int kPositions = kThreads / kLanes;  // of the block at a time
  RIVER_SHARED(float, query, [kHeads][kLanes * 8]);
  RIVER_SHARED(float, weight, [kHeads][kSplit]);
  RIVER_SHARED(float, value, [kHeads][kWarps][kLanes * 8]);
  RIVER_SHARED(float, state, [kHeads][2]);
  RIVER_SHARED(int, last_block, [1]);
  const int split = blockIdx.x, kv_head = blockIdx.y, row = blockIdx.z, group = a.num_heads / a.num_kv_heads;
  const int part = threadIdx.x % kLanes, offset = threadIdx.x / kLanes, dim = part * 8;
  const bool in_head = dim < a.head_dim;
  dependency_trigger();
  dependency_wait();
  const int position = a.positions[row], slot = slot_in_cache(a, row);
  T* out = static_cast<T*>(a.out) + (int64_t(row) * a.num_heads + kv_head * group) * a.head_dim;
  if (slot < 0) {
    if (split == 0)
      for (int i = threadIdx.x; i < group * a.head_dim; i += kThreads) out[i] = from_float<T>(0.f);
    return;
  }
  const int first = a.sliding_window > 0 ? max(int64_t(0), position - a.sliding_window + 1) : 0;
  const int first_split = first / kSplit, end_split = position / kSplit + 1;
  if (split < first_split || split >= end_split) return;
  const int64_t base = (int64_t(slot) * a.num_kv_heads + kv_head) * a.max_len;
  const T* k_cache = static_cast<const T*>(a.k_cache) + base * a.head_dim;
  const T* v_cache = static_cast<const T*>(a.v_cache) + base * a.head_dim;
  auto seen = [&](int p) {
    return p >= first && p <= position && (!a.kv_valid || a.kv_valid[int64_t(slot) * a.max_len + p]);
  };
  // This lane's dims of kAhead of its positions, i0, i0 + kPositions, ...: all under way before the first is looked at
  auto load_ahead = [&](const T* cache, int i0, uint4 (&out)[kAhead], bool (&valid)[kAhead]) {
#pragma unroll
    for (int n = 0; n < kAhead; n++) {
      const int p = split * kSplit + i0 + n * kPositions;
      valid[n] = seen(p);
      out[n] = valid[n] && in_head ? load_activations(cache + int64_t(p) * a.head_dim + dim) : uint4{};
    }
  };

  for (int head0 = 0; head0 < group; head0 += kHeads) {
    const int heads = min(kHeads, group - head0);
    const T* source = static_cast<const T*>(a.query) + (int64_t(row) * a.num_heads + kv_head * group + head0) * a.head_dim;
    for (int i = threadIdx.x; i < heads * a.head_dim; i += kThreads)
      query[i / a.head_dim][i % a.head_dim] = to_float(source[i]) * a.softmax_scale;
    __syncthreads();

    // scores of the split's positions
    for (int i0 = offset; i0 < kSplit; i0 += kAhead * kPositions) {
      uint4 ahead[kAhead];
      bool valid[kAhead];
      load_ahead(k_cache, i0, ahead, valid);
#pragma unroll
      for (int n = 0; n < kAhead; n++) {
        float k[8], score[kHeads] = {};
        unpack<T>(ahead[n], k);
        if (in_head) {
#pragma unroll
          for (int h = 0; h < kHeads; h++)
            for (int j = 0; j < 8; j++) score[h] += k[j] * query[h][dim + j];
        }
        for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
          for (int h = 0; h < kHeads; h++) score[h] += shuffle_xor(score[h], lanes);
        for (int h = 0; h < kHeads; h++)
          if (part == 0 && h < heads) weight[h][i0 + n * kPositions] = valid[n] ? score[h] : -INFINITY;
      }
    }
    __syncthreads();

    // one warp per head: max, weights, sum
    for (int h = warp_id(); h < heads; h += kWarps) {
      float largest = -INFINITY, sum = 0;
      for (int i = lane_id(); i < kSplit; i += kWarp) largest = fmaxf(largest, weight[h][i]);
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) largest = fmaxf(largest, shuffle_xor(largest, lanes));
      for (int i = lane_id(); i < kSplit; i += kWarp) {
        const float w = weight[h][i] == -INFINITY ? 0.f : expf(weight[h][i] - largest);
        weight[h][i] = w;
        sum += w;
      }
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
      if (lane_id() == 0) state[h][0] = largest, state[h][1] = sum;
    }
    __syncthreads();

    // weighted values: each lane its 8 dims over its positions, then over the lanes and the warps
    float sum[kHeads][8] = {};
    for (int i0 = offset; i0 < kSplit; i0 += kAhead * kPositions) {
      uint4 ahead[kAhead];
      bool valid[kAhead];
      load_ahead(v_cache, i0, ahead, valid);
#pragma unroll
      for (int n = 0; n < kAhead; n++) {
        if (!valid[n] || !in_head) continue;
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
        if (lane_id() < kLanes) value[h][warp_id()][dim + j] = sum[h][j];
      }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * a.head_dim; i += kThreads) {
      const int h = i / a.head_dim, d = i % a.head_dim;
      float total = 0;
      for (int warp = 0; warp < kWarps; warp++) total += value[h][warp][d];
      float* partial = args.partial(row, kv_head * group + head0 + h, split);
      partial[2 + d] = total;
      if (d < 2) partial[d] = state[h][d];
    }
    __syncthreads();
  }

  // the last of the row's blocks merges its splits
  const int splits = end_split - first_split;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last_block[0] = atomicInc(args.counters + row * a.num_kv_heads + kv_head, splits - 1) == unsigned(splits - 1);
    __threadfence();
  }
  __syncthreads();
  if (!last_block[0]) return;
  for (int i = threadIdx.x; i < group * a.head_dim; i += kThreads) {
    const int head = kv_head * group + i / a.head_dim, d = i % a.head_dim;
    auto read = [&](int s, int what) { return load_shared_between_blocks(args.partial(row, head, s) + what); };
    float largest = -INFINITY, sum = 0, total = 0;
    for (int s = first_split; s < end_split; s++) largest = fmaxf(largest, read(s, 0));
    for (int s = first_split; s < end_split; s++) {
      if (read(s, 1) == 0) continue;  // saw nothing
      const float factor = expf(read(s, 0) - largest);
      sum += read(s, 1) * factor;
      total += read(s, 2 + d) * factor;
    }
    out[i] = from_float<T>(sum == 0 ? 0.f : total / sum);
  }
}

}  // namespace

WorkspaceSize decode_attention_workspace(const AttentionArgs& a) {
  return {0, a.rows * a.num_kv_heads, 4 * int64_t(a.rows) * a.num_heads * splits_of(a.max_len) * (2 + a.head_dim)};
}

void launch_decode_attention(const AttentionArgs& a, const Workspace& workspace, Stream stream) {
  with_16bit_dtype(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const AttentionKernelArgs<T> args{a, static_cast<float*>(workspace.scratch), workspace.counters};
    const dim3 grid(splits_of(a.max_len), a.num_kv_heads, a.rows);
    auto run = [&](auto kernel) {
      launch(kernel, grid, kThreads, 0, stream, {"decode_attention", workspace.overlap != Overlap::kNone}, args);
    };
    if (a.head_dim <= 64) run(decode_attention_kernel<T, 8>);
    else if (a.head_dim <= 128) run(decode_attention_kernel<T, 16>);
    else run(decode_attention_kernel<T, 32>);
  });
}

}  // namespace river::cuda
