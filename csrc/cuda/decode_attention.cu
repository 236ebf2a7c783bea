// decode_attention: T rows against the cache, grouped queries.
//
// Scope: rows of one step, in any slots. Rows of one slot (drafts that are verified, pieces of a prompt) share one pass
// over its cache: at long contexts that is what the kernel's time is made of, and a pass over 5 rows reads no more than
// one over a single row. They share it if their contexts are cut alike, which is so but for positions 1024 and 2048
// apart (device/slot_rows.cuh).
//
// Work: a block has (a KV head, a slot, splits of the context), for all query heads of the KV head's group and all rows
// of the slot; those of T rows of one slot deal the splits among themselves. How a context is cut depends on a row's
// own position, so that a short one still fills the GPU. The last block of a (slot, KV head) merges the splits of each
// row in order.
//
// Positions are device data, so the grid is fixed, and one that the GPU takes at once: a block goes through the splits
// by the number of blocks of its slot, and one without a split returns. More query heads than fit the registers (a
// group of 16 and 5 rows, say) take further passes.
#include <algorithm>

#include "device/attention.cuh"
#include "device/launch.h"

namespace river::cuda {
namespace {

using namespace device;

// Enough loads under way for the memory; long heads and several tiles of query heads need more registers.
constexpr int blocks_per_sm(int dims, int tiles) { return dims < 256 && tiles == 1 ? 3 : 2; }

// The splits of a slot's rows that a block works on: first, first + step, ... below count
struct BlockSplits {
  int first, step, count;

  RIVER_DEVICE BlockSplits(const SlotRows& rows)
      : first(blockIdx.x * rows.count + rows.rank), step(gridDim.x * rows.count), count(rows.splits()) {}
};

// The K and V of this block's first split, to L2. The places may still be those of the step before: then this asks for
// what may not be needed, inside of the cache. By one warp
RIVER_DEVICE void prefetch_context(const AttentionArgs& a, int row, int kv_head) {
  const auto hint = [&](int t) { return checked_place(a, load_hint(a.slots + t), load_hint(a.positions + t)); };
  const SlotRows rows = slot_rows(a, row, hint, [](int, const RowContext&) {});
  if (rows.count == 0 || lane_id() >= 2) return;  // a lane for K, one for V
  const int split = rows.first_split() + BlockSplits(rows).first;
  const int first = split * rows.size, end = min(first + rows.size, rows.last + 1);
  if (first >= end) return;
  const auto* cache = static_cast<const unsigned char*>(lane_id() == 0 ? a.k_cache : a.v_cache);
  const int64_t place = (int64_t(rows.slot) * a.num_kv_heads + kv_head) * a.max_len + first, bytes = 2 * a.head_dim;
  bulk_prefetch_to_l2(cache + place * bytes, (end - first) * bytes);
}

// The softmax over all splits, for the query heads that the block has taken. What splits say of a query head comes to
// shared memory first; then a thread adds four dims of each of kItems query heads, so that many loads are under way.
template <class T, class Memory>
struct SplitMerge {
  static constexpr int kItems = 2;
  static constexpr int kMerged = kScores / 2;  // splits at a time: there is room for two numbers of each

  const AttentionArgs& a;
  const Partials& partials;
  const SlotRows& rows;
  Memory& shared;
  int queries;

  RIVER_DEVICE void merge() const {
    const int items = queries * (a.head_dim / 4);
    const bool at_once = rows.splits() <= kMerged;
    for (int first = 0; first < rows.splits(); first += kMerged) {
      load_states(first);
      find_largest(first);
    }
    for (int done = 0; done < items; done += kItems * kAttentionThreads) {
      float4 total[kItems] = {};
      for (int first = 0; first < rows.splits(); first += kMerged) {
        if (!at_once) load_states(first);
        if (!at_once || done == 0) find_factors(first, done == 0);
        add_values(first, done, total);
      }
      write(done, total);
    }
    __syncthreads();
  }

 private:
  RIVER_DEVICE int splits_of(int q) const {
    return split_of(shared.of[q].last, rows.size) - split_of(shared.of[q].first, rows.size) + 1;
  }
  RIVER_DEVICE const float* partial(int q, int split) const {
    return partials.at(shared.of[q].row, shared.of[q].head, split);
  }
  RIVER_DEVICE float& largest(int q, int s) const { return shared.score[q][s]; }
  RIVER_DEVICE float& weights(int q, int s) const { return shared.score[q][kMerged + s]; }
  RIVER_DEVICE int count_from(int first) const { return min(kMerged, rows.splits() - first); }

  // Of the splits from `first` on: the largest score and the sum of weights; 0 where there is no such split
  RIVER_DEVICE void load_states(int first) const {
    const int count = count_from(first);
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < queries * count; i += kAttentionThreads) {
      const int q = i / count, s = i % count;
      const bool there = first + s < splits_of(q);
      const float* state = partial(q, there ? first + s : 0);
      largest(q, s) = there ? load_written(state + Partials::kLargest) : -INFINITY;
      weights(q, s) = there ? load_written(state + Partials::kSum) : 0.f;
    }
    __syncthreads();
  }

  RIVER_DEVICE void find_largest(int first) const {
    for (int q = warp_id(); q < queries; q += kAttentionWarps) {
      float most = first == 0 ? -INFINITY : shared.state[q][Partials::kLargest];
      for (int s = lane_id(); s < count_from(first); s += kWarp) most = fmaxf(most, largest(q, s));
      most = warp_max(most);
      __syncwarp();
      if (lane_id() == 0) shared.state[q][Partials::kLargest] = most;
    }
    __syncthreads();
  }

  // The largest scores become factors of what splits say; the first time, the sums of weights are added.
  RIVER_DEVICE void find_factors(int first, bool first_time) const {
    for (int q = warp_id(); q < queries; q += kAttentionWarps) {
      float sum = 0;
      for (int s = lane_id(); s < count_from(first); s += kWarp) {
        const float part = weights(q, s);  // 0: saw nothing
        const float factor = part == 0 ? 0.f : expf(largest(q, s) - shared.state[q][Partials::kLargest]);
        largest(q, s) = factor;
        sum += part * factor;
      }
      sum = warp_sum(sum);
      float& total = shared.state[q][Partials::kSum];
      if (lane_id() == 0 && first_time) total = first == 0 ? sum : total + sum;
    }
    __syncthreads();
  }

  // Adds the values of the same splits, in order.
  RIVER_DEVICE void add_values(int first, int done, float4 (&total)[kItems]) const {
    const int dims = a.head_dim / 4, stride = Partials::kValues + a.head_dim;
    const float* value[kItems];
    int query[kItems], count[kItems];
#pragma unroll
    for (int k = 0; k < kItems; k++) {
      const int i = done + k * kAttentionThreads + threadIdx.x;
      query[k] = min(i / dims, queries - 1);
      count[k] = i < queries * dims ? min(count_from(first), splits_of(query[k]) - first) : 0;
      value[k] = partial(query[k], 0) + int64_t(first) * stride + Partials::kValues + i % dims * 4;
    }
#pragma unroll 8
    for (int s = 0; s < count_from(first); s++)
#pragma unroll
      for (int k = 0; k < kItems; k++) {
        if (s >= count[k]) continue;
        const float4 v = load_written(reinterpret_cast<const float4*>(value[k] + s * stride));
        const float factor = largest(query[k], s);
        total[k].x += factor * v.x, total[k].y += factor * v.y, total[k].z += factor * v.z, total[k].w += factor * v.w;
      }
  }

  RIVER_DEVICE void write(int done, const float4 (&total)[kItems]) const {
    const int dims = a.head_dim / 4;
    for (int k = 0; k < kItems; k++) {
      const int i = done + k * kAttentionThreads + threadIdx.x;
      if (i >= queries * dims) continue;
      const auto query = shared.of[i / dims];
      const float weights = shared.state[i / dims][Partials::kSum];  // 0: the row sees nothing
      const auto average = [&](float value) { return from_float<T>(weights == 0 ? 0.f : value / weights); };
      T* out = static_cast<T*>(a.out) + (int64_t(query.row) * a.num_heads + query.head) * a.head_dim + i % dims * 4;
      reinterpret_cast<uint32_t*>(out)[0] = pair<T>(average(total[k].x), average(total[k].y));
      reinterpret_cast<uint32_t*>(out)[1] = pair<T>(average(total[k].z), average(total[k].w));
    }
  }
};

// Budget: 128 threads, 255 registers
template <class T, int kDims, int kTiles>
__global__ void __launch_bounds__(kAttentionThreads, blocks_per_sm(kDims, kTiles))
    decode_attention_kernel(AttentionArgs a,     // shapes: river.h
                            Partials partials,   // [T, heads, splits, 4 + head_dim]
                            uint32_t* counters,  // [T, kv_heads]
                            bool early) {        // ask L2 for K and V before the kernels ahead have ended
  using Memory = AttentionMemory<kDims, kTiles>;
  RIVER_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<Memory*>(memory);
  const int kv_head = blockIdx.y, own = blockIdx.z, group = a.num_heads / a.num_kv_heads;
  if (warp_id() == 0) {
    if (early) prefetch_context(a, own, kv_head);
    dependency_trigger();  // behind that: the next kernel's weights would stand before K and V in the memory's queue
  }
  dependency_wait();
  const auto place = [&](int t) { return place_in_cache(a, t); };
  const SlotRows rows = slot_rows(a, own, place, [&](int i, const RowContext& context) {
    if (const int t = threadIdx.x; t < kMaxRows)
      shared.row[i] = {.row = t, .head = 0, .first = context.first, .last = context.last};
  });
  if (rows.count == 0) {
    T* out = static_cast<T*>(a.out) + (int64_t(own) * a.num_heads + kv_head * group) * a.head_dim;
    if (blockIdx.x == 0)
      for (int i = threadIdx.x; i < group * a.head_dim; i += kAttentionThreads) out[i] = from_float<T>(0.f);
    return;
  }
  const BlockSplits splits(rows);
  const int blocks = min(splits.count, splits.step);
  if (splits.first >= blocks) return;
  __syncthreads();
  SplitAttention<T, kDims, kTiles> attention{
      .a = a, .partials = partials, .rows = rows, .shared = shared, .kv_head = kv_head};
  for (int first = 0; first < rows.count * group; first += Memory::kQueries) {
    attention.take_queries(first);
    auto keys = attention.first_keys(rows.first_split() + splits.first);  // under way together with the queries
    attention.load_queries();
    for (int i = splits.first; i < splits.count; i += splits.step)
      attention.run(rows.first_split() + i, rows.first_split() + i + splits.step, keys);
  }
  const int leader = shared.row[0].row;
  if (!block_arrives_last(counters + leader * a.num_kv_heads + kv_head, blocks)) return;
  for (int first = 0; first < rows.count * group; first += Memory::kQueries) {
    attention.take_queries(first);
    SplitMerge<T, Memory>{.a = a, .partials = partials, .rows = rows, .shared = shared, .queries = attention.queries}
        .merge();
  }
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
  const bool early = workspace.variants.early_attention && workspace.overlap == Overlap::kPrefetch;
  const LaunchOptions options{.name = "decode_attention", .pdl = workspace.overlap != Overlap::kNone};
  const auto run = [&]<class T, int kDims, int kTiles>() {
    const int width = std::max(1, blocks_per_sm(kDims, kTiles) * workspace.blocks / (a.num_kv_heads * a.rows));
    const dim3 grid(std::min(partials.splits, width), a.num_kv_heads, a.rows);
    launch(decode_attention_kernel<T, kDims, kTiles>, grid, kAttentionThreads, sizeof(AttentionMemory<kDims, kTiles>),
           stream, options, a, partials, workspace.counters, early);
  };
  const bool one_tile = a.rows * (a.num_heads / a.num_kv_heads) <= kColumns;
  const auto with_tiles = [&]<class T, int kDims>() {
    if (one_tile) run.template operator()<T, kDims, 1>();
    else run.template operator()<T, kDims, 5>();
  };
  with_16bit_dtype(a.dtype, [&]<class T>() {
    if (a.head_dim <= 64) with_tiles.template operator()<T, 64>();
    else if (a.head_dim <= 128) with_tiles.template operator()<T, 128>();
    else with_tiles.template operator()<T, 256>();
  });
}

}  // namespace river::cuda
