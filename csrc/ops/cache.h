// What decode_attention and the layers check alike: the caches, every row's place in them, and what a row sees.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "arguments.h"  // before any header of torch
#include "check.h"

namespace river::ops {

struct CacheTensors {
  Tensor k_cache, v_cache;  // [slots, kv_heads, max_len, head_dim]
  Tensor slots, positions;  // [T]
  OptionalTensor kv_valid;  // [slots, max_len]
  std::optional<double> softmax_scale;
  std::optional<int64_t> sliding_window;
};

template <const char* schema>
CacheTensors read_cache(Arguments<schema>& read) {
  return {.k_cache = read.tensor("k_cache"),
          .v_cache = read.tensor("v_cache"),
          .slots = read.tensor("slots"),
          .positions = read.tensor("positions"),
          .kv_valid = read.optional_tensor("kv_valid"),
          .softmax_scale = read.optional_number("softmax_scale"),
          .sliding_window = read.optional_integer("sliding_window")};
}

// Fills what AttentionArgs and BlockArgs say of the cache, but for its pointers; `rows` and `num_heads` are filled.
template <class Args>
void fill_cache(Check& check, const CacheTensors& t, ScalarType type, Args& args) {
  check.vectors("k_cache", t.k_cache, type, {kAny, kAny, kAny, kAny});
  args.num_slots = check.size("slots of k_cache", t.k_cache.size(0));
  args.num_kv_heads = check.size("num_key_value_heads of k_cache", t.k_cache.size(1));
  args.max_len = check.size("max_len of k_cache", t.k_cache.size(2));
  args.head_dim = check.vector_size("head_dim of k_cache", t.k_cache.size(3));
  check.vectors("v_cache", t.v_cache, type, {args.num_slots, args.num_kv_heads, args.max_len, args.head_dim});
  check.require(args.head_dim % 2 == 0 && args.head_dim <= kMaxHeadDim, "head_dim is ", args.head_dim,
                ", expected an even number up to ", kMaxHeadDim);
  const int heads = args.num_heads, kv_heads = args.num_kv_heads;
  check.require(heads >= 1 && heads % kv_heads == 0 && heads / kv_heads <= kMaxGroup, "num_attention_heads is ", heads,
                ", expected a multiple of num_key_value_heads = ", kv_heads, ", at most ", kMaxGroup, " times as many");
  check.size("num_attention_heads * head_dim", int64_t(heads) * args.head_dim);
  args.slots = check.tensor<int32_t>("slots", t.slots, {args.rows});
  args.positions = check.tensor<int32_t>("positions", t.positions, {args.rows});
  args.kv_valid = check.optional<bool>("kv_valid", t.kv_valid, {args.num_slots, args.max_len});
}

// On a CPU; of AttentionArgs or BlockArgs, which has its own places from then on
template <class Args>
void check_places(Requirements& check, Args& args) {
  args.slots = check.own(args.slots, args.rows);
  args.positions = check.own(args.positions, args.rows);
  for (int row = 0; row < args.rows; row++) {
    check.in_range("slots", row, args.slots[row], -1, args.num_slots - 1);
    if (args.slots[row] >= 0) check.in_range("positions", row, args.positions[row], 0, args.max_len - 1);
  }
}

// Fills what a row makes of the positions before it; fill_cache comes first.
template <class Args>
void fill_scores(const Check& check, const CacheTensors& t, Args& args) {
  const double scale = t.softmax_scale.value_or(1 / std::sqrt(double(args.head_dim)));
  check.require(std::isfinite(float(scale)), "softmax_scale is ", scale, ", expected a finite number");
  args.softmax_scale = float(scale);
  const int64_t window = t.sliding_window.value_or(0);
  check.require(!t.sliding_window || window >= 1, "sliding_window is ", window, ", expected at least 1");
  args.sliding_window = std::min(window, int64_t(1) << 31);  // no position is larger
}

}  // namespace river::ops
