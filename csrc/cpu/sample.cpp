// sample on a CPU. The largest logit of every span of 256 tokens is found first; after that, whatever filters looks
// only into the spans that can hold a token it keeps. Compiled once, for the plainest processor: the same bits on all
// of them.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <vector>

#include "../sampling.h"
#include "noise.h"

namespace river::cpu {

namespace {

constexpr int kSpan = 256;         // tokens
constexpr int kSpansPerTask = 64;  // less is not worth a thread
constexpr int kGroup = 16;         // tokens whose noise or weights come together

// The largest of n logits; NaN if one of them is NaN or infinite. In integers, whose maximum the compiler vectorises.
float largest_of(const float* logits, int n) {
  int32_t most = INT32_MIN;  // the logits' bits, ordered as signed numbers: an involution
  uint32_t failed = 0;
  for (int i = 0; i < n; i++) {
    const auto bits = int32_t(bits_of(logits[i]));
    const int32_t ordered = bits ^ ((bits >> 31) & 0x7fffffff);
    most = ordered > most ? ordered : most;
    failed |= !is_finite(logits[i]);
  }
  return failed ? NAN : float_of(uint32_t(most ^ ((most >> 31) & 0x7fffffff)));
}

struct Row {
  const float* logits;  // [vocab]
  int vocab_size;
  DrawRule rule;
  uint64_t seed;
  int32_t position;
  std::vector<float> span_largest;  // logits, or NaN
  float largest = NAN;              // logit; of a row with a token
  uint64_t total = 0;               // of the weights at temperature 1,
  uint64_t nucleus_total = 0;       // and at the row's own, where top_p filters all tokens
  uint64_t cut = 0;                 // tokens stay with keys above this
  uint64_t best = 0;                // key of the best score

  Row(const SampleArgs& a, int t)
      : logits(a.logits + int64_t(t) * a.vocab_size), vocab_size(a.vocab_size),
        rule(a.temperature[t], a.top_k[t], a.top_p[t], a.min_p[t], a.vocab_size), seed(uint64_t(a.seeds[t])),
        position(a.positions[t]), span_largest(ceil_div(a.vocab_size, kSpan)) {}

  int spans() const { return int(span_largest.size()); }
  int first(int span) const { return span * kSpan; }
  int end(int span) const { return std::min((span + 1) * kSpan, vocab_size); }

  bool failed() const { return !is_finite(largest); }
  bool keeps(float logit, int id) const {
    return token_key(logit, id) > cut && (rule.greedy || rule.min_p_keeps(logit, largest));
  }
  // False: it keeps no token of the span.
  bool may_keep(int span) const { return keeps(span_largest[span], first(span)); }

  uint64_t weight(uint64_t key) const { return weight_of(rule.scale(value_of(key), largest)); }
};

// NaN if one of them is
float largest_of(const std::vector<float>& spans) {
  float most = -INFINITY;
  for (const float largest : spans) {
    if (!is_finite(largest)) return NAN;
    most = std::max(most, largest);
  }
  return most;
}

uint64_t sum_of_weights(const Row& row, int span, float temperature) {
  uint64_t sum = 0;
  for (int i = row.first(span); i < row.end(span); i += kGroup) {
    uint32_t bits[kGroup];
    const int n = std::min(kGroup, row.end(span) - i);
    for (int j = 0; j < n; j++) bits[j] = exp_bits(scaled(row.logits[i + j], row.largest, temperature));
    for (int j = 0; j < n; j++) sum += fixed_point(bits[j]);
  }
  return sum;
}

// A logit that at least `count` tokens reach: the largest of the count-th best span
float reached_by(const Row& row, int count) {
  if (count > row.spans()) return -INFINITY;
  std::vector<float> largest = row.span_largest;
  std::nth_element(largest.begin(), largest.begin() + (count - 1), largest.end(), std::greater<>());
  return largest[count - 1];
}

// The keys of the tokens whose logits reach the bound, in no order
std::vector<uint64_t> at_least(const Row& row, float bound) {
  std::vector<uint64_t> keys;
  for (int span = 0; span < row.spans(); span++) {
    if (row.span_largest[span] < bound) continue;
    for (int i = row.first(span); i < row.end(span); i++)
      if (row.logits[i] >= bound) keys.push_back(token_key(row.logits[i], i));
  }
  return keys;
}

uint64_t sum_of_weights(const Row& row, const std::vector<uint64_t>& keys) {
  uint64_t sum = 0;
  for (const uint64_t key : keys) sum += row.weight(key);
  return sum;
}

// The keys of tokens that together weigh the limit, and of all that are likelier: of those less and less likely than
// the best one, until they are enough.
std::vector<uint64_t> weighing(const Row& row, uint64_t limit) {
  for (float reach = 2;; reach *= 1.5f) {
    std::vector<uint64_t> keys = at_least(row, row.largest - reach * row.rule.temperature);
    if (sum_of_weights(row, keys) >= limit) return keys;
  }
}

// Leaves the keys of which the larger ones measure less than the limit, which is at least 1. Halves what is undecided,
// and measures the upper half.
template <class Measure>
void keep_below(std::vector<uint64_t>& keys, uint64_t limit, Measure measure) {
  auto begin = keys.begin(), end = keys.end();
  for (uint64_t before = 0; end - begin > 1;) {  // `before` of begin
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, std::greater<>());
    uint64_t upto = before;
    for (auto key = begin; key != middle; ++key) upto += measure(*key);
    if (upto >= limit) {
      end = middle;
    } else {
      begin = middle;
      before = upto;
    }
  }
  keys.erase(end, keys.end());
}

// Where top_k and top_p cut
uint64_t cut_off(const Row& row) {
  const DrawRule& rule = row.rule;
  if (rule.greedy) return token_key(row.largest, row.vocab_size);  // ties with the largest stay
  if (!rule.top_k && !rule.top_p) return 0;
  std::vector<uint64_t> keys;
  if (rule.top_k) {
    keys = at_least(row, reached_by(row, rule.top_k));
    keep_below(keys, rule.top_k, [](uint64_t) { return 1; });
  }
  if (rule.top_p) {
    const uint64_t limit = rule.nucleus_limit(rule.top_k ? sum_of_weights(row, keys) : row.nucleus_total);
    if (!rule.top_k) keys = weighing(row, limit);
    keep_below(keys, limit, [&](uint64_t key) { return row.weight(key); });
  }
  return *std::min_element(keys.begin(), keys.end()) - 1;
}

// The key of the best score in a span
uint64_t best_of(const Row& row, int span) {
  uint64_t best = 0;
  for (int i = row.first(span); i < row.end(span); i += kGroup) {
    const int n = std::min(kGroup, row.end(span) - i);
    bool kept[kGroup], any = false;
    for (int j = 0; j < n; j++) any |= kept[j] = row.keeps(row.logits[i + j], i + j);
    if (!any) continue;
    float scores[kGroup] = {};
    std::copy_n(row.logits + i, n, scores);
    if (!row.rule.greedy) add_noise(scores, row.rule.temperature, row.seed, row.position, i, scores);
    for (int j = 0; j < n; j++)
      if (kept[j]) best = std::max(best, token_key(scores[j], i + j));
  }
  return best;
}

void raise(uint64_t& best, uint64_t key) {
  std::atomic_ref shared(best);
  for (uint64_t seen = shared; key > seen && !shared.compare_exchange_weak(seen, key);) {}
}

}  // namespace

void launch_sample(const SampleArgs& a, const Parallel& parallel) {
  std::vector<Row> rows;
  for (int t = 0; t < a.rows; t++) rows.emplace_back(a, t);
  const int spans = rows[0].spans();
  const auto for_spans = [&](auto f) {
    parallel(int64_t(a.rows) * spans, kSpansPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) f(rows[i / spans], int(i % spans));
    });
  };

  for_spans([](Row& row, int span) {
    row.span_largest[span] = largest_of(row.logits + row.first(span), row.end(span) - row.first(span));
  });
  for (Row& row : rows) row.largest = largest_of(row.span_largest);
  for_spans([](Row& row, int span) {
    if (row.failed()) return;
    std::atomic_ref(row.total) += sum_of_weights(row, span, 1);
    if (row.rule.top_p && !row.rule.top_k)
      std::atomic_ref(row.nucleus_total) += sum_of_weights(row, span, row.rule.temperature);
  });
  parallel(a.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      if (!rows[t].failed()) rows[t].cut = cut_off(rows[t]);
  });
  for_spans([](Row& row, int span) {
    if (!row.failed() && row.may_keep(span)) raise(row.best, best_of(row, span));
  });

  for (int t = 0; t < a.rows; t++) {
    const Row& row = rows[t];
    const int64_t token = row.failed() ? kNoToken : token_of(row.best);
    a.tokens[t] = token;
    a.logprobs[t] = row.failed() ? NAN : log_probability(row.logits[token], row.largest, row.total);
  }
}

}  // namespace river::cpu
