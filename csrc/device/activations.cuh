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

// RMSNorm of source [rows, hidden_size], rounded once; `squares` is filled here unless it is known already.
template <class T>
RIVER_DEVICE void load_normalised(StreamActivations<T>& x, const T* source, const T* weight, float eps,
                                  const BlockWork& work, const StreamShape& shape, RowSquares& squares, bool known) {
  const int hidden_size = shape.in_features, first = work.first_tile * kTileCols;
  if (!known) {
    measure_squares(source, x.rows, hidden_size, squares);
    barrier_sync(kReaderBarrier, kReaderThreads);
  }
  x.fill(hidden_size - first, [&](int row, int column) {
    float v[8], w[8];
    const float inverse = 1.f / sqrtf(squares.total(row) / hidden_size + eps);
    unpack<T>(load_activations(source + int64_t(row) * hidden_size + first + column), v);
    unpack<T>(load_activations(weight + first + column), w);
    for (int j = 0; j < 8; j++) v[j] = v[j] * inverse * w[j];
    return repack<T>(v);
  });
}

}  // namespace river::device
