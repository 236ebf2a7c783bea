// Gumbel noise for 16 tokens at a time, in loops that the compiler vectorises.
#pragma once

#include <cstdint>
#include <cstring>

#include "../philox.h"
#include "../river.h"

namespace river::cpu {

// logits / temperature + noise of 16 tokens from `first` on, a multiple of 16
inline void add_noise(const float (&logits)[kTileRows], float temperature, uint64_t seed, int32_t position,
                      int64_t first, float (&scores)[kTileRows]) {
  uint32_t words[kTileRows];
  for (int i = 0; i < kTileRows; i += 4) {
    const PhiloxWords four = words_of_four(seed, position, first + i);
    memcpy(words + i, four.word, sizeof(four.word));
  }
  for (int i = 0; i < kTileRows; i++) scores[i] = logits[i] / temperature + gumbel_of(words[i]);
}

}  // namespace river::cpu
