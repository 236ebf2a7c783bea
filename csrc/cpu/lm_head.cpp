// lm_head on a CPU: each thread keeps the best token of its strips, and the best of all is the same whoever had which.
#include <cmath>
#include <mutex>

#include "noise.h"
#include "strips.h"

namespace river::cpu {

namespace {

struct Best {
  float score = -INFINITY;
  int64_t id = 0;
  bool failed = false;  // a logit was not finite

  void offer(float score_, int64_t id_) {  // ties to the lowest id, in whatever order the offers come
    if (score_ > score || (score_ == score && id_ < id)) score = score_, id = id_;
  }
};

bool all_finite(const float (&logits)[kTileRows], int count) {
  uint32_t failed = 0;
  for (int i = 0; i < count; i++) failed |= (bits_of(logits[i]) & 0x7f800000u) == 0x7f800000u;
  return !failed;
}

}  // namespace

void launch_lm_head(const LmHeadArgs& a, const Parallel& parallel) {
  Activations x(a.dtype, false, a.rows, a.hidden_size);
  auto y = scratch<char>(a.hidden_size * size_of(a.dtype));
  for (int t = 0; t < a.rows; t++) {
    kernels().rms_norm(a.dtype, at(a.hidden, a.dtype, (int64_t)t * a.hidden_size), a.norm, a.rms_norm_eps,
                       a.hidden_size, y.get());
    x.set(t, y.get());
  }
  Best best[kMaxRows];
  std::mutex mutex;
  const Weight head{a.dtype, false, a.weight, a.vocab_size, a.hidden_size};
  parallel(head.strips(), head.grain(), [&](int64_t begin, int64_t end) {
    Best local[kMaxRows];
    StripOut logits;
    for (int64_t s = begin; s < end; s++) {
      const int64_t first = s * kTileRows;
      const int count = (int)std::min<int64_t>(kTileRows, a.vocab_size - first);
      head.strip(s, x.operand(), logits);
      for (int t = 0; t < a.rows; t++) {
        if (a.logits) memcpy(a.logits + (int64_t)t * a.vocab_size + first, logits[t], count * sizeof(float));
        local[t].failed |= !all_finite(logits[t], count);
        float noisy[kTileRows];
        const bool sampled = a.temperature && a.temperature[t] > 0;
        if (sampled)
          add_noise(logits[t], std::max(a.temperature[t], kMinTemperature), (uint64_t)a.seeds[t], a.positions[t], first,
                    noisy);
        const float* scores = sampled ? noisy : logits[t];
        for (int i = 0; i < count; i++) local[t].offer(scores[i], first + i);
      }
    }
    std::lock_guard<std::mutex> lock(mutex);
    for (int t = 0; t < a.rows; t++) {
      best[t].offer(local[t].score, local[t].id);
      best[t].failed |= local[t].failed;
    }
  });
  for (int t = 0; t < a.rows; t++) a.tokens[t] = best[t].failed ? kNoToken : best[t].id;
}

}  // namespace river::cpu
