// Attention of the rows of one slot over one split of the context, by a block. Query heads of one KV head, of all these
// rows, are the columns of the tensor cores' products (8 to a tile of columns), and K and V are their weights: as with
// weights, the cost is that of reading them, and every K and V is read once for all rows.
//
// The functions of SplitAttention stand in the order in which a block calls them. A warp takes 16 positions at a time.
// - Scores: rows of a product are positions. A lane's 16 bytes of K are the operands of two products, with the dims in
//   another order, which a sum over them does not notice.
// - Softmax: a warp per query head, in fp32.
// - Values: rows of a product are dims, 64 to a warp; columns of V are the positions. A weight goes in as the sum of
//   16-bit numbers, as many as its fp32 bits need. Warps with the same dims have different positions, and their sums
//   are added in order.
//
// A column takes no notice of the others, and positions lie where they lie whoever sees them, so that a row gets the
// same bits alone. One product could still carry something over: zero times a V that is not finite. Where a row does
// not see all of 16 positions that another one sees, each row has a product of its own.
#pragma once

#include "slot_rows.cuh"

namespace river::device {

constexpr int kAttentionThreads = 128;
constexpr int kAttentionWarps = kAttentionThreads / kWarp;
constexpr int kColumns = 8;    // query heads of a product
constexpr int kTile = 16;      // positions of a product
constexpr int kWarpDims = 64;  // dims of V that a warp takes
constexpr int kScores = 260;   // fp32 between query heads in shared memory: keeps lanes on different banks

// Of a block that works for up to kTiles * kColumns query heads at a time
template <int kDims, int kTiles>
struct AttentionMemory {
  static constexpr int kQueries = kTiles * kColumns;

  struct Query {
    int row, head;    // head: of all query heads
    int first, last;  // positions that the row sees; none for a column without a query head
  };

  alignas(16) uint16_t query[kQueries][kDims + 32];  // padded: keeps lanes on different banks
  alignas(16) float score[kQueries][kScores];  // scores; then weights; then values, [warps with the same dims, kDims].
                                               // In the merge: factors of splits
  float state[kQueries][2];                    // kLargest, kSum
  Query of[kQueries];
  Query row[kMaxRows];  // the rows of the slot; head is not used
};

RIVER_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
RIVER_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

RIVER_DEVICE uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

template <class T, int kDims, int kTiles>
struct SplitAttention {
  static constexpr int kChunks = kDims / 32;                      // of K, that four lanes load together
  static constexpr int kSides = kDims / kWarpDims;                // warps with different dims of V
  static constexpr int kShares = kAttentionWarps / kSides;        // warps with the same dims
  static constexpr int kTerms = std::is_same_v<T, bf16> ? 3 : 2;  // of a weight: 8 bits each, or 11
  static_assert(kShares * kDims <= kScores && kMaxSplit <= kScores);

  struct Keys {
    uint4 row[2][kChunks];  // of positions g and g + 8
    bool valid[2];
  };
  struct Values {
    uint4 row[4];  // of positions 4 t to 4 t + 3, dims 8 g to 8 g + 7 of the warp's
  };

  const AttentionArgs& a;
  const Partials& partials;
  const SlotRows& rows;
  AttentionMemory<kDims, kTiles>& shared;
  int kv_head;
  int queries = 0, tiles = 0;  // of this pass, and their tiles of columns

  // The next functions are for these query heads: of all that the slot's rows have, in order of rows, `first` and on.
  RIVER_DEVICE void take_queries(int first) {
    const int group = a.num_heads / a.num_kv_heads;
    queries = min(rows.count * group - first, kTiles * kColumns);
    tiles = (queries + kColumns - 1) / kColumns;
#pragma unroll 1
    for (int q = threadIdx.x; q < tiles * kColumns; q += kAttentionThreads) {
      auto& query = shared.of[q];
      query = {.row = 0, .head = 0, .first = 0, .last = -1};
      if (q >= queries) continue;
      query = shared.row[(first + q) / group];
      query.head = kv_head * group + (first + q) % group;
    }
    __syncthreads();
  }

  // The keys of this warp's first positions of a split; nothing is loaded past the last split.
  RIVER_DEVICE Keys first_keys(int split) const {
    Keys keys;
    load_keys(split * rows.size + warp_id() * kTile, keys);
    return keys;
  }

  RIVER_DEVICE void load_queries() const {
#pragma unroll 2
    for (int i = threadIdx.x; i < tiles * kColumns * (kDims / 8); i += kAttentionThreads) {
      const int q = i / (kDims / 8), d = i % (kDims / 8) * 8;
      const int64_t head = int64_t(shared.of[q].row) * a.num_heads + shared.of[q].head;
      const T* dims = static_cast<const T*>(a.query) + head * a.head_dim + d;
      *reinterpret_cast<uint4*>(&shared.query[q][d]) = q < queries && d < a.head_dim ? load_activations(dims) : uint4{};
    }
    __syncthreads();
  }

  // keys: the first ones of the split; then those of the split that is next
  RIVER_DEVICE void run(int split, int next, Keys& keys) const {
    score(split, keys);
    const Values values = first_values(split);
    softmax();
    weigh_values(split, values);
    keys = first_keys(next);  // the registers of the sums are free again
    write_partials(split);
  }

 private:
  // score = query . K * softmax_scale; -inf where the row does not see the position
  RIVER_DEVICE void score(int split, Keys next) const {
    constexpr bool kAhead = kDims < 256;  // the next keys are under way: else there are as many loads without
    constexpr int kStep = kAttentionWarps * kTile;
    const int begin = split * rows.size;
    for (int i = warp_id() * kTile; i < rows.size; i += kStep) {
      const Keys keys = next;
      if (kAhead && i + kStep < rows.size) load_keys(begin + i + kStep, next);
      score_tile(begin, i, keys);
      if (!kAhead && i + kStep < rows.size) load_keys(begin + i + kStep, next);
    }
  }

  // The V of this warp's first positions: they are under way during the softmax.
  RIVER_DEVICE Values first_values(int split) const {
    Values values;
    load_values(split * rows.size + share() * kTile, values);
    return values;
  }

  // weight = exp(score - largest), and the states
  RIVER_DEVICE void softmax() const {
    __syncthreads();
    for (int q = warp_id(); q < queries; q += kAttentionWarps) {
      float (&weight)[kScores] = shared.score[q];
      float largest = -INFINITY, sum = 0;
      for (int i = lane_id(); i < rows.size; i += kWarp) largest = fmaxf(largest, weight[i]);
      largest = warp_max(largest);
      for (int i = lane_id(); i < rows.size; i += kWarp) {
        weight[i] = weight[i] == -INFINITY ? 0.f : expf(weight[i] - largest);
        sum += weight[i];
      }
      sum = warp_sum(sum);
      if (lane_id() == 0) shared.state[q][Partials::kLargest] = largest, shared.state[q][Partials::kSum] = sum;
    }
    __syncthreads();
  }

  // value = weight . V
  RIVER_DEVICE void weigh_values(int split, Values next) const {
    const int begin = split * rows.size;
    float sum[kTiles][4][4] = {};  // of each tile of columns, and of each two dims of a lane: see store_values
    for (int i = share() * kTile; i < rows.size; i += kShares * kTile) {
      const Values values = next;
      if (i + kShares * kTile < rows.size) load_values(begin + i + kShares * kTile, next);
      const int p = begin + i;
      if (rows.count == 1 || (p >= rows.all_first && p + kTile - 1 <= rows.all_last)) {
        weigh_tile(i, values, sum, [](int) { return true; });
        continue;
      }
      for (int r = 0; r < rows.count; r++) {
        const auto row = shared.row[r];
        if (p > row.last || p + kTile <= row.first) continue;
        Values seen = values;
#pragma unroll
        for (int k = 0; k < 4; k++)
          if (const int at = p + 4 * part() + k; at < row.first || at > row.last) seen.row[k] = {};
        weigh_tile(i, seen, sum, [&](int q) { return shared.of[q].row == row.row; });
      }
    }
    __syncthreads();  // all have read the weights, which the values replace
    store_values(sum);
    __syncthreads();
  }

  // The sums of warps with the same dims are added in order.
  RIVER_DEVICE void write_partials(int split) const {
    for (int i = threadIdx.x; i < queries * a.head_dim; i += kAttentionThreads) {
      const int q = i / a.head_dim, d = i % a.head_dim;
      const auto query = shared.of[q];
      const int first = split_of(query.first, rows.size);
      if (split < first || split > split_of(query.last, rows.size)) continue;
      float total = 0;
#pragma unroll
      for (int n = 0; n < kShares; n++) total += shared.score[q][n * kDims + d];
      float* partial = partials.at(query.row, query.head, split - first);
      partial[Partials::kValues + d] = total;
      if (d < 2) partial[d] = shared.state[q][d];
    }
    __syncthreads();
  }

  // A lane's place in an operand: its row, or its column of 8; and which part of the other extent
  RIVER_DEVICE int line() const { return lane_id() / 4; }
  RIVER_DEVICE int part() const { return lane_id() % 4; }
  RIVER_DEVICE int side() const { return warp_id() % kSides; }   // which dims of V this warp has
  RIVER_DEVICE int share() const { return warp_id() / kSides; }  // and which of the positions

  RIVER_DEVICE bool any_sees(int p) const {
    return p >= rows.first && p <= rows.last && (!a.kv_valid || a.kv_valid[int64_t(rows.slot) * a.max_len + p]);
  }

  // 8 dims of a position; zero where there are none, or nobody sees it
  RIVER_DEVICE uint4 load_dims(const void* cache, int p, int dim, bool seen) const {
    if (!seen || dim >= a.head_dim) return {};
    const int64_t position = (int64_t(rows.slot) * a.num_kv_heads + kv_head) * a.max_len + p;
    return load_activations(static_cast<const T*>(cache) + position * a.head_dim + dim);
  }

  RIVER_DEVICE void load_keys(int p0, Keys& keys) const {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int p = p0 + line() + 8 * half;
      keys.valid[half] = any_sees(p);
#pragma unroll
      for (int c = 0; c < kChunks; c++)
        keys.row[half][c] = load_dims(a.k_cache, p, 32 * c + 8 * part(), keys.valid[half]);
    }
  }

  RIVER_DEVICE void load_values(int p0, Values& values) const {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int p = p0 + 4 * part() + k;
      values.row[k] = load_dims(a.v_cache, p, kWarpDims * side() + 8 * line(), any_sees(p));
    }
  }

  // Of 16 positions, i and on in the split
  RIVER_DEVICE void score_tile(int begin, int i, const Keys& keys) const {
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      if (n >= tiles) break;
      float sum[4] = {};
#pragma unroll
      for (int c = 0; c < kChunks; c++) {
        const uint4 low = keys.row[0][c], high = keys.row[1][c];
        const auto query = *reinterpret_cast<const uint4*>(&shared.query[n * kColumns + line()][32 * c + 8 * part()]);
        mma_m16n8k16<T>(sum, {low.x, high.x, low.y, high.y}, {query.x, query.y});
        mma_m16n8k16<T>(sum, {low.z, high.z, low.w, high.w}, {query.z, query.w});
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int q = n * kColumns + 2 * part() + j % 2, at = i + line() + 8 * (j / 2);
        const int first = shared.of[q].first, last = shared.of[q].last;
        const bool sees = keys.valid[j / 2] && begin + at >= first && begin + at <= last;
        shared.score[q][at] = sees ? sum[j] * a.softmax_scale : -INFINITY;
      }
    }
  }

  // The weights of four positions as sums of 16-bit numbers, the largest first: the operands of a product
  RIVER_DEVICE static void split_weights(float4 w, uint32_t (&terms)[kTerms][2]) {
    float rest[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int term = 0; term < kTerms; term++) {
      T part[4];
#pragma unroll
      for (int k = 0; k < 4; k++) part[k] = from_float<T>(rest[k]), rest[k] -= to_float(part[k]);
      terms[term][0] = pair<T>(part[0], part[1]);
      terms[term][1] = pair<T>(part[2], part[3]);
    }
  }

  // Adds 16 positions, i and on in the split, to the sums of the query heads of which mine(q) is true.
  template <class Mine>
  RIVER_DEVICE void weigh_tile(int i, const Values& values, float (&sum)[kTiles][4][4], Mine mine) const {
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      if (n >= tiles) break;
      uint32_t weights[kTerms][2];
      split_weights(*reinterpret_cast<const float4*>(&shared.score[n * kColumns + line()][i + 4 * part()]), weights);
      const bool kept[2] = {mine(n * kColumns + 2 * part()), mine(n * kColumns + 2 * part() + 1)};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint32_t dims[4] = {low_halves(word(values.row[0], j), word(values.row[1], j)),
                                  high_halves(word(values.row[0], j), word(values.row[1], j)),
                                  low_halves(word(values.row[2], j), word(values.row[3], j)),
                                  high_halves(word(values.row[2], j), word(values.row[3], j))};
        float total[4];
#pragma unroll
        for (int k = 0; k < 4; k++) total[k] = sum[n][j][k];
#pragma unroll
        for (int term = 0; term < kTerms; term++) mma_m16n8k16<T>(total, dims, weights[term]);
#pragma unroll
        for (int k = 0; k < 4; k++)
          if (kept[k % 2]) sum[n][j][k] = total[k];
      }
    }
  }

  // A lane's sums are of two columns and 8 dims in a row.
  RIVER_DEVICE void store_values(const float (&sum)[kTiles][4][4]) const {
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      if (n >= tiles) break;
#pragma unroll
      for (int column = 0; column < 2; column++) {
        auto* value = reinterpret_cast<float4*>(
            &shared.score[n * kColumns + 2 * part() + column][share() * kDims + kWarpDims * side() + 8 * line()]);
        const auto at = [&](int d) { return sum[n][d / 2][column + 2 * (d % 2)]; };
        value[0] = make_float4(at(0), at(1), at(2), at(3));
        value[1] = make_float4(at(4), at(5), at(6), at(7));
      }
    }
  }
};

}  // namespace river::device
