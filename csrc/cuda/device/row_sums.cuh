// Sums over rows of hidden vectors, for RMSNorm and for the state transition similarity: every kernel that needs one
// gets the same bits. A row is cut into chunks of 16 values, chunk i to lane i % 32 of part i / 32 % 8. Within a chunk
// a fixed tree; a lane adds its chunks in order; then a tree over the lanes; then the parts in order. A part is one
// warp's work, whatever the number of rows.
#pragma once

#include "types.cuh"

namespace river::device {

constexpr int kChunk = 16;

struct Triple {  // sums over one chunk, or over a vector
  float dot, a, b;
};

// 16 values that another kernel wrote, from L2, still packed: several rows' are asked for before one is used
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

// A factor in two halves: applied one after the other they stay in range for any input.
struct Scaling {
  bool usable;  // false: a zero or non-finite vector
  float first, second;
};

RIVER_DEVICE uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// From the largest magnitude of a vector, as bits: 1 where squares are safe, else the power of two that brings the
// largest to [1, 2).
RIVER_DEVICE Scaling safe_scaling(uint32_t largest) {
  const float max = __uint_as_float(largest);
  if (largest == 0 || largest >= 0x7f800000u) return {false, 0.f, 0.f};
  if (max >= 0x1p-40f && max <= 0x1p40f) return {true, 1.f, 1.f};
  const int exponent = -ilogbf(max);
  return {true, ldexpf(1.f, exponent / 2), ldexpf(1.f, exponent - exponent / 2)};
}

// lane[i] + lane[i + 8], then 4, 2, 1 apart. Explicit roundings: a contracted product would change the bits.
template <int kWidth>
RIVER_DEVICE void fold(float (&lane)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kWidth; i++) lane[i] = __fadd_rn(lane[i], lane[i + kWidth]);
  if constexpr (kWidth > 1) fold<kWidth / 2>(lane);
}

RIVER_DEVICE float chunk_dot(const float (&u)[kChunk], const float (&v)[kChunk]) {
  float lane[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; i++) lane[i] = __fmul_rn(u[i], v[i]);
  fold<kChunk / 2>(lane);
  return lane[0];
}

constexpr int kParts = 8;

// Sums of squares of rows, by part; in shared memory
struct RowSquares {
  float part[kMaxRows][kParts];
  RIVER_DEVICE float total(int row) const {
    float sum = 0;
    for (int i = 0; i < kParts; i++) sum += part[row][i];
    return sum;
  }
};

// Over the lanes of a warp, several values at once: a shuffle takes its time, but the next need not wait for it
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

// f(first value) for the chunks of this lane
template <class F>
RIVER_DEVICE void for_each_chunk(int part, int hidden_size, F f) {
#pragma unroll 1  // up to 4,096 values there is one
  for (int i = (part * kWarp + lane_id()) * kChunk; i < hidden_size; i += kParts * kWarp * kChunk) f(i);
}

// f(r) for the rows first + r of a group that exist
template <int kRows, class F>
RIVER_DEVICE void for_each_row(int first, int rows, F f) {
#pragma unroll
  for (int r = 0; r < kRows; r++)
    if (first + r < rows) f(r);
}

constexpr int kSquaredRows = 4, kComparedRows = 2;  // at a time, so that registers hold their chunks

// By kParts warps: of y [rows, hidden_size]. keep(row, first value, values) gets each chunk on the way. The caller
// synchronises the warps afterwards.
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

struct KeepNothing {
  RIVER_DEVICE void operator()(int, int, const float (&)[kChunk]) const {}
};

struct RowPart {
  Triple sum;
  uint32_t largest_x, largest_y;  // magnitudes before scaling, as bits
};

// A part of the rows first, first + 1, ... of x and y [rows, hidden_size]
template <int kRows, class T, class Keep>
RIVER_DEVICE void measure_part(const T* x, const T* y, int part, int first, int rows, int hidden_size, Scaling sx,
                               Scaling sy, RowPart (&out)[kRows], Keep keep) {
  float sum[3 * kRows] = {};         // dot, a, b
  uint32_t largest[2 * kRows] = {};  // x, y
  for_each_chunk(part, hidden_size, [&](int i) {
    Chunk<T> x_chunk[kRows] = {}, y_chunk[kRows] = {};
    for_each_row<kRows>(first, rows, [&](int r) {
      x_chunk[r].load(x + int64_t(first + r) * hidden_size + i);
      y_chunk[r].load(y + int64_t(first + r) * hidden_size + i);
    });
    for_each_row<kRows>(first, rows, [&](int r) {
      float u[kChunk], v[kChunk];
      x_chunk[r].unpack(u);
      y_chunk[r].unpack(v);
      keep(first + r, i, v);
#pragma unroll
      for (int j = 0; j < kChunk; j++) {
        largest[2 * r] = max(largest[2 * r], magnitude_bits(u[j]));
        largest[2 * r + 1] = max(largest[2 * r + 1], magnitude_bits(v[j]));
        u[j] = u[j] * sx.first * sx.second;
        v[j] = v[j] * sy.first * sy.second;
      }
      sum[3 * r] = __fadd_rn(sum[3 * r], chunk_dot(u, v));
      sum[3 * r + 1] = __fadd_rn(sum[3 * r + 1], chunk_dot(u, u));
      sum[3 * r + 2] = __fadd_rn(sum[3 * r + 2], chunk_dot(v, v));
    });
  });
  sum_over_lanes(sum);
  over_lanes(largest, [](uint32_t a, uint32_t b) { return max(a, b); });
#pragma unroll
  for (int r = 0; r < kRows; r++)
    out[r] = {{sum[3 * r], sum[3 * r + 1], sum[3 * r + 2]}, largest[2 * r], largest[2 * r + 1]};
}

RIVER_DEVICE RowPart whole_row(const RowPart (&parts)[kParts]) {
  RowPart row = parts[0];
  for (int i = 1; i < kParts; i++) {
    const RowPart& p = parts[i];
    row.sum = {__fadd_rn(row.sum.dot, p.sum.dot), __fadd_rn(row.sum.a, p.sum.a), __fadd_rn(row.sum.b, p.sum.b)};
    row.largest_x = max(row.largest_x, p.largest_x);
    row.largest_y = max(row.largest_y, p.largest_y);
  }
  return row;
}

RIVER_DEVICE float cosine(const Triple& sum) {
  const float value = sum.dot / __fmul_rn(sqrtf(sum.a), sqrtf(sum.b));
  return fminf(1.f, fmaxf(-1.f, value));
}

// By kParts warps, which `sync` waits for: the cosines of the rows of x and y [rows, hidden_size], hidden_size a multiple
// of 16, to `similarities` in shared memory; and the squares of y, whose chunks go to keep as above.
template <class T, class Sync, class Keep>
RIVER_DEVICE void measure_rows(const T* x, const T* y, int rows, int hidden_size, float (&similarities)[kMaxRows],
                               RowSquares& squares, Sync sync, Keep keep) {
  RIVER_SHARED(RowPart, parts, [kMaxRows][kParts]);
  RIVER_SHARED(int, unsafe, [kMaxRows]);  // rows whose squares over- or underflow unscaled
  const Scaling none{true, 1.f, 1.f};
  const int t = threadIdx.x, part = warp_id();
  for (int first = 0; first < rows; first += kComparedRows) {
    RowPart measured[kComparedRows];
    measure_part(x, y, part, first, rows, hidden_size, none, none, measured, keep);
    if (lane_id() == 0)
      for_each_row<kComparedRows>(first, rows, [&](int r) {
        parts[first + r][part] = measured[r];
        squares.part[first + r][part] = measured[r].sum.b;
      });
  }
  sync();
  if (t < rows) {
    const RowPart row = whole_row(parts[t]);
    const Scaling sx = safe_scaling(row.largest_x), sy = safe_scaling(row.largest_y);
    unsafe[t] = sx.usable && sy.usable && (sx.first != 1.f || sy.first != 1.f);
    similarities[t] = sx.usable && sy.usable ? cosine(row.sum) : 0.f;
  }
  sync();
  bool again = false;
  for (int row = 0; row < rows; row++) again = again || unsafe[row];
  if (!again) return;  // the same for all
  for (int row = 0; row < rows; row++) {
    if (!unsafe[row]) continue;
    const RowPart whole = whole_row(parts[row]);
    RowPart measured[1];
    measure_part(x, y, part, row, rows, hidden_size, safe_scaling(whole.largest_x), safe_scaling(whole.largest_y),
                 measured, KeepNothing{});
    __syncwarp();  // each part is read by the warps of all: its sums alone change
    if (lane_id() == 0) parts[row][part].sum = measured[0].sum;
  }
  sync();
  if (t < rows && unsafe[t]) similarities[t] = cosine(whole_row(parts[t]).sum);
  sync();
}

}  // namespace river::device
