// What the phases of a block load as activations: rows as they are, or normalised.
#pragma once

#include "stream.cuh"

namespace river::device {

// Where the rows are in the cache
struct Places {
  const int32_t *slots, *positions;  // [T]
  int num_slots, max_len;
};

// The place of one row; slot -1: it is inactive
struct Place {
  int slot = -1, position = 0;
  RIVER_DEVICE bool active() const { return slot >= 0; }
};

// Read once, and only what was read is used: a row is inactive if its place is outside of the cache, which the host cannot
// see in time.
template <class Args>
RIVER_DEVICE Place place_in_cache(const Args& a, int t) {
  const int slot = load_written(a.slots + t), position = load_written(a.positions + t);
  const bool inside = slot >= 0 && slot < a.num_slots && position >= 0 && position < a.max_len;
  return {inside ? slot : -1, position};
}

// 16 bytes of activations: written by the kernel before, so from L2
RIVER_DEVICE uint4 load_activations(const void* p) {
  const float4 v = load_written(static_cast<const float4*>(p));
  return {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)};
}

// source: [rows, columns of the whole K]
template <class T>
RIVER_DEVICE void load_rows(StreamInput<T>& input, const T* source) {
  const int first = input.first_column(), in_features = input.shape.in_features;
  input.x.fill(in_features - first, input.with_sums, [&](int row, int column) {
    return load_activations(source + int64_t(row) * in_features + first + column);
  });
}

// A norm's weight [in_features] is asked for while the kernels ahead still run.
template <class T>
RIVER_DEVICE void prefetch_norm(const T* weight, const BlockWork& work) {
  constexpr int kLine = 128 / sizeof(T);
  const int columns = work.tiles * kTileCols;
  for (int i = threadIdx.x * kLine; i < columns; i += kReaderThreads * kLine)
    prefetch_to_l2(weight + work.first_tile * kTileCols + i);
}

// RMSNorm of source [rows, in_features], rounded once; in_features is a multiple of 64.
template <class T>
RIVER_DEVICE void load_normalised(StreamInput<T>& input, const T* source, const T* weight, float eps) {
  const int first = input.first_column(), in_features = input.shape.in_features;
  if (!input.measured) {
    measure_squares(source, input.x.rows, in_features, input.squares,
                    [&](int row, int column, const float (&values)[kChunk]) { input.keep(row, column, values); });
    barrier_sync(kReaderBarrier, kReaderThreads);
  }
  input.x.fill(in_features - first, input.with_sums, [&](int row, int column) {
    float v[8], w[8];
    const float inverse = 1.f / sqrtf(input.squares.total(row) / in_features + eps);
    unpack<T>(input.x.piece(row, column), v);
    unpack<T>(load_activations(weight + first + column), w);
    for (int j = 0; j < 8; j++) v[j] = v[j] * inverse * w[j];
    return repack<T>(v);
  });
}

}  // namespace river::device
