// The order in which strips hold the output rows of qkv_proj and gate_up_proj: written here once for every kernel, and
// a second time in river_ext/quant/w4.py, which packs by it. What an epilogue combines lies in rows g and g + 8 of a
// strip, which one lane of an mma owns: the two dims of Q or K that rotate together, a gate and its up.
//
// Plain ints, no memory: kernels on a GPU ask (strip, r) -> natural row, kernels on a CPU natural row -> packed row.
#pragma once

#include "host_device.h"
#include "river.h"

namespace river {

// ---- pairs of rows ----------------------------------------------------------------------------------

constexpr int kStripPairs = kTileRows / 2;

// Pair p has the rows g = p % 8 and g + 8 of strip p / 8.
RIVER_BOTH constexpr int pair_at(int strip, int r) { return strip * kStripPairs + r % kStripPairs; }
RIVER_BOTH constexpr bool second_of_pair(int r) { return r >= kStripPairs; }
RIVER_BOTH constexpr int row_of_pair(int pair, bool second) {
  return pair / kStripPairs * kTileRows + pair % kStripPairs + (second ? kStripPairs : 0);
}

// ---- gate_up_proj -----------------------------------------------------------------------------------

// Channel c is pair c: its gate is the first row, its up the second. Channels past the last one are padding.
struct GateUpRow {
  bool up;
  int channel;
};

RIVER_BOTH constexpr int gate_up_strips(int channels) { return (channels + kStripPairs - 1) / kStripPairs; }
RIVER_BOTH constexpr int64_t gate_up_channels(int64_t strips) { return strips * kStripPairs; }
RIVER_BOTH constexpr GateUpRow gate_up_row(int strip, int r) { return {second_of_pair(r), pair_at(strip, r)}; }
RIVER_BOTH constexpr int packed_row(const GateUpRow& at) { return row_of_pair(at.channel, at.up); }

// ---- qkv_proj ---------------------------------------------------------------------------------------

enum QkvKind { kQuery, kKey, kValue };

struct QkvRow {
  QkvKind kind;
  int head, dim;  // head < 0: padding
};

// The segments Q, K and V follow each other, each padded to whole strips. V is in natural order. Q and K go by pairs,
// head by head: first the dims that rotate together, (i, i + rotary_dim / 2), then those that pass through, two
// neighbours a pair. A head has head_dim / 2 pairs, so that a strip may hold rows of several heads, and a head may
// begin in the middle of a strip.
struct QkvOrder {
  int num_heads, num_kv_heads, head_dim, rotary_dim;
  int q_strips, kv_strips;  // kv_strips: of K, and as many of V

  RIVER_BOTH constexpr QkvOrder(int num_heads, int num_kv_heads, int head_dim, int rotary_dim)
      : num_heads(num_heads), num_kv_heads(num_kv_heads), head_dim(head_dim), rotary_dim(rotary_dim),
        q_strips((num_heads * head_dim + kTileRows - 1) / kTileRows),
        kv_strips((num_kv_heads * head_dim + kTileRows - 1) / kTileRows) {}
  RIVER_BOTH constexpr explicit QkvOrder(const BlockArgs& a)
      : QkvOrder(a.num_heads, a.num_kv_heads, a.head_dim, a.rotary_dim) {}

  RIVER_BOTH constexpr int strips() const { return q_strips + 2 * kv_strips; }
  RIVER_BOTH constexpr int heads(QkvKind kind) const { return kind == kQuery ? num_heads : num_kv_heads; }
  RIVER_BOTH constexpr QkvKind kind_of(int strip) const {
    return strip < q_strips ? kQuery : strip < q_strips + kv_strips ? kKey : kValue;
  }
  RIVER_BOTH constexpr int first_strip(QkvKind kind) const {
    return kind == kQuery ? 0 : kind == kKey ? q_strips : q_strips + kv_strips;
  }

  RIVER_BOTH constexpr QkvRow row(int strip, int r) const {
    const QkvKind kind = kind_of(strip);
    const int within = strip - first_strip(kind);
    if (kind == kValue) {
      const int n = within * kTileRows + r;
      return {kind, n < num_kv_heads * head_dim ? n / head_dim : -1, n % head_dim};
    }
    const int pair = pair_at(within, r), head = pair / head_pairs();
    return {kind, head < heads(kind) ? head : -1, dim_of(pair % head_pairs(), second_of_pair(r))};
  }

  // The inverse, for rows that are no padding
  RIVER_BOTH constexpr int packed_row(const QkvRow& at) const {
    const int start = first_strip(at.kind) * kTileRows;
    if (at.kind == kValue) return start + at.head * head_dim + at.dim;
    return start + row_of_pair(at.head * head_pairs() + pair_of_dim(at.dim), second_dim(at.dim));
  }

  // From a dim of a head on, how many follow each other in packed rows, too
  RIVER_BOTH constexpr int run(QkvKind kind, int head, int dim) const {
    if (kind == kValue) return head_dim - dim;
    if (dim >= rotary_dim) return 1;
    const int pair = pair_of_dim(dim), to_strip = kStripPairs - (head * head_pairs() + pair) % kStripPairs;
    return rotary_pairs() - pair < to_strip ? rotary_pairs() - pair : to_strip;
  }

  // A head of Q or K may lie in several strips, and a strip of them may hold several heads, first to last.
  RIVER_BOTH constexpr int strips_of_head(int head) const {
    return ((head + 1) * head_pairs() - 1) / kStripPairs - head * head_pairs() / kStripPairs + 1;
  }
  RIVER_BOTH constexpr int first_head(int strip) const {
    return pair_at(strip - first_strip(kind_of(strip)), 0) / head_pairs();
  }
  RIVER_BOTH constexpr int last_head(int strip) const {
    const QkvKind kind = kind_of(strip);
    const int head = pair_at(strip - first_strip(kind), kStripPairs - 1) / head_pairs();
    return head < heads(kind) ? head : heads(kind) - 1;
  }

 private:
  RIVER_BOTH constexpr int head_pairs() const { return head_dim / 2; }
  RIVER_BOTH constexpr int rotary_pairs() const { return rotary_dim / 2; }

  // Between a dim of a head and its pair there, which it is the first or the second of
  RIVER_BOTH constexpr int dim_of(int pair, bool second) const {
    if (pair < rotary_pairs()) return pair + (second ? rotary_pairs() : 0);
    return rotary_dim + 2 * (pair - rotary_pairs()) + (second ? 1 : 0);
  }
  RIVER_BOTH constexpr int pair_of_dim(int dim) const {
    if (dim >= rotary_dim) return rotary_pairs() + (dim - rotary_dim) / 2;
    return second_dim(dim) ? dim - rotary_pairs() : dim;
  }
  RIVER_BOTH constexpr bool second_dim(int dim) const {
    return dim < rotary_dim ? dim >= rotary_pairs() : (dim - rotary_dim) % 2 == 1;
  }
};

}  // namespace river
