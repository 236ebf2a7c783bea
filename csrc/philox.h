// Philox4x32-10 (Salmon et al., SC 2011) and Gumbel noise. A draw depends on (seed, position, token id) alone,
// and has the same bits wherever it is made: sums and products of IEEE fp32, one rounding each. The Python twin is
// reference.gumbel.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace river {

struct PhiloxWords {
  uint32_t word[4];
};

RIVER_BOTH inline PhiloxWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t product0 = 0xD2511F53ull * c0, product1 = 0xCD9E8D57ull * c2;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ key0;
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ key1;
    c3 = uint32_t(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Division by less would overflow what the noise is added to; so small a temperature is greedy all the same.
constexpr float kMinTemperature = 1e-30f;

// A product that no compiler merges with a sum: then every processor gets the same bits.
RIVER_BOTH inline float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  float c = a * b;
#if defined(__FP_FAST_FMAF) || defined(__ARM_FEATURE_FMA)
  asm("" : "+m"(c));
#endif
  return c;
#endif
}

RIVER_BOTH inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

RIVER_BOTH inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// x = (1 + rest) * 2^exponent with 1 + rest from sqrt(1/2) to sqrt(2)
struct Reduced {
  float rest;
  int32_t exponent;
};

RIVER_BOTH inline Reduced reduced(float x) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  const uint32_t shifted = bits_of(x) - kSqrtHalf;
  return {float_of((shifted & 0x7fffffu) + kSqrtHalf) - 1.f, int32_t(shifted) >> 23};
}

// The logarithm of what was reduced, by the polynomial of Cephes' logf
RIVER_BOTH inline float log_of(const Reduced& x) {
  const float f = x.rest, e = float(x.exponent), square = product(f, f);
  float p = product(7.0376836292e-2f, f) - 1.1514610310e-1f;
  p = product(p, f) + 1.1676998740e-1f;
  p = product(p, f) - 1.2420140846e-1f;
  p = product(p, f) + 1.4249322787e-1f;
  p = product(p, f) - 1.6668057665e-1f;
  p = product(p, f) + 2.0000714765e-1f;
  p = product(p, f) - 2.4999993993e-1f;
  p = product(p, f) + 3.3333331174e-1f;
  p = product(product(p, f), square) - product(2.12194440e-4f, e);
  p = p - product(0.5f, square);
  return f + p + product(0.693359375f, e);  // the last product is exact
}

// (word + 1/2) / 2^32, rounded: halves of a word are exact, so that every way to convert gives the same
RIVER_BOTH inline float uniform_of(uint32_t word) {
  const float high = product(float(int32_t(word >> 16)), 65536.f), low = float(int32_t(word & 0xffffu));
  return product(high + low + 0.5f, 0x1p-32f);
}

// Gumbel noise, -log(-log(1 - v)) for v = (word + 1/2) / 2^32: from -3.13 to 22.87. Its large values come from small v,
// for which log(1 - v) must not be computed from 1 - v. There are no branches, so that loops over words vectorise.
RIVER_BOTH inline float gumbel_of(uint32_t word) {
  Reduced x = reduced(uniform_of(~word));           // 1 - v
  const uint32_t far = uint32_t(x.exponent >> 31);  // all ones below sqrt(1/2)
  x.rest = float_of((bits_of(x.rest) & far) | (bits_of(-uniform_of(word)) & ~far));
  return -log_of(reduced(-log_of(x)));
}

// The words of four tokens: id v takes word v % 4 of Philox counter (v / 4, position, 0, 0).
RIVER_BOTH inline PhiloxWords words_of_four(uint64_t seed, int32_t position, int64_t token) {
  return philox(seed, uint32_t(token / 4), uint32_t(position), 0, 0);
}

RIVER_BOTH inline float gumbel(uint64_t seed, int32_t position, int64_t token) {
  const PhiloxWords words = words_of_four(seed, position, token);
  const uint32_t first = token % 2 ? words.word[1] : words.word[0], second = token % 2 ? words.word[3] : words.word[2];
  return gumbel_of(token % 4 < 2 ? first : second);  // no index: the words stay in registers
}

}  // namespace river
