// sample: tokens from logits, one block per row. The block goes over the row's logits, which lie in L2, several times:
// for the largest, for each cut-off, for the best score of what is kept, and for the sum of all weights.
//
// A cut-off is found by bisection on keys, without sorting. Each step is a pass that sums what lies above the middle;
// it ends once no more tokens than threads are undecided, and then each thread adds up what is ahead of one of them.
// The first "middle" is a good guess: if every thread keeps its largest key, then the k-th largest of those has at
// least k tokens at or above it, and rarely many more. So most cut-offs take two passes, and none takes more than 65.
//
// Sums are whole numbers (sampling.h): neither their order nor the guess changes a result.
#include "../sampling.h"
#include "device/launch.h"
#include "device/types.cuh"

namespace river::cuda {
namespace {

using namespace device;

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kGuessedRank = 256;  // for top_p, of which nobody knows where it cuts

struct Row {
  const float* logits;
  int vocab_size;
  DrawRule rule;
  float largest;  // logit

  RIVER_DEVICE Row(const SampleArgs& a, int t)
      : logits(a.logits + int64_t(t) * a.vocab_size), vocab_size(a.vocab_size),
        rule(load_written(a.temperature + t), load_written(a.top_k + t), load_written(a.top_p + t),
             load_written(a.min_p + t), a.vocab_size),
        largest(0) {}

  // The logits of four tokens from `first` on, a multiple of 4; 0 past the end
  RIVER_DEVICE float4 load(int first) const {
    const float* from = logits + first;
    if (first + 4 <= vocab_size && reinterpret_cast<uintptr_t>(from) % 16 == 0)
      return load_written(reinterpret_cast<const float4*>(from));
    float4 v{};
    if (first < vocab_size) v.x = load_written(from);
    if (first + 1 < vocab_size) v.y = load_written(from + 1);
    if (first + 2 < vocab_size) v.z = load_written(from + 2);
    if (first + 3 < vocab_size) v.w = load_written(from + 3);
    return v;
  }
};

// By all threads: f(first id, four logits) for the whole row. A thread asks for several fours before it looks at one.
template <int kAtOnce, class F>
RIVER_DEVICE void for_each_four(const Row& row, F f) {
  constexpr int kStride = 4 * kThreads;
#pragma unroll 1
  for (int first = 4 * threadIdx.x; first < row.vocab_size; first += kAtOnce * kStride) {
    float4 fours[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) fours[i] = row.load(first + i * kStride);
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) f(first + i * kStride, fours[i]);
  }
}

// f(id, logit) for the whole row
template <class F>
RIVER_DEVICE void for_each_logit(const Row& row, F f) {
  for_each_four<2>(row, [&](int first, const float4& four) {
    const float logits[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (first + i < row.vocab_size) f(first + i, logits[i]);
  });
}

// By all threads, each of which gets the result
template <class Combine>
RIVER_DEVICE uint64_t over_block(uint64_t value, Combine combine) {
  RIVER_SHARED(uint64_t, of_warp, [kWarps]);
  value = over_warp(value, combine);
  __syncthreads();  // nobody reads an earlier result any more
  if (lane_id() == 0) of_warp[warp_id()] = value;
  __syncthreads();
  value = of_warp[0];
#pragma unroll 1
  for (int i = 1; i < kWarps; i++) value = combine(value, of_warp[i]);
  return value;
}

RIVER_DEVICE uint64_t sum_over_block(uint64_t value) {
  return over_block(value, [](uint64_t a, uint64_t b) { return a + b; });
}
RIVER_DEVICE uint64_t largest_over_block(uint64_t value) {
  return over_block(value, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}

// The rank-th largest (from 1) of the threads' keys; 0 where fewer threads have one
RIVER_DEVICE uint64_t ranked(uint64_t key, int rank) {
  RIVER_SHARED(uint64_t, keys, [kThreads]);
  keys[threadIdx.x] = key;
  __syncthreads();
  int larger = 0;
#pragma unroll 4
  for (int i = 0; i < kThreads; i++) larger += keys[i] > key;
  return largest_over_block(larger == rank - 1 ? key : 0);
}

struct Above {
  uint64_t measure, count;
};

// What the tokens with keys above one measure: their weights at the row's temperature, or 1 each; and how many they are
RIVER_DEVICE Above measure_above(const Row& row, bool by_weight, uint64_t key) {
  uint64_t measure = 0;
  uint32_t count = 0;
  for_each_logit(row, [&](int id, float logit) {
    if (token_key(logit, id) <= key) return;
    count++;
    if (by_weight) measure += weight_of(row.rule.scale(logit, row.largest));
  });
  const uint64_t total = sum_over_block(count);
  return {by_weight ? sum_over_block(measure) : total, total};
}

// Where a cut-off lies: the tokens above `low` reach the limit, those above `high` do not.
struct Bounds {
  uint64_t low, high;
  uint64_t tokens;  // above low
};

// Among the tokens above bounds.low, keeps those ahead of which less than the limit is ranked: theirs are the keys
// above the result. The limit is at least 1, and at most what all of them measure. `middle` is tried first if it lies
// between the bounds.
RIVER_DEVICE uint64_t cut_off(const Row& row, bool by_weight, uint64_t limit, Bounds bounds, uint64_t middle) {
  RIVER_SHARED(uint64_t, keys, [kThreads]);
  RIVER_SHARED(uint64_t, measures, [kThreads]);
  RIVER_SHARED(unsigned, listed, [1]);
  Above above_high{0, 0};
#pragma unroll 1
  while (bounds.tokens - above_high.count > kThreads) {
    if (middle <= bounds.low || middle >= bounds.high) middle = bounds.low + (bounds.high - bounds.low) / 2;
    const Above above = measure_above(row, by_weight, middle);
    if (above.measure < limit) {
      bounds.high = middle;
      above_high = above;
    } else {
      bounds.low = middle;
      bounds.tokens = above.count;
    }
  }

  __syncthreads();  // nobody reads an earlier list any more
  if (threadIdx.x == 0) listed[0] = 0;
  __syncthreads();
  for_each_logit(row, [&](int id, float logit) {
    const uint64_t key = token_key(logit, id);
    if (key <= bounds.low || key > bounds.high) return;
    const unsigned i = next_number(listed);
    keys[i] = key;
    measures[i] = by_weight ? weight_of(row.rule.scale(logit, row.largest)) : 1;
  });
  __syncthreads();
  const unsigned count = listed[0];
  const uint64_t mine = threadIdx.x < count ? keys[threadIdx.x] : 0;
  uint64_t before = above_high.measure;
  for (unsigned i = 0; i < count; i++) before += keys[i] > mine ? measures[i] : 0;
  return largest_over_block(mine && before >= limit ? mine : bounds.low);  // the best token that is not kept
}

// What top_k and top_p keep has keys above this. `mine` is the largest key of this thread, `best` that of the row.
RIVER_DEVICE uint64_t filter(const Row& row, uint64_t mine, uint64_t best) {
  const DrawRule& rule = row.rule;
  Bounds bounds{0, best, uint64_t(row.vocab_size)};
  if (!rule.top_k && !rule.top_p) return bounds.low;
  const bool few = rule.top_k && rule.top_k < kGuessedRank;
  const uint64_t guess = ranked(mine, few ? rule.top_k : kGuessedRank) - 1;
  if (rule.top_k) {
    bounds.low = cut_off(row, false, rule.top_k, bounds, guess);
    bounds.tokens = rule.top_k;
  }
  if (rule.top_p) {
    const uint64_t total = measure_above(row, true, bounds.low).measure;
    bounds.low = cut_off(row, true, rule.nucleus_limit(total), bounds, guess);
  }
  return bounds.low;
}

// The key of the best score, of this thread's tokens among those with keys above the cut. Four at once: they share one
// Philox counter. No more are asked for ahead, as the noise takes the registers.
RIVER_DEVICE uint64_t best_score(const Row& row, uint64_t cut, uint64_t seed, int position) {
  uint64_t best = 0;
  for_each_four<1>(row, [&](int first, const float4& four) {
    const float logits[4] = {four.x, four.y, four.z, four.w};
    bool kept[4], any = false;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      kept[i] = first + i < row.vocab_size && token_key(logits[i], first + i) > cut &&
                row.rule.min_p_keeps(logits[i], row.largest);
      any = any || kept[i];
    }
    if (!any) return;
    const PhiloxWords words = words_of_four(seed, position, first);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (!kept[i]) continue;
      const float score = logits[i] / row.rule.temperature + gumbel_of(words.word[i]);
      const uint64_t key = token_key(score, first + i);
      best = key > best ? key : best;
    }
  });
  return best;
}

// Budget: 512 threads, 64 registers, 12560 shared
__global__ void __launch_bounds__(kThreads) sample_kernel(SampleArgs a) {  // shapes: river.h
  dependency_trigger();
  dependency_wait();
  const int t = blockIdx.x;
  Row row(a, t);

  uint64_t mine = 0;
  bool failed = false;
  for_each_logit(row, [&](int id, float logit) {
    failed = failed || !is_finite(logit);
    const uint64_t key = token_key(logit, id);
    mine = key > mine ? key : mine;
  });
  if (__syncthreads_or(failed)) {
    if (threadIdx.x == 0) {
      a.tokens[t] = kNoToken;
      a.logprobs[t] = float_of(0x7fc00000u);
    }
    return;
  }
  const uint64_t best = largest_over_block(mine);
  row.largest = value_of(best);

  uint64_t drawn = best;
  if (!row.rule.greedy) {
    const uint64_t cut = filter(row, mine, best);
    drawn = largest_over_block(best_score(row, cut, load_written(a.seeds + t), load_written(a.positions + t)));
  }

  uint64_t total = 0;
  for_each_logit(row, [&](int, float logit) { total += weight_of(scaled(logit, row.largest, 1.f)); });
  total = sum_over_block(total);
  if (threadIdx.x == 0) {
    const int64_t token = token_of(drawn);
    a.tokens[t] = token;
    a.logprobs[t] = log_probability(load_written(row.logits + token), row.largest, total);
  }
}

}  // namespace

void launch_sample(const SampleArgs& a, const Workspace& workspace, Stream stream) {
  const LaunchOptions options{.name = "sample", .pdl = workspace.overlap != Overlap::kNone};
  launch(sample_kernel, a.rows, kThreads, 0, stream, options, a);
}

}  // namespace river::cuda
