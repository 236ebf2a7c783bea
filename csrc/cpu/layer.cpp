// decoder_block and exit_layer on a CPU, and a layer whose rows take either way. Block::run tells the parts of a layer
// in order, for dense and packed weights alike; DenseWeights and PackedWeights say where the rows lie that a part needs
// together. Only active rows are computed, and every row's arithmetic is its own, so that neighbours never matter.
#include "layer.h"

#include "../row_order.h"
#include "team.h"

#include <cmath>
#include <cstring>
#include <memory>

namespace river::cpu {

namespace {

// ---- weights ----------------------------------------------------------------------------------------

// fp32 projections of T rows, of which head() fetches one head in natural order
struct DenseHeads {
  std::unique_ptr<float[]> values[3];  // of each QkvKind: [T, heads * head_dim]
  int64_t sizes[3];                    // heads * head_dim
  int head_dim;

  void head(QkvKind kind, int t, int head, float* out) const {
    memcpy(out, &values[kind][t * sizes[kind] + int64_t(head) * head_dim], head_dim * sizeof(float));
  }
};

struct PackedHeads {
  std::unique_ptr<float[]> values;  // [T, packed rows]
  QkvOrder order;

  void head(QkvKind kind, int t, int head, float* out) const {
    const float* row = &values[int64_t(t) * order.strips() * kTileRows];
    for (int dim = 0; dim < order.head_dim;) {
      const int run = order.run(kind, head, dim);
      memcpy(out + dim, row + order.packed_row({kind, head, dim}), run * sizeof(float));
      dim += run;
    }
  }
};

struct DenseWeights {
  const DecoderBlockArgs& a;

  Weight weight(const void* data, int64_t rows, int64_t cols) const {
    return {.dtype = a.dtype, .packed = false, .data = data, .rows = rows, .cols = cols};
  }
  int64_t inner() const { return a.intermediate_size; }
  Weight o() const { return weight(a.o_proj, a.hidden_size, int64_t(a.num_heads) * a.head_dim); }
  Weight down() const { return weight(a.down_proj, a.hidden_size, inner()); }

  DenseHeads qkv(const Input& x, const Parallel& parallel) const {
    const int64_t q_size = int64_t(a.num_heads) * a.head_dim, kv_size = int64_t(a.num_kv_heads) * a.head_dim;
    DenseHeads heads = {.values = {}, .sizes = {q_size, kv_size, kv_size}, .head_dim = a.head_dim};
    for (const QkvKind kind : {kQuery, kKey, kValue}) heads.values[kind] = scratch<float>(a.rows * heads.sizes[kind]);
    run_linears(x, parallel, linear_to(weight(a.q_proj, q_size, a.hidden_size), heads.values[kQuery].get()),
                linear_to(weight(a.k_proj, kv_size, a.hidden_size), heads.values[kKey].get()),
                linear_to(weight(a.v_proj, kv_size, a.hidden_size), heads.values[kValue].get()));
    return heads;
  }

  // silu(gate) * up of each row, to out [row, inner]
  void swiglu(const Input& x, const Rows& rows, char* out, const Parallel& parallel) const {
    const Weight gate = weight(a.gate_proj, inner(), a.hidden_size), up = weight(a.up_proj, inner(), a.hidden_size);
    run_linears(x, parallel, linear({gate, up}, [&](int t, int64_t first, int count, const RowSums(&y)[2]) {
                  kernels().swiglu(a.dtype, y[0], y[1], count, at(out, a.dtype, rows.index[t] * inner() + first));
                }));
  }
};

struct PackedWeights {
  const ExitLayerArgs& a;

  Weight weight(const void* data, int64_t rows, int64_t cols) const {
    return {.dtype = a.dtype, .packed = true, .data = data, .rows = rows, .cols = cols};
  }
  int64_t inner() const { return gate_up_channels(a.gate_up_strips); }
  Weight o() const { return weight(a.o_proj, a.hidden_size, int64_t(a.num_heads) * a.head_dim); }
  Weight down() const { return weight(a.down_proj, a.hidden_size, inner()); }

  PackedHeads qkv(const Input& x, const Parallel& parallel) const {
    const QkvOrder order(a);
    const Weight qkv = weight(a.qkv_proj, int64_t(order.strips()) * kTileRows, a.hidden_size);
    PackedHeads heads = {.values = scratch<float>(a.rows * qkv.rows), .order = order};
    run_linears(x, parallel, linear_to(qkv, heads.values.get()));
    return heads;
  }

  void swiglu(const Input& x, const Rows& rows, char* out, const Parallel& parallel) const {
    const Weight gate_up = weight(a.gate_up_proj, int64_t(a.gate_up_strips) * kTileRows, a.hidden_size);
    run_linears(x, parallel, linear({gate_up}, [&](int t, int64_t first, int count, const RowSums(&y)[1]) {
                  const int64_t channel = gate_up_channels(first / kTileRows);
                  kernels().swiglu_pairs(a.dtype, y[0], count / 2, at(out, a.dtype, rows.index[t] * inner() + channel));
                }));
  }
};

// ---- the block --------------------------------------------------------------------------------------

// What the heads of Q, K or V get beside their projection
struct HeadFinish {
  QkvKind kind;
  int heads;
  std::unique_ptr<float[]> bias;  // [heads, head_dim] or null
  std::unique_ptr<float[]> norm;  // [head_dim] or null
};

// Some of the active rows, and the weights that they go through
template <class Weights>
struct Path {
  Weights weights;
  const Rows& rows;
};

struct Block {
  const BlockArgs& a;
  const Parallel& parallel;

  // Each active row is of one path. All K and V are in the cache before any row attends.
  template <class... Weights>
  void run(const Path<Weights>&... paths) const {
    memcpy(a.out, a.hidden, a.rows * size_of(a.dtype) * a.hidden_size);  // an inactive row keeps its hidden vector
    if ((paths.rows.count() + ...) == 0) return;
    const auto query = vectors(q_size()), attended = vectors(q_size());
    (before_attention(paths, query.get()), ...);
    launch_decode_attention(attention_of(a, query.get(), attended.get()), parallel);
    (after_attention(paths, attended.get()), ...);
  }

 private:
  // query, attended: [T, heads, head_dim]
  template <class Weights>
  void before_attention(const Path<Weights>& path, void* query) const {
    const auto& [weights, rows] = path;
    if (rows.count() == 0) return;
    append(weights.qkv(normalised(a.hidden, rows, a.input_layernorm), parallel), rows, query);
  }

  template <class Weights>
  void after_attention(const Path<Weights>& path, const void* attended) const {
    const auto& weights = path.weights;
    const Rows& rows = path.rows;
    if (rows.count() == 0) return;
    const int64_t inner = weights.inner();
    const auto middle = vectors(a.hidden_size), swiglu = vectors(inner);
    linear_into(weights.o(), {.x = of(attended, q_size(), rows)}, to_residual(a.o_bias, a.hidden, middle.get(), rows),
                parallel);
    weights.swiglu(normalised(middle.get(), rows, a.post_attention_layernorm), rows, swiglu.get(), parallel);
    linear_into(weights.down(), {.x = of(swiglu.get(), inner, rows)}, to_residual(nullptr, middle.get(), a.out, rows),
                parallel);
  }

  int64_t q_size() const { return int64_t(a.num_heads) * a.head_dim; }

  // Room for [T, cols]
  std::unique_ptr<char[]> vectors(int64_t cols) const { return scratch<char>(a.rows * cols * size_of(a.dtype)); }
  Vectors of(const void* x, int64_t cols, const Rows& rows) const {
    return {.dtype = a.dtype, .data = x, .cols = cols, .rows = rows};
  }

  // residual, out: [T, hidden]
  LinearOut to_residual(const void* bias, const void* residual, void* out, const Rows& rows) const {
    return {.bias = bias, .multiplier = a.residual_multiplier, .addend = residual, .out = out, .rows = rows};
  }

  // x: [T, hidden]
  Input normalised(const void* x, const Rows& rows, const void* norm) const {
    return {.x = of(x, a.hidden_size, rows), .norm = norm, .eps = a.rms_norm_eps};
  }

  // Q of the rows to query, [T, heads, head_dim]; their K and V to the cache
  template <class Heads>
  void append(const Heads& projected, const Rows& rows, void* query) const {
    const int64_t kv_size = int64_t(a.num_kv_heads) * a.head_dim;
    const HeadFinish finishes[] = {
        {.kind = kQuery,
         .heads = a.num_heads,
         .bias = floats(a.dtype, a.q_bias, q_size()),
         .norm = floats(a.dtype, a.q_norm, a.head_dim)},
        {.kind = kKey,
         .heads = a.num_kv_heads,
         .bias = floats(a.dtype, a.k_bias, kv_size),
         .norm = floats(a.dtype, a.k_norm, a.head_dim)},
        {.kind = kValue, .heads = a.num_kv_heads, .bias = floats(a.dtype, a.v_bias, kv_size), .norm = nullptr},
    };
    for_rows(rows.count(), (q_size() + 2 * kv_size) * sizeof(float), parallel, [&](int t) {
      for (const HeadFinish& finish : finishes)
        for (int head = 0; head < finish.heads; head++) {
          float values[kMaxHeadDim];
          projected.head(finish.kind, t, head, values);
          finish_head(finish, head, a.positions[rows.index[t]], values);
          kernels().from_float(a.dtype, values, head_place(finish.kind, rows.index[t], head, query), a.head_dim);
        }
    });
  }

  // Bias, norm, rotation and scale of one head, in place
  void finish_head(const HeadFinish& finish, int head, int64_t position, float* values) const {
    if (finish.bias)
      for (int i = 0; i < a.head_dim; i++) values[i] += finish.bias[int64_t(head) * a.head_dim + i];
    if (finish.norm) {
      float squares = 0;
      for (int i = 0; i < a.head_dim; i++) squares += values[i] * values[i];
      const float inverse = 1.f / std::sqrt(squares / float(a.head_dim) + a.rms_norm_eps);
      for (int i = 0; i < a.head_dim; i++) values[i] *= inverse * finish.norm[i];
    }
    const int half = a.rotary_dim / 2;
    if (finish.kind != kValue) kernels().rotate(a.cos + position * half, a.sin + position * half, half, values);
    if (finish.kind == kQuery && a.query_scale)
      for (int i = 0; i < a.head_dim; i++) values[i] *= a.query_scale[position];
  }

  void* head_place(QkvKind kind, int row, int head, void* query) const {
    if (kind == kQuery) return at(query, a.dtype, (int64_t(row) * a.num_heads + head) * a.head_dim);
    const int64_t vector = (int64_t(a.slots[row]) * a.num_kv_heads + head) * a.max_len + a.positions[row];
    return at(kind == kKey ? a.k_cache : a.v_cache, a.dtype, vector * a.head_dim);
  }
};

// Calls f(parallel), of a team where a layer is large enough for two threads to share its parts.
template <class F>
void as_team(const BlockArgs& a, const Parallel& threads, F f) {
  const int64_t weights = int64_t(a.hidden_size) * a.num_heads * a.head_dim;  // of o_proj
  if (weights < kPieceBytes) f(threads);
  else Team::run(threads, f);
}

}  // namespace

void launch_decoder_block(const DecoderBlockArgs& args, const Parallel& threads) {
  const Rows rows = Rows::active(args.slots, args.rows);
  as_team(args, threads, [&](const Parallel& parallel) {
    Block{.a = args, .parallel = parallel}.run(Path<DenseWeights>{.weights = {args}, .rows = rows});
    launch_state_similarity(similarity_of(args), parallel);
  });
}

void launch_exit_layer(const ExitLayerArgs& args, const Parallel& threads) {
  const Rows rows = Rows::active(args.slots, args.rows);
  as_team(args, threads, [&](const Parallel& parallel) {
    Block{.a = args, .parallel = parallel}.run(Path<PackedWeights>{.weights = {args}, .rows = rows});
    launch_state_similarity(similarity_of(args), parallel);
  });
}

void run_both_ways(const DualLayerArgs& args, const Rows& block_rows, const Rows& exit_rows, const Parallel& threads) {
  as_team(args.block, threads, [&](const Parallel& parallel) {
    Block{.a = args.block, .parallel = parallel}.run(
        Path<DenseWeights>{.weights = {args.block}, .rows = block_rows},
        Path<PackedWeights>{.weights = {args.exit_layer}, .rows = exit_rows});
  });
}

}  // namespace river::cpu
