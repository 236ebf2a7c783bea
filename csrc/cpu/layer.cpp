// The ops on a CPU: phases of a block in order, each split over output strips or heads.
// Only active rows are computed; every row's arithmetic is its own, so neighbours never matter.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "../row_order.h"
#include "strips.h"

namespace river::cpu {

namespace {

// fp32 values of a vector in the model dtype
std::unique_ptr<float[]> floats(DType dtype, const void* x, int64_t n) {
  if (!x) return nullptr;
  auto y = scratch<float>(n);
  kernels().to_float(dtype, x, y.get(), n);
  return y;
}

// out[row of t] = round(addend + bias + W x[t]); both optional. addend and out: [T, n], row_of maps t to a row.
void linear_into(const Weight& weight, const Activations& x, const void* bias, const void* addend, void* out,
                 const int* row_of, const Parallel& parallel) {
  const DType dtype = weight.dtype;
  const auto bias32 = floats(dtype, bias, weight.rows);
  for_strips(weight, x, parallel, [&](int64_t first, int count, const StripOut& y) {
    for (int t = 0; t < x.operand().rows; t++) {
      const int64_t place = row_of[t] * weight.rows + first;
      float sum[kTileRows] = {};
      if (addend) kernels().to_float(dtype, at(addend, dtype, place), sum, count);
      for (int i = 0; i < count; i++) sum[i] += y[t][i] + (bias32 ? bias32[first + i] : 0.f);
      kernels().from_float(dtype, sum, at(out, dtype, place), count);
    }
  });
}

// ---- attention ----------------------------------------------------------------------------------

// One (row, KV head) of the op, its context cut at multiples of kSplit so that the cut depends on nothing else.
struct Context {
  const AttentionArgs& a;
  int row, kv_head;
  int64_t first, last;  // positions seen

  Context(const AttentionArgs& args, int row, int kv_head) : a(args), row(row), kv_head(kv_head) {
    last = a.positions[row];
    first = a.sliding_window > 0 ? std::max<int64_t>(0, last - a.sliding_window + 1) : 0;
  }
  int64_t base() const { return (int64_t)a.slots[row] * a.num_kv_heads + kv_head; }  // [slots, kv_heads]

  // Valid positions of a split
  int positions(int64_t split, int32_t* out) const {
    const int64_t end = std::min(last + 1, (split + 1) * kSplit);
    int count = 0;
    for (int64_t p = std::max(first, split * kSplit); p < end; p++)
      if (!a.kv_valid || a.kv_valid[(int64_t)a.slots[row] * a.max_len + p]) out[count++] = (int32_t)p;
    return count;
  }
};

}  // namespace

void launch_decode_attention(const AttentionArgs& a, const Parallel& parallel) {
  const int group = a.num_heads / a.num_kv_heads;
  const int64_t padded = round_up(a.head_dim, 16);
  int64_t splits = 1;
  for (int row = 0; row < a.rows; row++)
    if (a.slots[row] >= 0) splits = std::max<int64_t>(splits, a.positions[row] / kSplit + 1);
  const int64_t count_states = (int64_t)a.rows * a.num_heads * splits;
  auto states = scratch<AttentionState>(count_states);  // [T, heads, splits]
  auto values = scratch<float>(count_states * padded);
  for (int64_t i = 0; i < count_states; i++) states[i] = {0, 0, &values[i * padded]};
  const int64_t pieces = (int64_t)a.rows * a.num_kv_heads * splits;
  const int64_t piece_bytes = 2 * std::min<int64_t>(kSplit, a.max_len) * a.head_dim * size_of(a.dtype);
  parallel(pieces, ceil_div(kPieceBytes, piece_bytes), [&](int64_t begin, int64_t end) {
    float query[kMaxGroup * kMaxHeadDim];
    int32_t positions[kSplit];
    for (int64_t piece = begin; piece < end; piece++) {
      const int64_t split = piece % splits;
      const Context context(a, (int)(piece / splits / a.num_kv_heads), (int)(piece / splits % a.num_kv_heads));
      const int64_t head = (int64_t)context.row * a.num_heads + context.kv_head * group;
      const int count = a.slots[context.row] < 0 ? 0 : context.positions(split, positions);
      if (count == 0) continue;
      for (int g = 0; g < group; g++) {
        float* q = query + g * padded;
        memset(q, 0, padded * sizeof(float));
        kernels().to_float(a.dtype, at(a.query, a.dtype, (head + g) * a.head_dim), q, a.head_dim);
        for (int i = 0; i < a.head_dim; i++) q[i] *= a.softmax_scale;
      }
      const int64_t offset = context.base() * a.max_len * a.head_dim;
      kernels().attend(a.dtype, query, group, a.head_dim, at(a.k_cache, a.dtype, offset),
                       at(a.v_cache, a.dtype, offset), positions, count, &states[head * splits + split], splits);
    }
  });
  float merged[kMaxHeadDim];
  for (int64_t head = 0; head < (int64_t)a.rows * a.num_heads; head++) {
    kernels().merge(&states[head * splits], (int)splits, a.head_dim, merged);
    kernels().from_float(a.dtype, merged, at(a.out, a.dtype, head * a.head_dim), a.head_dim);
  }
}

namespace {

// ---- the block ------------------------------------------------------------------------------------

struct Block {
  const BlockArgs& a;
  const Parallel& parallel;
  int active[kMaxRows];  // rows in flight
  int count = 0;

  Block(const BlockArgs& args, const Parallel& parallel) : a(args), parallel(parallel) {
    for (int row = 0; row < a.rows; row++)
      if (a.slots[row] >= 0) active[count++] = row;
  }

  Activations normalised(const void* x, const void* norm, bool packed) const {
    Activations out(a.dtype, packed, count, a.hidden_size);
    auto y = scratch<char>(a.hidden_size * size_of(a.dtype));
    for (int t = 0; t < count; t++) {
      kernels().rms_norm(a.dtype, at(x, a.dtype, (int64_t)active[t] * a.hidden_size), norm, a.rms_norm_eps,
                         a.hidden_size, y.get());
      out.set(t, y.get());
    }
    return out;
  }

  // fp32 projections [count, rows of the weight], in the order of the weight's rows
  std::unique_ptr<float[]> project(const Weight& weight, const Activations& x) const {
    auto y = scratch<float>(count * weight.rows);
    for_strips(weight, x, parallel, [&](int64_t first, int rows, const StripOut& out) {
      for (int t = 0; t < count; t++) memcpy(&y[t * weight.rows + first], out[t], rows * sizeof(float));
    });
    return y;
  }

  // Bias, norm and rotation of one head, in place
  void finish_head(float* head, const float* bias, const float* norm, int64_t position, bool rotated) const {
    if (bias)
      for (int i = 0; i < a.head_dim; i++) head[i] += bias[i];
    if (norm) {
      float squares = 0;
      for (int i = 0; i < a.head_dim; i++) squares += head[i] * head[i];
      const float inverse = 1.f / std::sqrt(squares / (float)a.head_dim + a.rms_norm_eps);
      for (int i = 0; i < a.head_dim; i++) head[i] *= inverse * norm[i];
    }
    if (!rotated) return;
    const int half = a.rotary_dim / 2;
    for (int i = 0; i < half; i++) {
      const float c = a.cos[position * half + i], s = a.sin[position * half + i];
      const float lo = head[i], hi = head[half + i];
      head[i] = lo * c - hi * s;
      head[half + i] = hi * c + lo * s;
    }
  }

  // Phase 2: q [T, heads, head_dim] rounded; K and V of every active row to the cache. gather(kind, t, head, out)
  // fetches the fp32 projections of a head in natural order.
  template <class Gather>
  void append(Gather gather, void* q) const {
    const int64_t q_size = (int64_t)a.num_heads * a.head_dim, kv_size = (int64_t)a.num_kv_heads * a.head_dim;
    const std::unique_ptr<float[]> bias[3] = {floats(a.dtype, a.q_bias, q_size), floats(a.dtype, a.k_bias, kv_size),
                                              floats(a.dtype, a.v_bias, kv_size)};
    const std::unique_ptr<float[]> norm[3] = {floats(a.dtype, a.q_norm, a.head_dim),
                                              floats(a.dtype, a.k_norm, a.head_dim), nullptr};
    for (int t = 0; t < count; t++) {
      const int row = active[t];
      const int64_t position = a.positions[row];
      for (const QkvKind kind : {kQuery, kKey, kValue})
        for (int head = 0; head < (kind == kQuery ? a.num_heads : a.num_kv_heads); head++) {
          float values[kMaxHeadDim];
          gather(kind, t, head, values);
          const float* head_bias = bias[kind] ? &bias[kind][(int64_t)head * a.head_dim] : nullptr;
          finish_head(values, head_bias, norm[kind].get(), position, kind != kValue);
          if (kind == kQuery && a.query_scale)
            for (int i = 0; i < a.head_dim; i++) values[i] *= a.query_scale[position];
          const int64_t cache_row = ((int64_t)a.slots[row] * a.num_kv_heads + head) * a.max_len + position;
          const int64_t place = kind == kQuery ? (int64_t)row * a.num_heads + head : cache_row;
          void* target = kind == kQuery ? q : kind == kKey ? a.k_cache : a.v_cache;
          kernels().from_float(a.dtype, values, at(target, a.dtype, place * a.head_dim), a.head_dim);
        }
    }
  }

  void attend(const void* query, void* out) const {
    launch_decode_attention({.dtype = a.dtype,
                             .rows = a.rows,
                             .num_heads = a.num_heads,
                             .num_kv_heads = a.num_kv_heads,
                             .head_dim = a.head_dim,
                             .num_slots = a.num_slots,
                             .max_len = a.max_len,
                             .softmax_scale = a.softmax_scale,
                             .sliding_window = a.sliding_window,
                             .query = query,
                             .k_cache = a.k_cache,
                             .v_cache = a.v_cache,
                             .slots = a.slots,
                             .positions = a.positions,
                             .kv_valid = a.kv_valid,
                             .out = out},
                            parallel);
  }

  Activations gathered(const void* x, int64_t cols, bool packed) const {
    Activations out(a.dtype, packed, count, cols);
    for (int t = 0; t < count; t++) out.set(t, at(x, a.dtype, active[t] * cols));
    return out;
  }

  void swiglu_into(const float* gate, const float* up, void* out, int64_t place, int n) const {
    float y[kTileRows];
    kernels().swiglu(gate, up, y);
    kernels().from_float(a.dtype, y, at(out, a.dtype, place), n);
  }

  // `weights` supplies the projections: o(), down(), inner() and the two methods that follow row orders
  template <class Weights>
  void run(const Weights& weights) const {
    constexpr bool packed = Weights::kPacked;
    memcpy(a.out, a.hidden, (int64_t)a.rows * a.hidden_size * size_of(a.dtype));
    if (count > 0) {
      const int64_t q_size = (int64_t)a.num_heads * a.head_dim, inner = weights.inner();
      auto query = scratch<char>(a.rows * q_size * size_of(a.dtype));
      auto attended = scratch<char>(a.rows * q_size * size_of(a.dtype));
      auto middle = scratch<char>((int64_t)a.rows * a.hidden_size * size_of(a.dtype));
      auto swiglu = scratch<char>(a.rows * inner * size_of(a.dtype));
      weights.qkv(*this, normalised(a.hidden, a.input_layernorm, packed), query.get());
      attend(query.get(), attended.get());
      linear_into(weights.o(), gathered(attended.get(), q_size, packed), a.o_bias, a.hidden, middle.get(), active,
                  parallel);
      weights.gate_up(*this, normalised(middle.get(), a.post_attention_layernorm, packed), swiglu.get());
      linear_into(weights.down(), gathered(swiglu.get(), inner, packed), nullptr, middle.get(), a.out, active,
                  parallel);
    }
    for (int row = 0; row < a.rows; row++) {
      const int64_t place = (int64_t)row * a.hidden_size;
      a.similarity[row] =
          kernels().similarity(a.dtype, at(a.hidden, a.dtype, place), at(a.out, a.dtype, place), a.hidden_size);
    }
  }
};

struct DenseWeights {
  static constexpr bool kPacked = false;
  const DecoderBlockArgs& a;

  Weight dense(const void* data, int64_t rows, int64_t cols) const { return {a.dtype, false, data, rows, cols}; }
  int64_t inner() const { return a.intermediate_size; }
  Weight o() const { return dense(a.o_proj, a.hidden_size, (int64_t)a.num_heads * a.head_dim); }
  Weight down() const { return dense(a.down_proj, a.hidden_size, inner()); }

  void qkv(const Block& block, const Activations& x, void* query) const {
    const int64_t rows[3] = {(int64_t)a.num_heads * a.head_dim, (int64_t)a.num_kv_heads * a.head_dim,
                             (int64_t)a.num_kv_heads * a.head_dim};
    const std::unique_ptr<float[]> y[3] = {block.project(dense(a.q_proj, rows[0], a.hidden_size), x),
                                           block.project(dense(a.k_proj, rows[1], a.hidden_size), x),
                                           block.project(dense(a.v_proj, rows[2], a.hidden_size), x)};
    block.append(
        [&](QkvKind kind, int t, int head, float* out) {
          memcpy(out, &y[kind][t * rows[kind] + (int64_t)head * a.head_dim], a.head_dim * sizeof(float));
        },
        query);
  }

  void gate_up(const Block& block, const Activations& x, void* out) const {
    const Weight up = dense(a.up_proj, inner(), a.hidden_size);
    for_strips(dense(a.gate_proj, inner(), a.hidden_size), x, block.parallel,
               [&](int64_t first, int rows, const StripOut& gate) {
                 StripOut y;
                 up.strip(first / kTileRows, x.operand(), y);
                 for (int t = 0; t < block.count; t++)
                   block.swiglu_into(gate[t], y[t], out, block.active[t] * inner() + first, rows);
               });
  }
};

struct W4Weights {
  static constexpr bool kPacked = true;
  const ExitLayerArgs& a;

  Weight w4(const void* data, int64_t rows, int64_t cols) const { return {a.dtype, true, data, rows, cols}; }
  int64_t inner() const { return (int64_t)a.gate_up_tiles * kTileRows / 2; }
  Weight o() const { return w4(a.o_proj, a.hidden_size, (int64_t)a.num_heads * a.head_dim); }
  Weight down() const { return w4(a.down_proj, a.hidden_size, inner()); }

  void qkv(const Block& block, const Activations& x, void* query) const {
    const QkvOrder order(a);
    const int64_t rows = (int64_t)order.strips() * kTileRows;
    const auto y = block.project(w4(a.qkv_proj, rows, a.hidden_size), x);
    block.append(
        [&](QkvKind kind, int t, int head, float* out) {
          for (int dim = 0; dim < a.head_dim; dim++) out[dim] = y[t * rows + order.packed_row({kind, head, dim})];
        },
        query);
  }

  void gate_up(const Block& block, const Activations& x, void* out) const {
    for_strips(w4(a.gate_up_proj, (int64_t)a.gate_up_tiles * kTileRows, a.hidden_size), x, block.parallel,
               [&](int64_t first, int, const StripOut& y) {
                 const int64_t channel = first / 2;
                 const int count = (int)std::min<int64_t>(8, inner() - channel);
                 for (int t = 0; t < block.count && count > 0; t++) {
                   float gate[kTileRows] = {}, up[kTileRows] = {};
                   memcpy(gate, y[t], 8 * sizeof(float));
                   memcpy(up, y[t] + 8, 8 * sizeof(float));
                   block.swiglu_into(gate, up, out, block.active[t] * inner() + channel, count);
                 }
               });
  }
};

}  // namespace

void launch_decoder_block(const DecoderBlockArgs& args, const Parallel& parallel) {
  Block(args, parallel).run(DenseWeights{args});
}

void launch_exit_layer(const ExitLayerArgs& args, const Parallel& parallel) {
  Block(args, parallel).run(W4Weights{args});
}

// ---- the small ops ----------------------------------------------------------------------------------

void launch_state_similarity(const StateSimilarityArgs& a, const Parallel&) {
  for (int row = 0; row < a.rows; row++) {
    const int64_t place = (int64_t)row * a.hidden_size;
    a.out[row] = kernels().similarity(a.dtype, at(a.x, a.dtype, place), at(a.y, a.dtype, place), a.hidden_size);
  }
}

void launch_linear(const LinearArgs& a, const Parallel& parallel) {
  Activations x(a.dtype, a.packed, a.rows, a.in_features);
  int row_of[kMaxRows];
  for (int t = 0; t < a.rows; t++) {
    x.set(t, at(a.x, a.dtype, (int64_t)t * a.in_features));
    row_of[t] = t;
  }
  linear_into({a.dtype, a.packed, a.weight, a.out_features, a.in_features}, x, a.bias, nullptr, a.out, row_of,
              parallel);
}

}  // namespace river::cpu
