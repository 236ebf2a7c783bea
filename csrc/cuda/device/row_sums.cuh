// Sums over hidden vectors: of their squares, for RMSNorm, and as similarity.cuh needs them. Every kernel that needs a
// sum gets the same bits, whatever the number of rows.
//
// A hidden vector is cut into chunks of 16 values, and chunk i belongs to lane i % 32 of part i / 32 % 8. A part is the
// work of one warp. The values of a chunk are added by a fixed tree; a lane adds its chunks in order; the lanes are
// added by a tree, and the parts in order.
#pragma once

#include "types.cuh"

namespace river::device {

constexpr int kChunk = 16;
constexpr int kParts = 8;

// A chunk that another kernel wrote, from L2, still packed: those of several rows are asked for before one is used.
template <class T>
struct Chunk {
  float4 piece[kChunk * sizeof(T) / 16];

  RIVER_DEVICE void load(const T* p) {
    constexpr int kPer16Bytes = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kChunk; i += kPer16Bytes)
      piece[i / kPer16Bytes] = load_written(reinterpret_cast<const float4*>(p + i));
  }

  RIVER_DEVICE void unpack(float (&out)[kChunk]) const {
    constexpr int kPer16Bytes = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kChunk; i += kPer16Bytes) {
      const float4& v = piece[i / kPer16Bytes];
      if constexpr (sizeof(T) == 4) {
        out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
      } else {
        const float words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const float2 two = to_float2<T>(__float_as_uint(words[j]));
          out[i + 2 * j] = two.x, out[i + 2 * j + 1] = two.y;
        }
      }
    }
  }
};

// Adds values 8 apart, then 4, 2, 1 apart. Explicit roundings: a contracted product would change the bits.
template <int kWidth>
RIVER_DEVICE void fold(float (&value)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kWidth; i++) value[i] = __fadd_rn(value[i], value[i + kWidth]);
  if constexpr (kWidth > 1) fold<kWidth / 2>(value);
}

RIVER_DEVICE float chunk_dot(const float (&u)[kChunk], const float (&v)[kChunk]) {
  float value[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; i++) value[i] = __fmul_rn(u[i], v[i]);
  fold<kChunk / 2>(value);
  return value[0];
}

// The sums of squares of each row's parts; in shared memory
struct RowSquares {
  float part[kMaxRows][kParts];

  RIVER_DEVICE float total(int row) const {
    float sum = 0;
    for (int i = 0; i < kParts; i++) sum += part[row][i];
    return sum;
  }
};

// Combines several values over the lanes of a warp at once: a shuffle takes its time, but the next need not wait for
// it.
template <int kCount, class V, class Combine>
RIVER_DEVICE void over_lanes(V (&value)[kCount], Combine combine) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; i++) value[i] = combine(value[i], shuffle_xor(value[i], lanes));
  }
}

template <int kCount>
RIVER_DEVICE void sum_over_lanes(float (&sum)[kCount]) {
  over_lanes(sum, [](float a, float b) { return __fadd_rn(a, b); });
}

// Calls f(first value) for the chunks of this lane.
template <class F>
RIVER_DEVICE void for_each_chunk(int part, int hidden_size, F f) {
#pragma unroll 1  // up to 4,096 values there is one
  for (int i = (part * kWarp + lane_id()) * kChunk; i < hidden_size; i += kParts * kWarp * kChunk) f(i);
}

// Calls f(r) for the rows first + r of a group that exist.
template <int kRows, class F>
RIVER_DEVICE void for_each_row(int first, int rows, F f) {
#pragma unroll
  for (int r = 0; r < kRows; r++)
    if (first + r < rows) f(r);
}

constexpr int kSquaredRows = 4;  // at a time, so that registers hold their chunks

// Squares of y, [rows, hidden_size], by kParts warps, which the caller synchronises afterwards.
// keep(row, first value, chunk) gets each chunk on the way.
template <class T, class Keep>
RIVER_DEVICE void measure_squares(const T* y, int rows, int hidden_size, RowSquares& squares, Keep keep) {
  const int part = warp_id();
  for (int first = 0; first < rows; first += kSquaredRows) {
    float sum[kSquaredRows] = {};
    for_each_chunk(part, hidden_size, [&](int i) {
      Chunk<T> chunk[kSquaredRows] = {};  // left undefined, it would hold registers from the kernel's start
      for_each_row<kSquaredRows>(first, rows, [&](int r) { chunk[r].load(y + int64_t(first + r) * hidden_size + i); });
      for_each_row<kSquaredRows>(first, rows, [&](int r) {
        float v[kChunk];
        chunk[r].unpack(v);
        keep(first + r, i, v);
        sum[r] = __fadd_rn(sum[r], chunk_dot(v, v));
      });
    });
    sum_over_lanes(sum);
    if (lane_id() == 0) for_each_row<kSquaredRows>(first, rows, [&](int r) { squares.part[first + r][part] = sum[r]; });
  }
}

}  // namespace river::device
