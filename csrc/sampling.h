// What river::sample computes with, written once for CPU and GPU, so that both draw the same tokens and give the same
// log-probabilities, bit for bit. The Python twin is reference.sample.
//
// A sum of fp32 numbers depends on its order, and a parallel sum has no order. So a probability here is a whole number,
// exp(logit - largest) in units of 2^-40, rounded down: the largest logit weighs 2^40. Sums of whole numbers are exact,
// whoever adds what and when, and so is every comparison with a limit. The weights of 2^23 tokens fit into 64 bits.
// What rounding takes is less than 2^-40 a token, of a sum of at least 1: nothing that fp32 could show in a vocabulary.
//
// Tokens are ranked by 64-bit keys, the logit and then the lower id, of which no two are equal. A filter is a cut-off:
// it keeps the tokens with keys above it.
#pragma once

#include "philox.h"

namespace river {

constexpr int kMaxSampledVocab = 1 << 23;
constexpr int kWeightBits = 40;

RIVER_BOTH inline bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

// By how much the best score of a row exceeds the second best one, -infinity if there is none. 0 if both are infinite.
RIVER_BOTH inline float margin_of(float best, float second) { return best == second ? 0.f : best - second; }

// Larger for larger values, then for lower ids; 0 is below every key. No NaN has one; infinite scores do.
RIVER_BOTH inline uint64_t token_key(float value, uint32_t id) {
  const uint32_t bits = bits_of(value + 0.f);  // -0 and 0 are equal
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t(ordered) << 32 | (0xffffffffu - id);
}

RIVER_BOTH inline int64_t token_of(uint64_t key) { return 0xffffffffu - uint32_t(key); }

RIVER_BOTH inline float value_of(uint64_t key) {
  const uint32_t ordered = uint32_t(key >> 32);
  return float_of(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// The bits of e^x for x <= 0, within 2 ulp; the polynomial is that of Cephes' expf. Below -32 it is e^-32, whose weight
// is 0 already. Never more than 1, and exactly 1 for 0. No branches, so that loops vectorise.
RIVER_BOTH inline uint32_t exp_bits(float x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x > -32.f ? x : -32.f;
  const float shifted = product(clamped, 1.44269504f) + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - product(n, 0.693359375f)) + product(n, 2.12194440e-4f);
  float p = product(r, 1.9875691500e-4f) + 1.3981999507e-3f;
  p = product(p, r) + 8.3334519073e-3f;
  p = product(p, r) + 4.1665795894e-2f;
  p = product(p, r) + 1.6666665459e-1f;
  p = product(p, r) + 5.0000001201e-1f;
  p = (product(product(p, r), r) + r) + 1.f;
  return bits_of(p) + ((bits_of(shifted) - bits_of(kRound)) << 23);
}

// A float from 2^-62 to 1, by its bits, in units of 2^-40
RIVER_BOTH inline uint64_t fixed_point(uint32_t bits) {
  const uint64_t mantissa = (bits & 0x7fffffu) | 0x800000u;
  return mantissa << (kWeightBits - 23) >> (127u - (bits >> 23));
}

// (logit - largest) / temperature. The difference comes first: what it overflows to is -infinity, not NaN. Rounding
// keeps the order of the logits.
RIVER_BOTH inline float scaled(float logit, float largest, float temperature) {
  return (logit - largest) / temperature;
}

RIVER_BOTH inline uint64_t weight_of(float scaled_logit) { return fixed_point(exp_bits(scaled_logit)); }

// log softmax of a logit, from the sum of all weights at temperature 1; never -0
RIVER_BOTH inline float log_probability(float logit, float largest, uint64_t total) {
  const float sum = product(float(total), 0x1p-40f);
  return ((logit - largest) - log_of(reduced(sum))) + 0.f;
}

// How a row draws its token. Values out of range, which a GPU's host cannot refuse in time, filter nothing.
struct DrawRule {
  bool greedy;
  float temperature;
  int top_k;       // 0: all
  uint32_t top_p;  // in units of 2^-32; 0: all
  float least;     // of the scaled logits, by min_p

  RIVER_BOTH DrawRule(float temperature_, int top_k_, float top_p_, float min_p, int vocab_size) {
    greedy = !(temperature_ > 0);
    temperature = temperature_ > kMinTemperature ? temperature_ : kMinTemperature;
    top_k = top_k_ > 0 && top_k_ < vocab_size ? top_k_ : 0;
    const bool nucleus = top_p_ > 0 && top_p_ < 1;
    top_p = nucleus ? uint32_t(product(top_p_, 0x1p32f)) : 0;
    if (nucleus && top_p == 0) top_p = 1;
    const bool by_min_p = min_p > 0 && min_p <= 1;
    least = !by_min_p ? float_of(0xff800000u) : min_p < 1 ? log_of(reduced(min_p)) : 0.f;
  }

  // Of the tokens whose weights sum to `total`: a token stays while the likelier ones weigh less than this. At least 1,
  // so that one stays.
  RIVER_BOTH uint64_t nucleus_limit(uint64_t total) const {
    const uint64_t high = (total >> 32) * top_p, low = (total & 0xffffffffu) * top_p;
    return high + (low >> 32) + (uint32_t(low) != 0);
  }

  RIVER_BOTH float scale(float logit, float largest) const { return scaled(logit, largest, temperature); }
  RIVER_BOTH bool min_p_keeps(float logit, float largest) const { return scale(logit, largest) >= least; }
};

}  // namespace river
