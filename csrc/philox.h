// Philox4x32-10 (Salmon et al., SC 2011) and Gumbel noise. A draw depends on (seed, position, purpose, token id)
// alone. The Python twin is reference.gumbel.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define RIVER_BOTH __host__ __device__
#else
#define RIVER_BOTH
#endif

namespace river {

struct PhiloxWords {
  uint32_t word[4];
};

RIVER_BOTH inline PhiloxWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t product0 = 0xD2511F53ull * c0, product1 = 0xCD9E8D57ull * c2;
    c0 = (uint32_t)(product1 >> 32) ^ c1 ^ key0;
    c1 = (uint32_t)product1;
    c2 = (uint32_t)(product0 >> 32) ^ c3 ^ key1;
    c3 = (uint32_t)product0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Division by less would overflow what the noise is added to: so small a temperature is greedy all the same
constexpr float kMinTemperature = 1e-30f;

// u = (23 bits + 0.5) / 2^23 is exact in fp32 and lies strictly between 0 and 1
RIVER_BOTH inline float gumbel(uint64_t seed, int32_t position, int64_t token, uint32_t purpose = 0) {
  const PhiloxWords words = philox(seed, (uint32_t)(token / 4), (uint32_t)position, purpose, 0);
  const uint32_t first = token % 2 ? words.word[1] : words.word[0], second = token % 2 ? words.word[3] : words.word[2];
  const uint32_t word = token % 4 < 2 ? first : second;  // no index: the words stay in registers
  const float u = ((float)(word >> 9) + 0.5f) * 0x1p-23f;
  return -logf(-logf(u));
}

}  // namespace river
