// The epilogues of one layer (epilogue.cuh says what an epilogue is), for dense and W4 weights alike:
//   QkvEpilogue       bias, RoPE, queries to scratch memory, K and V to the cache;
//   ResidualEpilogue  the sum with the residual, of o_proj and down_proj;
//   GateUpEpilogue    SwiGLU.
// By the packed orders of row_order.h, what QkvEpilogue and GateUpEpilogue combine lies in output rows g and g + 8 of a
// strip: thread i < 64 has both, g = i / 8, of row t = i % 8.
#pragma once

#include "../../row_order.h"
#include "cache_places.cuh"
#include "epilogue.cuh"

namespace river::device {

// With q/k norms a head is done only when all of its values are known: they go to raw_heads, and the last block to
// bring values of a head norms and rotates it.
template <class T>
struct QkvEpilogue : PlainEpilogue {
  using State = Place;  // of the row of this thread
  struct Asked {
    float cos, sin;  // of the dims that this thread rotates
  };

  BlockArgs a;
  QkvOrder order;
  T* query;            // [T, heads, head_dim]
  float* raw_heads;    // [T, heads + kv_heads, head_dim], with q/k norms only
  uint32_t* counters;  // [heads + kv_heads], zero before and after, with q/k norms only

  RIVER_DEVICE Place begin() const {
    const int t = row_of_thread();
    return t < a.rows ? place_in_cache(a, t) : Place{};
  }

  RIVER_DEVICE Asked ask(int strip, const Place& place) const {
    const int g = output_row_of_thread();
    const QkvRow first = order.row(strip, g % kStripPairs);
    const bool rotates =
        g < kStripPairs && place.active() && first.kind != kValue && first.head >= 0 && first.dim < a.rotary_dim;
    return rotates && !a.q_norm ? table(first.dim, place) : Asked{};
  }

  RIVER_DEVICE void finish(int strip, const StripTotals& totals, const Asked& asked, const Place& place) const {
    const QkvKind kind = order.kind_of(strip);
    const bool normed = kind != kValue && a.q_norm;
    const int g = output_row_of_thread(), t = row_of_thread();
    if (g < kStripPairs && t < a.rows) {
      const QkvRow first = order.row(strip, g), second = order.row(strip, g + kStripPairs);
      float lo = totals(g, t) + bias(first), hi = totals(g + kStripPairs, t) + bias(second);
      if (normed) {
        store_raw(first, t, lo);
        store_raw(second, t, hi);
      } else {
        if (kind != kValue && first.dim < a.rotary_dim) rotate(asked, lo, hi);
        store(first, t, place, lo);
        store(second, t, place, hi);
      }
    }
    if (!normed) return;
    const int last = order.last_head(strip);
    for (int head = order.first_head(strip); head <= last; head++)
      if (readers_arrive_last(counters + kind * a.num_heads + head, order.strips_of_head(head)))
        finish_head(kind, head);
  }

 private:
  RIVER_DEVICE float bias(const QkvRow& at) const {
    const void* biases = at.kind == kQuery ? a.q_bias : at.kind == kKey ? a.k_bias : a.v_bias;
    return biases && at.head >= 0 ? to_float(static_cast<const T*>(biases)[at.head * a.head_dim + at.dim]) : 0.f;
  }

  // [head_dim]
  RIVER_DEVICE float* raw_head(QkvKind kind, int head, int t) const {
    return raw_heads + (int64_t(t) * (a.num_heads + a.num_kv_heads) + kind * a.num_heads + head) * a.head_dim;
  }
  RIVER_DEVICE void store_raw(const QkvRow& at, int t, float value) const {
    if (at.head >= 0) raw_head(at.kind, at.head, t)[at.dim] = value;
  }

  // Of dims i and i + rotary_dim / 2
  RIVER_DEVICE Asked table(int i, const Place& place) const {
    const int64_t entry = int64_t(place.position) * (a.rotary_dim / 2) + i;
    return {a.cos[entry], a.sin[entry]};
  }
  static RIVER_DEVICE void rotate(const Asked& by, float& lo, float& hi) {
    const float x = lo, y = hi;
    lo = x * by.cos - y * by.sin;
    hi = y * by.cos + x * by.sin;
  }

  RIVER_DEVICE void store(const QkvRow& at, int t, const Place& place, float value) const {
    if (at.head < 0 || !place.active()) return;
    if (at.kind == kQuery) {
      if (a.query_scale) value *= a.query_scale[place.position];
      query[(int64_t(t) * a.num_heads + at.head) * a.head_dim + at.dim] = from_float<T>(value);
    } else {
      T* cache = static_cast<T*>(at.kind == kKey ? a.k_cache : a.v_cache);
      const int64_t entry = (int64_t(place.slot) * a.num_kv_heads + at.head) * a.max_len + place.position;
      cache[entry * a.head_dim + at.dim] = from_float<T>(value);
    }
  }

  // Norm and rotation of one head, one warp per row
  RIVER_DEVICE void finish_head(QkvKind kind, int head) const {
    const int t = warp_id(), half = a.rotary_dim / 2;
    if (t >= a.rows) return;
    const Place place = place_in_cache(a, t);
    if (!place.active()) return;
    const float* values = raw_head(kind, head, t);
    const T* norm = static_cast<const T*>(kind == kQuery ? a.q_norm : a.k_norm);
    float squares = 0;
    for (int i = lane_id(); i < a.head_dim; i += kWarp) {
      const float v = load_written(values + i);
      squares += v * v;
    }
    const float inverse = 1.f / sqrtf(warp_sum(squares) / a.head_dim + a.rms_norm_eps);
    auto normed = [&](int i) { return load_written(values + i) * (inverse * to_float(norm[i])); };
    for (int i = lane_id(); i < half; i += kWarp) {
      float lo = normed(i), hi = normed(i + half);
      rotate(table(i, place), lo, hi);
      store({kind, head, i}, t, place, lo);
      store({kind, head, i + half}, t, place, hi);
    }
    for (int i = a.rotary_dim + lane_id(); i < a.head_dim; i += kWarp) store({kind, head, i}, t, place, normed(i));
  }
};

template <class T>
struct ResidualEpilogue : PlainEpilogue {
  struct State {
    bool active;  // the row of this thread
  };
  struct Asked {
    T residual;
  };

  const T* residual;  // [T, hidden]
  const T* bias;      // [hidden] or null
  float multiplier;   // of what is added to the residual
  T* out;             // [T, hidden]; an inactive row keeps its residual
  Places places;
  int rows, hidden_size;

  RIVER_DEVICE State begin() const {
    const int t = row_of_thread();
    return {t < rows && place_in_cache(places, t).active()};
  }

  RIVER_DEVICE Asked ask(int strip, const State&) const {
    const int output_row = output_row_of_thread(), t = row_of_thread();
    if (output_row >= kTileRows || t >= rows) return {};
    return {load_written(residual + int64_t(t) * hidden_size + strip * kTileRows + output_row)};
  }

  RIVER_DEVICE void finish(int strip, const StripTotals& totals, const Asked& asked, const State& state) const {
    const int output_row = output_row_of_thread(), t = row_of_thread(), n = strip * kTileRows + output_row;
    if (output_row >= kTileRows || t >= rows) return;
    const float before = to_float(asked.residual), sum = totals(output_row, t) + (bias ? to_float(bias[n]) : 0.f);
    out[int64_t(t) * hidden_size + n] = from_float<T>(state.active ? before + multiplier * sum : before);
  }
};

template <class T>
struct GateUpEpilogue : PlainEpilogue {
  T* out;  // [T, channels]
  int rows, channels;

  RIVER_DEVICE void finish(int strip, const StripTotals& totals, const Asked&, State&) const {
    const int g = output_row_of_thread(), t = row_of_thread(), channel = gate_up_row(strip, g).channel;
    if (g >= kStripPairs || t >= rows || channel >= channels) return;
    const float gate = totals(g, t), up = totals(g + kStripPairs, t);
    out[int64_t(t) * channels + channel] = from_float<T>(gate / (1.f + expf(-gate)) * up);
  }
};

}  // namespace river::device
