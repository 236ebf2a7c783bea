// Where the rows of a step lie in the KV cache, and a load of what another kernel wrote. Kernels that stream no weight
// (attention, the end of a step) share these with those that do.
#pragma once

#include "types.cuh"

namespace river::device {

struct Places {
  const int32_t *slots, *positions;  // [T]
  int num_slots, max_len;            // of the cache
};

// The place of one row; slot -1: the row is inactive.
struct Place {
  int slot = -1, position = 0;
  RIVER_DEVICE bool active() const { return slot >= 0; }
};

// The place that two numbers name, by the members of Places or of an op's arguments. A row is inactive if its place is
// outside of the cache, which the host cannot see in time.
template <class Args>
RIVER_DEVICE Place checked_place(const Args& a, int slot, int position) {
  const bool inside = slot >= 0 && slot < a.num_slots && position >= 0 && position < a.max_len;
  return {inside ? slot : -1, position};
}

// The place of row t. Each number is read once, and only what was read is used.
template <class Args>
RIVER_DEVICE Place place_in_cache(const Args& a, int t) {
  return checked_place(a, load_written(a.slots + t), load_written(a.positions + t));
}

// 16 bytes that another kernel wrote, so from L2
RIVER_DEVICE uint4 load_activations(const void* p) {
  const float4 v = load_written(static_cast<const float4*>(p));
  return {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)};
}

}  // namespace river::device
