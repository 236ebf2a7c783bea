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

// The split that a position is in: sizes are powers of two, so a shift and no division
RIVER_DEVICE int split_of(int position, int size) {
  const unsigned p = position;
  return size == 64 ? p / 64 : size == 128 ? p / 128 : p / kMaxSplit;
}

// What one row sees. Its splits begin at multiples of their size and depend on nothing but the row's own position.
struct RowContext {
  int first, last;  // positions, both included
  int size;         // of a split

  RIVER_DEVICE RowContext(const AttentionArgs& a, int position)
      : first(a.sliding_window > 0 ? max(int64_t(0), position - a.sliding_window + 1) : 0), last(position),
        size(split_size(last - first + 1)) {}
};

// The rows of a step that are in one slot and cut their contexts alike: what one of them sees is read for all of them.
struct SlotRows {
  int slot = -1, size = 0;           // of their splits
  int count = 0, rank = 0;           // how many there are, and how many stand before this block's own
  int first = 0, last = -1;          // positions that any of them sees lie in between
  int all_first = 0, all_last = -1;  // what all of them see

  RIVER_DEVICE int first_split() const { return split_of(first, size); }
  RIVER_DEVICE int splits() const { return split_of(last, size) - split_of(first, size) + 1; }
};

// Those that row `own` belongs to. By a whole warp, a lane per row: place_of(t) gives the place of row t, and
// visit(i, context) is told by the row's lane that it is the i-th of them.
template <class PlaceOf, class Visit>
RIVER_DEVICE SlotRows slot_rows(const AttentionArgs& a, int own, PlaceOf place_of, Visit visit) {
  const int t = lane_id() % kMaxRows;  // more lanes than rows: they repeat
  const Place place = t < a.rows ? place_of(t) : Place{};
  const RowContext context(a, place.active() ? place.position : 0);
  SlotRows rows{.slot = shuffle(place.slot, own), .size = shuffle(context.size, own)};
  const bool shares = place.active() && place.slot == rows.slot && context.size == rows.size;
  const uint32_t lanes = ballot(shares) & ((1u << kMaxRows) - 1);
  if (lanes == 0) return rows;
  const auto before = [&](int row) { return __popc(lanes & ((1u << row) - 1)); };
  rows.count = __popc(lanes), rows.rank = before(own);
  if (shares) visit(before(t), context);
  int lowest = shares ? place.position : a.max_len, highest = shares ? place.position : -1;
  for (int n = kMaxRows / 2; n > 0; n /= 2)
    lowest = min(lowest, shuffle_xor(lowest, n)), highest = max(highest, shuffle_xor(highest, n));
  rows.first = RowContext(a, lowest).first, rows.all_last = lowest;
  rows.last = highest, rows.all_first = RowContext(a, highest).first;
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
