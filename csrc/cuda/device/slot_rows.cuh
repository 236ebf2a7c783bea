// How a context is cut into splits, and which rows of a step share what they read: those of one slot whose contexts are
// cut alike. A split begins at a multiple of its size, so that rows that see a position have it in the same split.
// Last, what a split leaves for the merge.
#pragma once

#include "cache_places.cuh"

namespace river::device {

constexpr int kMaxSplit = 256;  // positions

// Positions of a split, of `seen` ones: 64, until that makes 16 splits; then 16 splits of more positions each, up to
// kMaxSplit; then more splits.
__host__ __device__ inline int split_size(int seen) {
  return seen <= 16 * 64 ? 64 : seen <= 16 * 128 ? 128 : kMaxSplit;
}

// What one row sees. Its splits begin at multiples of their size and depend on nothing but the row's own position.
struct RowContext {
  int first, last;  // positions, both included
  int size;         // of a split

  RIVER_DEVICE RowContext(const AttentionArgs& a, int position)
      : first(a.sliding_window > 0 ? max(int64_t(0), position - a.sliding_window + 1) : 0), last(position),
        size(split_size(last - first + 1)) {}

  RIVER_DEVICE int first_split() const { return first / size; }
  RIVER_DEVICE int splits() const { return last / size - first / size + 1; }
};

// The rows of a step that are in one slot and cut their contexts alike: what one of them sees is read for all of them.
struct SlotRows {
  int slot = -1, size = 0;           // of their splits
  int count = 0, rank = 0;           // how many there are, and how many stand before this block's own
  int first = 0, last = -1;          // positions that any of them sees lie in between
  int all_first = 0, all_last = -1;  // what all of them see

  RIVER_DEVICE int first_split() const { return first / size; }
  RIVER_DEVICE int splits() const { return last / size - first / size + 1; }
};

// Those that row `own` belongs to. place_of(t) gives the place of row t; visit(i, t, context) is told of the i-th of
// the rows, which is row t.
template <class PlaceOf, class Visit>
RIVER_DEVICE SlotRows slot_rows(const AttentionArgs& a, int own, PlaceOf place_of, Visit visit) {
  Place places[kMaxRows], mine;
#pragma unroll
  for (int t = 0; t < kMaxRows; t++)
    if (t < a.rows) places[t] = place_of(t);
#pragma unroll
  for (int t = 0; t < kMaxRows; t++)
    if (t == own) mine = places[t];
  SlotRows rows;
  if (!mine.active()) return rows;
  rows.slot = mine.slot, rows.size = RowContext(a, mine.position).size;
#pragma unroll
  for (int t = 0; t < kMaxRows; t++) {
    const RowContext context(a, places[t].position);
    if (places[t].slot != rows.slot || context.size != rows.size) continue;
    const bool one = rows.count == 0;
    rows.first = one ? context.first : min(rows.first, context.first);
    rows.last = max(rows.last, context.last);
    rows.all_first = max(rows.all_first, context.first);
    rows.all_last = one ? context.last : min(rows.all_last, context.last);
    visit(rows.count, t, context);
    rows.count++;
    rows.rank += t < own;
  }
  return rows;
}

// ---- what a split leaves for the merge ----------------------------------------------------------

// Of each (row, query head, split): the largest score, the sum of exp(score - largest), the values weighted alike.
struct Partials {
  static constexpr int kLargest = 0, kSum = 1, kValues = 4;  // kValues: the values begin at a multiple of 16 bytes

  float* memory;  // [T, heads, splits, 4 + head_dim]
  int heads, splits, head_dim;

  RIVER_DEVICE float* at(int row, int head, int split) const {
    return memory + ((int64_t(row) * heads + head) * splits + split) * (kValues + head_dim);
  }
};

}  // namespace river::device
