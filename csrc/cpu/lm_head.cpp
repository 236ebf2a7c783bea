// lm_head and lm_head_w4 on a CPU: each thread keeps the best token of its strips, and the best of all is the same
// whoever had which.
#include <cmath>
#include <cstring>
#include <mutex>

#include "../sampling.h"
#include "linear.h"
#include "noise.h"

namespace river::cpu {

namespace {

struct Best {
  float score = -INFINITY, second = -INFINITY;
  int64_t id = 0;
  bool failed = false;  // a logit was not finite

  void offer(float score_, int64_t id_) {  // ties to the lowest id, in whatever order the offers come
    second = std::max(second, std::min(score, score_));
    if (score_ > score || (score_ == score && id_ < id)) score = score_, id = id_;
  }
  void merge(const Best& other) {
    offer(other.score, other.id);
    second = std::max(second, other.second);
    failed |= other.failed;
  }
};

// The strip whose `count` tokens begin at `first`, for row t
void offer_strip(const LmHeadArgs& a, int t, int64_t first, int count, const float (&sums)[kTileRows], Best& best) {
  float logits[kTileRows];
  for (int i = 0; i < kTileRows; i++) logits[i] = sums[i] / a.logits_scaling;
  if (a.logits) memcpy(a.logits + int64_t(t) * a.vocab_size + first, logits, count * sizeof(float));
  for (int i = 0; i < count; i++) best.failed |= !is_finite(logits[i]);
  float noisy[kTileRows];
  const bool sampled = a.temperature && a.temperature[t] > 0;
  if (sampled)
    add_noise(logits, std::max(a.temperature[t], kMinTemperature), uint64_t(a.seeds[t]), a.positions[t], first, noisy);
  const float* scores = sampled ? noisy : logits;
  int any = 0;  // is as good as the second best: in few strips, and this loop is in vectors
  for (int i = 0; i < kTileRows; i++) any |= scores[i] >= best.second;
  if (!any) return;
  for (int i = 0; i < count; i++) best.offer(scores[i], first + i);
}

}  // namespace

void launch_lm_head(const LmHeadArgs& a, const Parallel& parallel) {
  const Rows rows = Rows::all(a.rows);
  const Input input = {.x = {.dtype = a.dtype, .data = a.hidden, .cols = a.hidden_size, .rows = rows},
                       .norm = a.norm,
                       .eps = a.rms_norm_eps};
  const Activations x(input, a.packed, parallel);
  const Weight head{
      .dtype = a.dtype, .packed = a.packed, .data = a.weight, .rows = a.vocab_size, .cols = a.hidden_size};
  Best best[kMaxRows];
  std::mutex mutex;
  parallel(head.strips(), head.grain(), [&](int64_t begin, int64_t end) {
    Best local[kMaxRows];
    StripOut sums;
    for (int64_t s = begin; s < end; s++) {
      head.strip(s, x, 0, {}, sums);
      for (int t = 0; t < a.rows; t++) offer_strip(a, t, s * kTileRows, head.strip_rows(s), sums[t], local[t]);
    }
    std::lock_guard<std::mutex> lock(mutex);
    for (int t = 0; t < a.rows; t++) best[t].merge(local[t]);
  });
  for (int t = 0; t < a.rows; t++) {
    a.tokens[t] = best[t].failed ? kNoToken : best[t].id;
    a.margins[t] = best[t].failed ? 0.f : margin_of(best[t].score, best[t].second);
  }
}

}  // namespace river::cpu
