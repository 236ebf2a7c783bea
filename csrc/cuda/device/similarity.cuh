// The state transition similarity of rows x and y: dot(x, y) / (|x| |y|), by the sums of row_sums.cuh.
//
// Rows are first measured as they are. A row whose squares may over- or underflow is measured again, scaled by a power
// of two. A zero or non-finite vector has similarity 0.
#pragma once

#include "row_sums.cuh"

namespace river::device {

constexpr int kComparedRows = 2;  // at a time, so that registers hold their chunks

// A factor in two halves: applied one after the other they stay in range for any input.
struct Scaling {
  bool usable;  // false: a zero or non-finite vector
  float first, second;
};

// From the largest magnitude of a vector, as bits: 1 where squares are safe, else the power of two that brings the
// largest to [1, 2).
RIVER_DEVICE Scaling safe_scaling(uint32_t largest) {
  const float max = __uint_as_float(largest);
  if (largest == 0 || largest >= 0x7f800000u) return {false, 0.f, 0.f};
  if (max >= 0x1p-40f && max <= 0x1p40f) return {true, 1.f, 1.f};
  const int exponent = -ilogbf(max);
  return {true, ldexpf(1.f, exponent / 2), ldexpf(1.f, exponent - exponent / 2)};
}

// What is measured of a part of a row, or of the whole row
struct PairSums {
  float dot, xx, yy;
  uint32_t largest_x, largest_y;  // magnitudes before scaling, as bits

  RIVER_DEVICE Scaling x_scaling() const { return safe_scaling(largest_x); }
  RIVER_DEVICE Scaling y_scaling() const { return safe_scaling(largest_y); }
  RIVER_DEVICE float cosine() const { return fminf(1.f, fmaxf(-1.f, dot / __fmul_rn(sqrtf(xx), sqrtf(yy)))); }
};

RIVER_DEVICE PairSums whole_row(const PairSums (&parts)[kParts]) {
  PairSums row = parts[0];
  for (int i = 1; i < kParts; i++) {
    const PairSums& part = parts[i];
    row.dot = __fadd_rn(row.dot, part.dot);
    row.xx = __fadd_rn(row.xx, part.xx);
    row.yy = __fadd_rn(row.yy, part.yy);
    row.largest_x = max(row.largest_x, part.largest_x);
    row.largest_y = max(row.largest_y, part.largest_y);
  }
  return row;
}

struct KeepNothing {
  RIVER_DEVICE void operator()(int, int, const float (&)[kChunk]) const {}
};

// One part of the rows first, first + 1, ... of x and y, both [rows, hidden_size], by one warp
template <int kRows, class T, class Keep>
RIVER_DEVICE void measure_part(const T* x, const T* y, int part, int first, int rows, int hidden_size, Scaling sx,
                               Scaling sy, PairSums (&out)[kRows], Keep keep) {
  float sum[3 * kRows] = {};         // of each row: dot, xx, yy
  uint32_t largest[2 * kRows] = {};  // of each row: x, y
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
    out[r] = {.dot = sum[3 * r],
              .xx = sum[3 * r + 1],
              .yy = sum[3 * r + 2],
              .largest_x = largest[2 * r],
              .largest_y = largest[2 * r + 1]};
}

// Measures a row once more, with squares that are safe. parts: what is known of the row, and what the warps replace.
template <class T>
RIVER_DEVICE void measure_scaled(const T* x, const T* y, int row, int rows, int hidden_size,
                                 PairSums (&parts)[kParts]) {
  const PairSums known = whole_row(parts);
  PairSums measured[1];
  measure_part(x, y, warp_id(), row, rows, hidden_size, known.x_scaling(), known.y_scaling(), measured, KeepNothing{});
  __syncwarp();  // other warps may still read the magnitudes: the sums alone change
  if (lane_id() > 0) return;
  PairSums& part = parts[warp_id()];
  part.dot = measured[0].dot, part.xx = measured[0].xx, part.yy = measured[0].yy;
}

// The similarities of the rows of x and y, both [rows, hidden_size], to shared memory, and the squares of y, by kParts
// warps, which `sync` synchronises; hidden_size is a multiple of 16. keep(row, first value, chunk) gets y on the way.
template <class T, class Sync, class Keep>
RIVER_DEVICE void measure_rows(const T* x, const T* y, int rows, int hidden_size, float (&similarities)[kMaxRows],
                               RowSquares& squares, Sync sync, Keep keep) {
  RIVER_SHARED(PairSums, parts, [kMaxRows][kParts]);
  RIVER_SHARED(int, unsafe, [kMaxRows]);  // rows whose squares may over- or underflow
  const Scaling none{true, 1.f, 1.f};
  const int t = threadIdx.x, part = warp_id();
  for (int first = 0; first < rows; first += kComparedRows) {
    PairSums measured[kComparedRows];
    measure_part(x, y, part, first, rows, hidden_size, none, none, measured, keep);
    if (lane_id() == 0)
      for_each_row<kComparedRows>(first, rows, [&](int r) {
        parts[first + r][part] = measured[r];
        squares.part[first + r][part] = measured[r].yy;
      });
  }
  sync();
  if (t < rows) {
    const PairSums row = whole_row(parts[t]);
    const Scaling sx = row.x_scaling(), sy = row.y_scaling();
    unsafe[t] = sx.usable && sy.usable && (sx.first != 1.f || sy.first != 1.f);
    similarities[t] = sx.usable && sy.usable ? row.cosine() : 0.f;
  }
  sync();
  bool any_unsafe = false;
  for (int row = 0; row < rows; row++) any_unsafe = any_unsafe || unsafe[row];
  if (!any_unsafe) return;  // all threads come to the same answer
  for (int row = 0; row < rows; row++)
    if (unsafe[row]) measure_scaled(x, y, row, rows, hidden_size, parts[row]);
  sync();
  if (t < rows && unsafe[t]) similarities[t] = whole_row(parts[t]).cosine();
  sync();
}

}  // namespace river::device
