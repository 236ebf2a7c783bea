// Attention of query heads that share a KV head, of any rows of one slot, over one split of the context; and how splits
// come together. Every K and V is read once for all of them.
//
// Scores: a block of keys is transposed, so that lanes are positions. A score is then a lane's own sum over the dims in
// order, whoever else is scored: 4 query heads x 4 vectors of positions at a time (AVX-512) use each key four times and
// each query four times, and nothing has to be added across lanes. bf16 keys stay pairs where there is vdpbf16ps.
// Values: lanes are dims, and a value is a sum over the positions in order. So a query head's bits depend on the
// positions that it sees and on nothing else.
#pragma once

#include <utility>  // integer_sequence, a type

#include "kernels.h"
#include "simd.h"

namespace {

using river::DType;
using river::kMaxHeadDim;
using river::cpu::AttentionState;
using river::cpu::kScores;
using river::cpu::kSplit;
using river::cpu::Range;
using river::cpu::SplitArgs;

constexpr int kHeads = 4;                                 // query heads at a time, at most, and
constexpr int kBeside = kSums / kHeads;                   // vectors of positions (scores) or of dims beside them
constexpr int kLanes = kPieceBytes / int(sizeof(float));  // of a vector of positions: one register
constexpr int kBlock = kBeside * kLanes;                  // positions that are transposed together
static_assert(kSplit % kBlock == 0 && kSplit % 16 == 0);

#if defined(__AVX512BF16__)
template <DType D>
constexpr bool kPairs = D == DType::kBFloat16;  // a word holds two dims of a head; else one, as fp32
#else
template <DType D>
constexpr bool kPairs = false;
#endif

using Keys = WordPiece[kMaxHeadDim][kBeside];  // words of the keys of kBlock positions

// ---- loads ------------------------------------------------------------------------------------------

// 16 values of a head from index i. bf16 comes piece by piece: GCC would take a whole vector through memory.
template <DType D>
inline Values load_whole(const void* head, int i) {
  if constexpr (D != DType::kBFloat16 || kPieces == 1) return load_as_float(D, head, i);
  using Half = uint16_t __attribute__((vector_size(kPieceBytes / 2)));
  Values v;
  RIVER_UNROLL for (int j = 0; j < kPieces; j++) {
    const auto half = load<Half>(static_cast<const uint16_t*>(head) + i + 16 / kPieces * j);
    v.piece[j] = Piece(__builtin_convertvector(half, WordPiece) << 16);
  }
  return v;
}

// The same, zero past head_dim
template <DType D>
inline Values load_head(const void* head, int i, int head_dim) {
  return i + 16 <= head_dim ? load_whole<D>(head, i) : load_tail(D, head, i, head_dim);
}

// 16 words of a head from word i, zero past its end. Pairs are a head's memory as it is.
template <DType D>
inline Values load_words(const void* head, int i, int head_dim) {
  if constexpr (kPairs<D>) return load_head<DType::kFloat32>(head, i, head_dim / 2);
  else return load_head<D>(head, i, head_dim);
}

// The p-th position of a split in a cache, `bytes` a position
inline const char* position_of(const SplitArgs& a, const void* cache, int p, int64_t bytes) {
  return static_cast<const char*>(cache) + a.positions[p] * bytes;
}

// Asks L2 for what comes next while there is something to compute.
inline void ask_ahead(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// ---- scores -----------------------------------------------------------------------------------------

#if defined(RIVER_SHUFFLE)
// Lane l of row r and lane r of row l change places. Each step does so with one bit of both numbers.
template <int kBit, int... kLane>
inline void swap_lanes(Piece (&row)[kLanes], std::integer_sequence<int, kLane...>) {
  RIVER_UNROLL for (int r = 0; r < kLanes; r++) {
    if (r & kBit) continue;
    const Piece a = row[r], b = row[r + kBit];
    row[r] = RIVER_SHUFFLE(a, b, (kLane & kBit ? kLanes + kLane - kBit : kLane)...);
    row[r + kBit] = RIVER_SHUFFLE(a, b, (kLane & kBit ? kLanes + kLane : kLane + kBit)...);
  }
}

template <int kBit = kLanes / 2>
inline void transpose(Piece (&row)[kLanes]) {
  swap_lanes<kBit>(row, std::make_integer_sequence<int, kLanes>());
  if constexpr (kBit > 1) transpose<kBit / 2>(row);
}
#else
inline void transpose(Piece (&row)[kLanes]) {
  for (int r = 0; r < kLanes; r++)
    for (int lane = 0; lane < r; lane++) {
      const float x = row[r][lane];
      row[r][lane] = row[lane][r];
      row[lane][r] = x;
    }
}
#endif

// The keys of the positions from p0 on, a word of all of them after the other
template <DType D>
inline void transpose_keys(const SplitArgs& a, int p0, Keys& keys) {
  const int words = kPairs<D> ? a.head_dim / 2 : a.head_dim;
  const int64_t bytes = int64_t(a.head_dim) * river::size_of(D);
  for (int v = 0; v < kBeside; v++) {
    const char* head[kLanes];
    for (int lane = 0; lane < kLanes; lane++) {
      const int p = p0 + v * kLanes + lane, last = a.count - 1;  // past the last position: that one again
      head[lane] = position_of(a, a.k, p < last ? p : last, bytes);
      ask_ahead(position_of(a, a.k, p + kBlock < last ? p + kBlock : last, bytes), bytes);
      ask_ahead(position_of(a, a.v, p < last ? p : last, bytes), bytes);
    }
    for (int i = 0; i < words; i += 16) {
      Piece rows[kPieces][kLanes];
      RIVER_UNROLL for (int lane = 0; lane < kLanes; lane++) {
        const Values values = load_words<D>(head[lane], i, a.head_dim);
        RIVER_UNROLL for (int j = 0; j < kPieces; j++) rows[j][lane] = values.piece[j];
      }
      RIVER_UNROLL for (int j = 0; j < kPieces; j++) {
        transpose(rows[j]);
        RIVER_UNROLL for (int r = 0; r < kLanes; r++) keys[i + j * kLanes + r][v] = WordPiece(rows[j][r]);
      }
    }
  }
}

template <DType D>
inline Piece add_word(Piece sum, WordPiece key, WordPiece query) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs<D>) return Piece(_mm512_dpbf16_ps(__m512(sum), __m512bh(key), __m512bh(query)));
#endif
  return sum + Piece(key) * Piece(query);
}

// Calls f<G>(q) for the query heads q to q + G - 1, until it was called for all.
template <class F>
inline void for_heads(int count, F f) {
  int q = 0;
  for (; q + kHeads <= count; q += kHeads) f.template operator()<kHeads>(q);
  if (q + 3 == count) f.template operator()<3>(q);
  if (q + 2 == count) f.template operator()<2>(q);
  if (q + 1 == count) f.template operator()<1>(q);
}

// Positions that at least one of the query heads q to q + G - 1 sees, and that all of them see
struct Together {
  Range any{kSplit, 0}, all{0, kSplit};

  Together(const SplitArgs& a, int q, int G) {
    for (const Range* seen = a.seen + q; seen < a.seen + q + G; seen++) {
      any = {seen->begin < any.begin ? seen->begin : any.begin, seen->end > any.end ? seen->end : any.end};
      all = {seen->begin > all.begin ? seen->begin : all.begin, seen->end < all.end ? seen->end : all.end};
    }
  }
};

// scores[g][p] = query head q + g . k of position p, for the positions of a block from p0 on
template <DType D, int G>
inline void score_block(const SplitArgs& a, int q, int p0, const Keys& keys) {
  const uint32_t* query[G];
  for (int g = 0; g < G; g++) query[g] = a.query + int64_t(q + g) * a.head_dim;
  Piece sums[G][kBeside] = {};
  const int words = kPairs<D> ? a.head_dim / 2 : a.head_dim;
  for (int i = 0; i < words; i++) RIVER_UNROLL for (int g = 0; g < G; g++) {
      const WordPiece word = WordPiece{} + query[g][i];
      RIVER_UNROLL for (int v = 0; v < kBeside; v++) sums[g][v] = add_word<D>(sums[g][v], keys[i][v], word);
    }
  RIVER_UNROLL for (int g = 0; g < G; g++) RIVER_UNROLL for (int v = 0; v < kBeside; v++)
      store(a.scores + (q + g) * kScores + p0 + v * kLanes, sums[g][v]);
}

template <DType D>
void score(const SplitArgs& a) {
  alignas(64) Keys keys;
  for (int p0 = 0; p0 < a.count; p0 += kBlock) {
    transpose_keys<D>(a, p0, keys);
    for_heads(a.queries, [&]<int G>(int q) {
      const Range any = Together(a, q, G).any;
      if (any.begin < p0 + kBlock && any.end > p0) score_block<D, G>(a, q, p0, keys);
    });
  }
}

// ---- weights and values -----------------------------------------------------------------------------

inline float largest(f32x16 v) {
  float lane[16];
  store(lane, v);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lane[i] = lane[i + width] > lane[i] ? lane[i + width] : lane[i];
  return lane[0];
}

// The scores of the positions that a query head sees become weights, exp(score - max); max and sum go to its state.
inline void soften(const SplitArgs& a, int q) {
  const int count = a.seen[q].end - a.seen[q].begin;
  float* score = a.scores + q * kScores + a.seen[q].begin;
  const f32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const auto scaled = [&](int p) {
    const f32x16 s = load<f32x16>(score + p) * a.softmax_scale;
    return p + 16 <= count ? s : lane < float(count - p) ? s : splat(-__builtin_inff());
  };
  f32x16 most = splat(-__builtin_inff());
  for (int p = 0; p < count; p += 16) {
    const f32x16 s = scaled(p);
    most = s > most ? s : most;
  }
  float max = largest(most);
  if (max == -__builtin_inff()) max = 0;  // all weights are then 0, or NaN
  f32x16 sum{};
  for (int p = 0; p < count; p += 16) {
    const f32x16 e = vexp(scaled(p) - max);
    store(score + p, e);
    sum += e;
  }
  a.out[q].max = max;
  a.out[q].sum = reduce(sum);
}

// value += the sum over `positions` of weight * v, for the query heads q to q + G - 1 and N vectors of dims from dim i
// on. `dims` loads 16 dims of a head: whether there are so many is known outside of the loop, or GCC would keep the
// sums in memory.
template <int G, int N, class Load>
inline void add_values(const SplitArgs& a, int q, Range positions, int i, int64_t bytes, Load dims) {
  Sum sums[G][N];
  RIVER_UNROLL for (int g = 0; g < G; g++) RIVER_UNROLL for (int n = 0; n < N; n++)
      sums[g][n] = {load<f32x16>(a.out[q + g].value + i + 16 * n)};
  const float* weight = a.scores + q * kScores;
  for (int p = positions.begin; p < positions.end; p++) {
    const char* head = position_of(a, a.v, p, bytes);
    RIVER_UNROLL for (int n = 0; n < N; n++) {
      const Values value = dims(head, i + 16 * n);
      RIVER_UNROLL for (int g = 0; g < G; g++) sums[g][n].add(value, weight[g * kScores + p]);
    }
  }
  RIVER_UNROLL for (int g = 0; g < G; g++) RIVER_UNROLL for (int n = 0; n < N; n++)
      store(a.out[q + g].value + i + 16 * n, sums[g][n].all());
}

// Of all dims from i on
template <DType D, int G, int N = kBeside>
inline void add_all_values(const SplitArgs& a, int q, Range positions, int i = 0) {
  if (positions.begin >= positions.end) return;
  const int64_t bytes = int64_t(a.head_dim) * river::size_of(D);
  for (; i + 16 * N <= a.head_dim; i += 16 * N) add_values<G, N>(a, q, positions, i, bytes, load_whole<D>);
  if constexpr (N > 1) return add_all_values<D, G, N / 2>(a, q, positions, i);
  else if (i < a.head_dim)
    add_values<G, 1>(a, q, positions, i, bytes,
                     [&](const void* head, int i) { return load_tail(D, head, i, a.head_dim); });
}

// The weighted values of query heads: together over the positions that all of them see, and one by one before and
// behind. What a query head does not see may be NaN, and takes no part.
template <DType D, int G>
inline void weigh(const SplitArgs& a, int q) {
  Range all = Together(a, q, G).all;
  if (all.begin >= all.end) all = {kSplit, kSplit};
  for (int g = q; g < q + G; g++) {
    const Range seen = a.seen[g];
    memset(a.out[g].value, 0, river::round_up(a.head_dim, 16) * sizeof(float));
    add_all_values<D, 1>(a, g, {seen.begin, all.begin < seen.end ? all.begin : seen.end});
  }
  add_all_values<D, G>(a, q, all);
  for (int g = q; g < q + G; g++) add_all_values<D, 1>(a, g, {all.end, a.seen[g].end});
}

template <DType D>
void attend_as(const SplitArgs& a) {
  score<D>(a);
  for (int q = 0; q < a.queries; q++) soften(a, q);
  for_heads(a.queries, [&]<int G>(int q) { weigh<D, G>(a, q); });
}

void attend(const SplitArgs& a) {
  with_dtype(a.dtype, [&]<DType D>() { attend_as<D>(a); });
}

void pack_query(DType dtype, const void* query, int head_dim, uint32_t* words) {
  with_dtype(dtype, [&]<DType D>() {
    if constexpr (kPairs<D>) memcpy(words, query, head_dim * river::size_of(D));
    else
      for_lanes(D, query, head_dim, [&](int64_t i, f32x16 v) { store_lanes(DType::kFloat32, words, i, head_dim, v); });
  });
}

// ---- splits -----------------------------------------------------------------------------------------

// The larger of the largest scores scales both, so that no exp overflows.
void absorb(const AttentionState& split, int head_dim, AttentionState& before) {
  if (split.sum == 0) return;  // saw nothing; NaN scores give a NaN sum and go on
  const int padded = int(river::round_up(head_dim, 16));
  if (before.sum == 0) {
    before.max = split.max;
    before.sum = split.sum;
    memcpy(before.value, split.value, padded * sizeof(float));
    return;
  }
  const float max = split.max > before.max ? split.max : before.max;
  const f32x16 factors = vexp(f32x16{before.max - max, split.max - max});
  before.max = max;
  before.sum = before.sum * factors[0] + split.sum * factors[1];
  for (int i = 0; i < padded; i += 16)
    store(before.value + i, load<f32x16>(before.value + i) * factors[0] + load<f32x16>(split.value + i) * factors[1]);
}

void average(const AttentionState& state, DType dtype, int head_dim, void* out) {
  for (int i = 0; i < head_dim; i += 16)
    store_lanes(dtype, out, i, head_dim, state.sum == 0 ? f32x16{} : load<f32x16>(state.value + i) / state.sum);
}

}  // namespace
