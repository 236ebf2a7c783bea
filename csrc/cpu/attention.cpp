// decode_attention on a CPU, for any number of rows. Rows of one slot share every read of its cache: in order of their
// positions they form blocks, and a block with a KV head goes through the context split by split, for all query heads
// of all its rows. Splits begin at multiples of kSplit positions and are added in order, so that what a row gets
// depends on its own position alone.
//
// The work is cut into pieces, which threads take one after the other. With many blocks (a prompt) a piece is a whole
// (block, KV head), and the state of a split is added while it is at hand. With few (decoding, verification) a piece is
// one split of those, and the states of all splits are kept until the last is done.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "linear.h"

namespace river::cpu {

namespace {

constexpr int kBlockHeads = 128;     // query heads of a block: enough that transposing the keys costs little
constexpr int64_t kManyPieces = 64;  // they keep as many threads busy

// Rows of one slot: `rows` of them in the order of positions, from `first` on
struct RowBlock {
  int slot, first, rows;
  int64_t first_split, splits;  // that any of the rows sees
};

// Room for the states of some query heads
class States {
 public:
  States(int64_t count, int64_t padded) : state_(count), values_(scratch<float>(count * padded)) {
    for (int64_t i = 0; i < count; i++) state_[i] = {.max = 0, .sum = 0, .value = &values_[i * padded]};
  }
  AttentionState* at(int64_t i) { return &state_[i]; }

 private:
  std::vector<AttentionState> state_;
  std::unique_ptr<float[]> values_;
};

class Attention {
 public:
  explicit Attention(const AttentionArgs& args)
      : a(args), group(a.num_heads / a.num_kv_heads), padded(round_up(a.head_dim, 16)) {
    for (int row = 0; row < a.rows; row++)
      if (a.slots[row] >= 0) order.push_back(row);
      else memset(out_of(row, 0), 0, int64_t(a.num_heads) * a.head_dim * size_of(a.dtype));
    std::sort(order.begin(), order.end(), [&](int x, int y) {
      return a.slots[x] != a.slots[y] ? a.slots[x] < a.slots[y] : a.positions[x] < a.positions[y];
    });
    const int most = std::max(kMaxRows, kBlockHeads / group);
    for (int i = 0; i < int(order.size()); i++) {
      const int row = order[i];
      if (blocks.empty() || blocks.back().slot != a.slots[row] || blocks.back().rows == most)
        blocks.push_back(
            {.slot = a.slots[row], .first = i, .rows = 0, .first_split = first_seen(row) / kSplit, .splits = 0});
      RowBlock& block = blocks.back();
      block.rows++;
      block.splits = a.positions[row] / kSplit - block.first_split + 1;
    }
  }

  void run(const Parallel& parallel) const {
    const int64_t pairs = int64_t(blocks.size()) * a.num_kv_heads;
    if (pairs < kManyPieces) return run_splits(parallel);
    for_pieces(pairs, 1, parallel, [&](int64_t i) {
      // The last blocks first: those of a prompt see the most.
      run_whole(blocks[blocks.size() - 1 - i / a.num_kv_heads], int(i % a.num_kv_heads));
    });
  }

 private:
  // ---- what rows see --------------------------------------------------------------------------------

  int64_t first_seen(int row) const {
    return a.sliding_window > 0 ? std::max<int64_t>(0, a.positions[row] - a.sliding_window + 1) : 0;
  }

  // Lists the positions of a split that any row of the block sees; returns how many.
  int positions(const RowBlock& block, int64_t split, int32_t (&out)[kSplit]) const {
    const int64_t begin = std::max(first_seen(order[block.first]), split * kSplit);
    const int64_t end = std::min<int64_t>(a.positions[order[block.first + block.rows - 1]] + 1, (split + 1) * kSplit);
    int count = 0;
    for (int64_t p = begin; p < end; p++)
      if (!a.kv_valid || a.kv_valid[int64_t(block.slot) * a.max_len + p]) out[count++] = int32_t(p);
    return count;
  }

  Range seen_by(int row, const int32_t* positions, int count) const {
    const auto index = [&](int64_t p) { return int(std::lower_bound(positions, positions + count, p) - positions); };
    return {.begin = index(first_seen(row)), .end = index(int64_t(a.positions[row]) + 1)};
  }

  // ---- one block and KV head ------------------------------------------------------------------------

  // What a thread needs beside the states; query heads are numbered row by row
  struct Room {
    int heads;
    std::unique_ptr<uint32_t[]> query;
    std::unique_ptr<float[]> scores;
    std::vector<Range> seen;

    Room(int heads, int head_dim)
        : heads(heads), query(scratch<uint32_t>(int64_t(heads) * head_dim)),
          scores(scratch<float>(int64_t(heads) * kScores)), seen(heads) {}
  };

  Room room(const RowBlock& block, int kv_head) const {
    Room room(block.rows * group, a.head_dim);
    for (int i = 0; i < room.heads; i++) {
      const int64_t head = int64_t(order[block.first + i / group]) * a.num_heads + kv_head * group + i % group;
      const void* query = at(a.query, a.dtype, head * a.head_dim);
      kernels().pack_query(a.dtype, query, a.head_dim, &room.query[int64_t(i) * a.head_dim]);
    }
    return room;
  }

  // Leaves the states of a split, [query heads]; not touched where no row sees a position of it.
  void attend(const RowBlock& block, int kv_head, int64_t split, Room& room, AttentionState* states) const {
    int32_t list[kSplit];
    const int count = positions(block, split, list);
    if (count == 0) return;
    for (int i = 0; i < room.heads; i++)
      room.seen[i] = i % group ? room.seen[i - 1] : seen_by(order[block.first + i / group], list, count);
    const int64_t cache = (int64_t(block.slot) * a.num_kv_heads + kv_head) * a.max_len * a.head_dim;
    kernels().attend({.dtype = a.dtype,
                      .queries = room.heads,
                      .head_dim = a.head_dim,
                      .softmax_scale = a.softmax_scale,
                      .query = room.query.get(),
                      .k = at(a.k_cache, a.dtype, cache),
                      .v = at(a.v_cache, a.dtype, cache),
                      .positions = list,
                      .count = count,
                      .seen = room.seen.data(),
                      .scores = room.scores.get(),
                      .out = states});
  }

  void absorb(const AttentionState* split, int heads, AttentionState* before) const {
    for (int i = 0; i < heads; i++) kernels().absorb(split[i], a.head_dim, before[i]);
  }

  void write(const RowBlock& block, int kv_head, const AttentionState* states) const {
    for (int i = 0; i < block.rows * group; i++)
      kernels().average(states[i], a.dtype, a.head_dim,
                        out_of(order[block.first + i / group], kv_head * group + i % group));
  }

  void* out_of(int row, int head) const {
    return cpu::at(a.out, a.dtype, (int64_t(row) * a.num_heads + head) * a.head_dim);
  }

  // ---- pieces ---------------------------------------------------------------------------------------

  // Calls f(i) for 0 to count - 1 by threads that take the next number when they are free.
  template <class F>
  static void for_pieces(int64_t count, int64_t grain, const Parallel& parallel, F f) {
    std::atomic<int64_t> next = 0;
    parallel(count, grain, [&](int64_t, int64_t) {
      for (int64_t i = next++; i < count; i = next++) f(i);
    });
  }

  void run_whole(const RowBlock& block, int kv_head) const {
    Room room = this->room(block, kv_head);
    States all(room.heads, padded), one(room.heads, padded);
    for (int64_t s = 0; s < block.splits; s++) {
      for (int i = 0; i < room.heads; i++) one.at(i)->sum = 0;
      attend(block, kv_head, block.first_split + s, room, one.at(0));
      absorb(one.at(0), room.heads, all.at(0));
    }
    write(block, kv_head, all.at(0));
  }

  // The last split of a (block, KV head) to be done adds up all of them.
  void run_splits(const Parallel& parallel) const {
    struct Piece {
      int64_t pair;    // the number of its (block, KV head)
      int64_t split;   // of those that the block sees
      int64_t states;  // the first of its pair, [splits, query heads]
    };
    const int64_t pairs = int64_t(blocks.size()) * a.num_kv_heads;
    std::vector<Piece> pieces;
    int64_t states = 0;
    for (int64_t pair = 0; pair < pairs; pair++) {
      const RowBlock& block = blocks[pair / a.num_kv_heads];
      for (int64_t s = 0; s < block.splits; s++) pieces.push_back({.pair = pair, .split = s, .states = states});
      states += block.splits * block.rows * group;
    }
    States all(states, padded);
    std::vector<std::atomic<int64_t>> done(pairs);  // splits of each
    const int64_t split_bytes = 2 * std::min<int64_t>(kSplit, a.max_len) * a.head_dim * size_of(a.dtype);
    for_pieces(int64_t(pieces.size()), ceil_div(kPieceBytes, split_bytes), parallel, [&](int64_t i) {
      const Piece& piece = pieces[i];
      const RowBlock& block = blocks[piece.pair / a.num_kv_heads];
      const int kv_head = int(piece.pair % a.num_kv_heads);
      Room room = this->room(block, kv_head);
      AttentionState* first = all.at(piece.states);
      attend(block, kv_head, block.first_split + piece.split, room, first + piece.split * room.heads);
      if (++done[piece.pair] < block.splits) return;
      for (int64_t s = 1; s < block.splits; s++) absorb(first + s * room.heads, room.heads, first);
      write(block, kv_head, first);
    });
  }

  const AttentionArgs& a;
  int group;               // query heads per KV head
  int64_t padded;          // head_dim in whole vectors of 16 lanes
  std::vector<int> order;  // active rows, by slot and position
  std::vector<RowBlock> blocks;
};

}  // namespace

void launch_decode_attention(const AttentionArgs& args, const Parallel& parallel) { Attention(args).run(parallel); }

}  // namespace river::cpu
