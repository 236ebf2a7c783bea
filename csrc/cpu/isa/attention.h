// Attention of the query heads of one KV head: the softmax state of one split of the context, and the merge of splits.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using river::DType;
using river::kMaxGroup;
using river::cpu::AttentionState;
using river::cpu::kSplit;
using river::cpu::SplitArgs;

// 16 values of a head from index i, zero past head_dim. bf16 comes piece by piece: GCC would take a whole vector
// through memory.
template <DType D>
inline Values load_head(const void* head, int i, int head_dim) {
  if (i + 16 > head_dim) return load_tail(D, head, i, head_dim);
  if constexpr (D != DType::kBFloat16 || kPieces == 1) return load_as_float(D, head, i);
  using Half = uint16_t __attribute__((vector_size(kPieceBytes / 2)));
  Values v;
  RIVER_UNROLL for (int j = 0; j < kPieces; j++) {
    const auto half = load<Half>(static_cast<const uint16_t*>(head) + i + 16 / kPieces * j);
    v.piece[j] = Piece(__builtin_convertvector(half, WordPiece) << 16);
  }
  return v;
}

using Weights = float[kMaxGroup][kSplit];  // of each query head and position of a split

constexpr int kHeads = 4;                // query heads at a time, and
constexpr int kBeside = kSums / kHeads;  // positions (scores) or vectors of 16 values beside them

// weight[g][p] = query head g . k of position p
template <DType D>
void score(const SplitArgs a, Weights& weight) {
  const int padded = int(river::round_up(a.head_dim, 16));
  for (int p0 = 0; p0 < a.count; p0 += kBeside) {
    const char* head[kBeside];
    for (int p = 0; p < kBeside; p++)  // past the end: the last one again
      head[p] = static_cast<const char*>(a.k) +
                a.positions[p0 + p < a.count ? p0 + p : a.count - 1] * int64_t(a.head_dim) * river::size_of(D);
    for (int g0 = 0; g0 < a.group; g0 += kHeads) {
      const float* q[kHeads];
      for (int g = 0; g < kHeads; g++) q[g] = a.queries + (g0 + g < a.group ? g0 + g : a.group - 1) * padded;
      Sum sums[kSums];
      for (int i = 0; i < padded; i += 16) RIVER_UNROLL for (int p = 0; p < kBeside; p++) {
          const Values key = load_head<D>(head[p], i, a.head_dim);
          RIVER_UNROLL for (int g = 0; g < kHeads; g++) sums[p * kHeads + g].add(key, load<f32x16>(q[g] + i));
        }
      float dot[kSums];
      reduce_each(sums, dot);
      for (int p = 0; p < kBeside && p0 + p < a.count; p++)
        for (int g = 0; g < kHeads && g0 + g < a.group; g++) weight[g0 + g][p0 + p] = dot[p * kHeads + g];
    }
  }
}

// Scores become weights, exp(score - max), zero past the last position up to a whole vector; max and sum go to the
// states. Inline by force: where this is a function of its own, GCC spills the sums of weigh, a quarter slower.
[[gnu::always_inline]] inline void soften(const SplitArgs a, Weights& weight) {
  static_assert(kSplit % 16 == 0);
  for (int g = 0; g < a.group; g++) {
    float max = weight[g][0];
    for (int p = 1; p < a.count; p++) max = weight[g][p] > max ? weight[g][p] : max;
    for (int p = a.count; p % 16 != 0; p++) weight[g][p] = -__builtin_inff();
    if (max == -__builtin_inff()) max = 0;  // all weights are then 0, and merge skips the split
    f32x16 sum{};
    for (int p = 0; p < a.count; p += 16) {
      const f32x16 e = vexp(load<f32x16>(weight[g] + p) - max);
      store(weight[g] + p, e);
      sum += e;
    }
    a.out[g * a.stride].max = max;
    a.out[g * a.stride].sum = reduce(sum);
  }
}

// The weighted values of each query head: the sum over the positions p of weight[g][p] * v
template <DType D>
void weigh(const SplitArgs a, const Weights& weight) {
  const int padded = int(river::round_up(a.head_dim, 16));
  for (int i0 = 0; i0 < padded; i0 += 16 * kBeside)
    for (int g0 = 0; g0 < a.group; g0 += kHeads) {
      const float* w[kHeads];
      for (int g = 0; g < kHeads; g++) w[g] = weight[g0 + g < a.group ? g0 + g : a.group - 1];
      Sum sums[kSums];
      for (int p = 0; p < a.count; p++) {
        const char* head = static_cast<const char*>(a.v) + a.positions[p] * int64_t(a.head_dim) * river::size_of(D);
        RIVER_UNROLL for (int j = 0; j < kBeside; j++) {
          if (i0 + 16 * j >= padded) continue;
          const Values value = load_head<D>(head, i0 + 16 * j, a.head_dim);
          RIVER_UNROLL for (int g = 0; g < kHeads; g++) sums[g * kBeside + j].add(value, w[g][p]);
        }
      }
      for (int g = 0; g < kHeads && g0 + g < a.group; g++)
        for (int j = 0; j < kBeside && i0 + 16 * j < padded; j++)
          store(a.out[(g0 + g) * a.stride].value + i0 + 16 * j, sums[g * kBeside + j].all());
    }
}

// Two passes over the split: the scores of all positions, then the weighted values
template <DType D>
void attend_as(const SplitArgs a) {
  alignas(64) Weights weight;
  score<D>(a, weight);
  soften(a, weight);
  weigh<D>(a, weight);
}

void attend(const SplitArgs& a) {
  with_dtype(a.dtype, [&]<DType D>() { attend_as<D>(a); });
}

// Merges the states of all splits of one query head in order. The largest score of all scales them, so that no exp
// overflows.
void merge(const AttentionState* splits, int count, int head_dim, float* out) {
  const int padded = int(river::round_up(head_dim, 16));
  float max = -__builtin_inff(), sum = 0;
  for (int s = 0; s < count; s++)
    if (splits[s].sum > 0 && splits[s].max > max) max = splits[s].max;
  memset(out, 0, padded * sizeof(float));
  for (int s = 0; s < count; s++) {
    const AttentionState& split = splits[s];
    if (split.sum == 0) continue;  // saw nothing; NaN scores give a NaN sum and go on
    const float factor = vexp(splat(split.max - max))[0];
    sum += split.sum * factor;
    for (int i = 0; i < padded; i += 16) store(out + i, load<f32x16>(out + i) + load<f32x16>(split.value + i) * factor);
  }
  if (sum == 0) return;
  for (int i = 0; i < padded; i += 16) store(out + i, load<f32x16>(out + i) / sum);
}

}  // namespace
