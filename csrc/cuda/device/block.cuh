// The phases of one layer that stream a weight, for dense and W4 weights alike: norm + QKV + RoPE + KV append;
// projection + residual (o_proj, down_proj); norm + gate/up + SwiGLU. A strip holds its rows in the packed orders of
// river_ext/w4.py, so that what an epilogue combines lies in rows g and g + 8: the two dims that rotate together, gate
// and up. Dense weights stay in checkpoint order; their sources look up each row.
#pragma once

#include "activations.cuh"

namespace river::device {

// Where row r of a strip of QKV lies: which of Q, K, V, and its head and dim. head < 0: padding.
struct QkvRow {
  int kind, head, dim;  // kind: 0 = Q, 1 = K, 2 = V
};

struct QkvOrder {
  int num_heads, num_kv_heads, head_dim, rotary_dim;
  int q_strips, kv_strips;  // K and V have as many each

  __host__ __device__ explicit QkvOrder(const BlockArgs& a)
      : num_heads(a.num_heads), num_kv_heads(a.num_kv_heads), head_dim(a.head_dim), rotary_dim(a.rotary_dim),
        q_strips((a.num_heads * a.head_dim + kTileRows - 1) / kTileRows),
        kv_strips((a.num_kv_heads * a.head_dim + kTileRows - 1) / kTileRows) {}
  __host__ __device__ int strips() const { return q_strips + 2 * kv_strips; }
  __host__ __device__ int heads(int kind) const { return kind == 0 ? num_heads : num_kv_heads; }

  // The strip within Q, K or V
  RIVER_DEVICE int within(int strip, int& kind) const {
    kind = strip < q_strips ? 0 : strip < q_strips + kv_strips ? 1 : 2;
    return kind == 0 ? strip : strip - q_strips - (kind - 1) * kv_strips;
  }

  RIVER_DEVICE QkvRow row(int strip, int r) const {
    int kind;
    const int local = within(strip, kind);
    if (kind == 2) {
      const int n = local * kTileRows + r;
      return {2, n < num_kv_heads * head_dim ? n / head_dim : -1, n % head_dim};
    }
    const int pair = local * 8 + r % 8, half = head_dim / 2, head = pair / half, i = pair % half;
    const int rotated = rotary_dim / 2, second = r / 8;
    const int dim = i < rotated ? i + second * rotated : rotary_dim + 2 * (i - rotated) + second;
    return {kind, head < heads(kind) ? head : -1, dim};
  }
};

template <class T>
struct QkvRows {
  const T *q, *k, *v;
  QkvOrder order;
  int columns;
  RIVER_DEVICE const T* row(int strip, int r) const {
    const QkvRow at = order.row(strip, r);
    if (at.head < 0) return nullptr;
    const T* matrix = at.kind == 0 ? q : at.kind == 1 ? k : v;
    return matrix + (int64_t(at.head) * order.head_dim + at.dim) * columns;
  }
};

template <class T>
struct GateUpRows {
  const T *gate, *up;  // [inner, columns]
  int inner, columns;
  RIVER_DEVICE const T* row(int strip, int r) const {
    const int channel = strip * 8 + r % 8;
    return channel < inner ? (r < 8 ? gate : up) + int64_t(channel) * columns : nullptr;
  }
};

// ---- norm + QKV + RoPE + KV append ------------------------------------------------------------------

template <class T, class Source>
struct QkvPhase : PlainPhase {
  using State = Place;  // of the row of this thread
  struct Asked {
    float cos, sin;  // of the dims that this thread rotates
  };

  Source weight;
  BlockArgs a;
  QkvOrder order;
  T* query;            // [T, heads, head_dim]
  float* raw_heads;    // [T, heads + kv_heads, head_dim] fp32, with q/k norms only
  uint32_t* counters;  // [heads + kv_heads], with q/k norms only

  RIVER_DEVICE const Source& source() const { return weight; }
  RIVER_DEVICE void prefetch(const BlockWork& work, const StreamShape&) const {
    prefetch_norm(static_cast<const T*>(a.input_layernorm), work);
  }
  RIVER_DEVICE void load(StreamInput<T>& input) const {
    load_normalised(input, static_cast<const T*>(a.hidden), static_cast<const T*>(a.input_layernorm), a.rms_norm_eps);
  }

  RIVER_DEVICE Place begin() const {
    const int t = threadIdx.x % kMaxRows;
    return t < a.rows ? place_in_cache(a, t) : Place{};
  }
  RIVER_DEVICE Asked ask(int strip, const Place& place) const {
    const int r = threadIdx.x / kMaxRows;
    const QkvRow first = order.row(strip, r % 8);
    const bool rotates = r < 8 && place.active() && first.kind < 2 && first.head >= 0 && first.dim < a.rotary_dim;
    return rotates && !a.q_norm ? table(first.dim, place) : Asked{};
  }

  RIVER_DEVICE void finish(int strip, const StripTotals& totals, const Asked& asked, const Place& place) const {
    int kind;
    const int local = order.within(strip, kind);
    const bool normed = kind < 2 && a.q_norm;
    const int r = threadIdx.x / kMaxRows, t = threadIdx.x % kMaxRows;  // r < 8: a pair of rows
    if (r < 8 && t < a.rows) {
      const QkvRow first = order.row(strip, r), second = order.row(strip, r + 8);
      float lo = totals(r, t) + bias(first), hi = totals(r + 8, t) + bias(second);
      if (normed) {
        raw(first, t, lo);
        raw(second, t, hi);
      } else {
        if (kind < 2 && first.dim < a.rotary_dim) rotate(asked, lo, hi);
        store(first, t, place, lo);
        store(second, t, place, hi);
      }
    }
    if (!normed) return;
    // a strip may hold rows of several heads; the last block to bring rows of a head finishes it
    const int half = a.head_dim / 2, last = min((local * 8 + 7) / half, order.heads(kind) - 1);
    for (int head = local * 8 / half; head <= last; head++) {
      const int strips = ((head + 1) * half - 1) / 8 - head * half / 8 + 1;
      if (readers_arrive_last(counters + kind * a.num_heads + head, strips)) finish_head(kind, head);
    }
  }

 private:
  RIVER_DEVICE float bias(const QkvRow& at) const {
    const void* biases = at.kind == 0 ? a.q_bias : at.kind == 1 ? a.k_bias : a.v_bias;
    return biases && at.head >= 0 ? to_float(static_cast<const T*>(biases)[at.head * a.head_dim + at.dim]) : 0.f;
  }

  RIVER_DEVICE float* raw_head(int kind, int head, int t) const {
    return raw_heads + (int64_t(t) * (a.num_heads + a.num_kv_heads) + kind * a.num_heads + head) * a.head_dim;
  }
  RIVER_DEVICE void raw(const QkvRow& at, int t, float value) const {
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
    if (at.kind == 0) {
      if (a.query_scale) value *= a.query_scale[place.position];
      query[(int64_t(t) * a.num_heads + at.head) * a.head_dim + at.dim] = from_float<T>(value);
    } else {
      T* cache = static_cast<T*>(at.kind == 1 ? a.k_cache : a.v_cache);
      const int64_t entry = (int64_t(place.slot) * a.num_kv_heads + at.head) * a.max_len + place.position;
      cache[entry * a.head_dim + at.dim] = from_float<T>(value);
    }
  }

  // Norm and rotation of one head, one warp per row
  RIVER_DEVICE void finish_head(int kind, int head) const {
    const int t = warp_id(), half = a.rotary_dim / 2;
    if (t >= a.rows) return;
    const Place place = place_in_cache(a, t);
    if (!place.active()) return;
    const float* values = raw_head(kind, head, t);
    const T* norm = static_cast<const T*>(kind == 0 ? a.q_norm : a.k_norm);
    float squares = 0;
    for (int i = lane_id(); i < a.head_dim; i += kWarp) {
      const float v = load_written(values + i);
      squares += v * v;
    }
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) squares += shuffle_xor(squares, lanes);
    const float inverse = 1.f / sqrtf(squares / a.head_dim + a.rms_norm_eps);
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

// ---- projection + residual --------------------------------------------------------------------------

template <class T, class Source>
struct ResidualPhase : PlainPhase {
  struct State {
    bool active;  // the row of this thread
  };
  struct Asked {
    T residual;
  };

  Source weight;
  const T *x, *residual, *bias;  // [T, in], [T, hidden], [hidden] or null
  T* out;                        // [T, hidden]; an inactive row keeps its residual
  Places places;
  int rows, hidden_size;

  RIVER_DEVICE const Source& source() const { return weight; }
  RIVER_DEVICE State begin() const {
    const int t = threadIdx.x % kMaxRows;
    return {t < rows && place_in_cache(places, t).active()};
  }
  RIVER_DEVICE void load(StreamInput<T>& input) const { load_rows(input, x); }
  RIVER_DEVICE Asked ask(int strip, const State&) const {
    const int row = threadIdx.x / kMaxRows, t = threadIdx.x % kMaxRows;
    if (row >= kTileRows || t >= rows) return {};
    return {load_written(residual + int64_t(t) * hidden_size + strip * kTileRows + row)};
  }
  RIVER_DEVICE void finish(int strip, const StripTotals& totals, const Asked& asked, const State& state) const {
    const int row = threadIdx.x / kMaxRows, t = threadIdx.x % kMaxRows, n = strip * kTileRows + row;
    if (row >= kTileRows || t >= rows) return;
    const float before = to_float(asked.residual), sum = totals(row, t) + (bias ? to_float(bias[n]) : 0.f);
    out[int64_t(t) * hidden_size + n] = from_float<T>(state.active ? before + sum : before);
  }
};

// ---- norm + gate/up + SwiGLU ------------------------------------------------------------------------

template <class T, class Source>
struct GateUpPhase : PlainPhase {
  Source weight;
  const T *hidden, *norm;  // [T, hidden], [hidden]
  float rms_norm_eps;
  T* out;  // [T, inner]
  int rows, inner;

  RIVER_DEVICE const Source& source() const { return weight; }
  RIVER_DEVICE void prefetch(const BlockWork& work, const StreamShape&) const { prefetch_norm(norm, work); }
  RIVER_DEVICE void load(StreamInput<T>& input) const { load_normalised(input, hidden, norm, rms_norm_eps); }
  RIVER_DEVICE void finish(int strip, const StripTotals& totals, const Asked&, State&) const {
    const int g = threadIdx.x / kMaxRows, t = threadIdx.x % kMaxRows, channel = strip * 8 + g;
    if (g >= 8 || t >= rows || channel >= inner) return;
    const float gate = totals(g, t), up = totals(g + 8, t);
    out[int64_t(t) * inner + channel] = from_float<T>(gate / (1.f + expf(-gate)) * up);
  }
};

// ---- the layer --------------------------------------------------------------------------------------

inline AttentionArgs attention_of(const BlockArgs& a, const void* query, void* out) {
  return {a.dtype,          a.rows, a.num_heads, a.num_kv_heads, a.head_dim, a.num_slots, a.max_len,  a.softmax_scale,
          a.sliding_window, query,  a.k_cache,   a.v_cache,      a.slots,    a.positions, a.kv_valid, out};
}

inline StateSimilarityArgs similarity_of(const BlockArgs& a) {
  return {a.dtype, a.rows, a.hidden_size, a.hidden, a.out, a.similarity};
}

// Parts of the scratch memory of one layer, each 256-byte aligned
struct BlockScratch {
  int64_t query, attended, middle, swiglu, raw_heads, attention, total;  // byte offsets

  BlockScratch(const BlockArgs& a, int inner) {
    total = 0;
    auto part = [&](int64_t bytes) {
      const int64_t at = total;
      total += (bytes + 255) / 256 * 256;
      return at;
    };
    const int64_t q_size = int64_t(a.rows) * a.num_heads * a.head_dim;
    query = part(2 * q_size);
    attended = part(2 * q_size);
    middle = part(2 * int64_t(a.rows) * a.hidden_size);
    swiglu = part(2 * int64_t(a.rows) * inner);
    raw_heads = part(a.q_norm ? 4 * int64_t(a.rows) * (a.num_heads + a.num_kv_heads) * a.head_dim : 0);
    attention = part(cuda::decode_attention_workspace(attention_of(a, nullptr, nullptr)).scratch);
  }
};

// `Weights` supplies inner(), the four weights, and two paths: of the first kernel, and of the others.
template <class T, class Weights>
void launch_layer(const BlockArgs& a, const Weights& weights, const Workspace& workspace, cudaStream_t stream) {
  const int inner = weights.inner(), q_size = a.num_heads * a.head_dim, hidden = a.hidden_size;
  const BlockScratch scratch(a, inner);
  auto* memory = static_cast<unsigned char*>(workspace.scratch);
  T *query = reinterpret_cast<T*>(memory + scratch.query), *attended = reinterpret_cast<T*>(memory + scratch.attended),
    *middle = reinterpret_cast<T*>(memory + scratch.middle), *swiglu = reinterpret_cast<T*>(memory + scratch.swiglu);
  const QkvOrder order(a);
  const StreamShape qkv_shape(order.strips() * kTileRows, hidden);
  const Places places{a.slots, a.positions, a.num_slots, a.max_len};

  const auto qkv = weights.qkv(order);
  launch_stream<T>(QkvPhase<T, std::decay_t<decltype(qkv)>>{{},
                                                            qkv,
                                                            a,
                                                            order,
                                                            query,
                                                            reinterpret_cast<float*>(memory + scratch.raw_heads),
                                                            workspace.counters + qkv_shape.strips},
                   weights.first_path(), qkv_shape, a.rows, workspace, stream, "qkv");
  Workspace attention_workspace = workspace;
  attention_workspace.scratch = memory + scratch.attention;
  cuda::launch_decode_attention(attention_of(a, query, attended), attention_workspace, stream);
  const auto o = weights.o();
  launch_stream<T>(ResidualPhase<T, std::decay_t<decltype(o)>>{{},
                                                               o,
                                                               attended,
                                                               static_cast<const T*>(a.hidden),
                                                               static_cast<const T*>(a.o_bias),
                                                               middle,
                                                               places,
                                                               a.rows,
                                                               hidden},
                   weights.path(), StreamShape(hidden, q_size), a.rows, workspace, stream, "o_proj");
  const auto gate_up = weights.gate_up();
  launch_stream<T>(GateUpPhase<T, std::decay_t<decltype(gate_up)>>{{},
                                                                   gate_up,
                                                                   middle,
                                                                   static_cast<const T*>(a.post_attention_layernorm),
                                                                   a.rms_norm_eps,
                                                                   swiglu,
                                                                   a.rows,
                                                                   inner},
                   weights.path(), StreamShape((inner + 7) / 8 * kTileRows, hidden), a.rows, workspace, stream,
                   "gate_up");
  const auto down = weights.down();
  launch_stream<T>(
      ResidualPhase<T, std::decay_t<decltype(down)>>{
          {}, down, swiglu, middle, nullptr, static_cast<T*>(a.out), places, a.rows, hidden},
      weights.path(), StreamShape(hidden, inner), a.rows, workspace, stream, "down_proj");
}

// What a layer needs of a Workspace
inline cuda::WorkspaceSize layer_workspace(const BlockArgs& a, int inner) {
  const QkvOrder order(a);
  const StreamShape shapes[] = {{order.strips() * kTileRows, a.hidden_size},
                                {a.hidden_size, a.num_heads * a.head_dim},
                                {(inner + 7) / 8 * kTileRows, a.hidden_size},
                                {a.hidden_size, inner}};
  cuda::WorkspaceSize size{0, a.rows * a.num_kv_heads, BlockScratch(a, inner).total};
  for (const StreamShape& shape : shapes) {
    size.partials = std::max(size.partials, partials_of(shape));
    size.counters = std::max<int64_t>(size.counters, shape.strips + a.num_heads + a.num_kv_heads);
  }
  return size;
}

}  // namespace river::device
