// What the phases of a block load as activations: rows as they are, or normalised.
#pragma once

#include "weight_stream.cuh"

namespace river::device {

// Where the rows are in the cache
struct Places {
  const int32_t *slots, *positions;  // [T]
  int num_slots, max_len;
};

// The slot of row t, -1 if it is inactive. A place outside of the cache makes it so too: the host cannot see it in time.
template <class Args>
RIVER_DEVICE int slot_in_cache(const Args& a, int t) {
  const int slot = a.slots[t], position = a.positions[t];
  return slot >= 0 && slot < a.num_slots && position >= 0 && position < a.max_len ? slot : -1;
}

// 16 bytes of activations: written by the kernel before, so from L2
RIVER_DEVICE uint4 load_activations(const void* p) {
  const float4 v = load_shared_between_blocks(static_cast<const float4*>(p));
  return {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)};
}

template <class T>
RIVER_DEVICE void unpack(const uint4& v, float (&out)[8]) {
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; i++) {
    const float2 two = to_float2<T>(word[i]);
    out[2 * i] = two.x, out[2 * i + 1] = two.y;
  }
}

template <class T>
RIVER_DEVICE uint4 repack(const float (&v)[8]) {
  uint32_t word[4];
  for (int i = 0; i < 4; i++) word[i] = pair<T>(from_float<T>(v[2 * i]), from_float<T>(v[2 * i + 1]));
  return {word[0], word[1], word[2], word[3]};
}

// source: [rows, columns of the whole K]
template <class T>
RIVER_DEVICE void load_rows(StreamActivations<T>& x, const T* source, const BlockWork& work, const StreamShape& shape) {
  const int first = work.first_tile * kTileCols;
  x.fill(shape.in_features - first,
         [&](int row, int column) { return load_activations(source + int64_t(row) * shape.in_features + first + column); });
}

// RMSNorm of source [rows, hidden_size], rounded once. Every thread takes the same columns of every row, and the sums
// of the warps are added in order, so a row's scale depends on nothing else.
template <class T>
RIVER_DEVICE void load_normalised(StreamActivations<T>& x, const T* source, const T* weight, float eps,
                                  const BlockWork& work, const StreamShape& shape) {
  RIVER_SHARED(float, squares, [kMaxRows][kReaders]);
  const int hidden_size = shape.in_features, first = work.first_tile * kTileCols;
  for (int row = 0; row < x.rows; row++) {
    float sum = 0;
    for (int i = 8 * threadIdx.x; i < hidden_size; i += 8 * kReaderThreads) {
      float v[8];
      unpack<T>(load_activations(source + int64_t(row) * hidden_size + i), v);
      for (int j = 0; j < 8; j++) sum += v[j] * v[j];
    }
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
    if (lane_id() == 0) squares[row][warp_id()] = sum;
  }
  barrier_sync(kReaderBarrier, kReaderThreads);
  x.fill(hidden_size - first, [&](int row, int column) {
    float sum = 0, v[8], w[8];
    for (int warp = 0; warp < kReaders; warp++) sum += squares[row][warp];
    const float inverse = 1.f / sqrtf(sum / hidden_size + eps);
    unpack<T>(load_activations(source + int64_t(row) * hidden_size + first + column), v);
    unpack<T>(load_activations(weight + first + column), w);
    for (int j = 0; j < 8; j++) v[j] = v[j] * inverse * w[j];
    return repack<T>(v);
  });
}

}  // namespace river::device
