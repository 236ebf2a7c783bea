// One layer for T = 1..8 rows, as five kernels in a row: norm + QKV + RoPE + KV append; attention; o_proj + residual;
// norm + gate/up + SwiGLU; down_proj + residual. Four of them stream a weight (stream.cuh). The layer is the same for
// dense, packed and decided weights: `Weights` supplies channels(), the width between gate_up and down, and the sources
// qkv(), o(), gate_up() and down().
#pragma once

#include "layer_epilogues.cuh"
#include "layer_weights.cuh"
#include "stream.cuh"

namespace river::device {

// How the four weights are cut
struct LayerShapes {
  StreamShape qkv, o, gate_up, down;

  LayerShapes(const BlockArgs& a, int channels)
      : qkv(QkvOrder(a).strips() * kTileRows, a.hidden_size), o(a.hidden_size, a.num_heads * a.head_dim),
        gate_up(gate_up_strips(channels) * kTileRows, a.hidden_size), down(a.hidden_size, channels) {}
};

inline Places places_of(const BlockArgs& a) {
  return {.slots = a.slots, .positions = a.positions, .num_slots = a.num_slots, .max_len = a.max_len};
}

// Parts of the scratch memory of one layer, each 256-byte aligned: byte offsets, but for the total
struct LayerScratch {
  int64_t total = 0;
  int64_t query, attended;  // [T, heads, head_dim]
  int64_t middle;           // [T, hidden], after the attention's residual
  int64_t swiglu;           // [T, channels]
  int64_t raw_heads;        // [T, heads + kv_heads, head_dim] fp32, with q/k norms only
  int64_t attention;        // of decode_attention

  LayerScratch(const BlockArgs& a, int channels) {
    const int64_t rows = a.rows;
    query = part(2 * rows * a.num_heads * a.head_dim);
    attended = part(2 * rows * a.num_heads * a.head_dim);
    middle = part(2 * rows * a.hidden_size);
    swiglu = part(2 * rows * channels);
    raw_heads = part(a.q_norm ? 4 * rows * (a.num_heads + a.num_kv_heads) * a.head_dim : 0);
    attention = part(cuda::decode_attention_workspace(attention_of(a, nullptr, nullptr)).scratch);
  }

 private:
  int64_t part(int64_t bytes) {
    const int64_t at = total;
    total += round_up(bytes, 256);
    return at;
  }
};

template <class T, class Weights>
void launch_layer(const BlockArgs& a, const Weights& weights, const Workspace& workspace, cudaStream_t stream) {
  const int channels = weights.channels(), hidden_size = a.hidden_size;
  const LayerShapes shapes(a, channels);
  const LayerScratch scratch(a, channels);
  auto* memory = static_cast<unsigned char*>(workspace.scratch);
  const auto part = [&](int64_t offset) { return reinterpret_cast<T*>(memory + offset); };
  T *query = part(scratch.query), *attended = part(scratch.attended);
  T *middle = part(scratch.middle), *swiglu = part(scratch.swiglu);
  const auto* hidden = static_cast<const T*>(a.hidden);
  const auto at = [&](const char* name, const StreamShape& shape) {
    return StreamLaunch{.name = name, .shape = shape, .rows = a.rows, .workspace = workspace, .stream = stream};
  };

  const NormalisedInput<T> before_qkv{
      .hidden = hidden, .norm = static_cast<const T*>(a.input_layernorm), .eps = a.rms_norm_eps};
  const QkvEpilogue<T> append{.a = a,
                              .order = QkvOrder(a),
                              .query = query,
                              .raw_heads = reinterpret_cast<float*>(memory + scratch.raw_heads),
                              .counters = workspace.counters + shapes.qkv.strips};
  launch_stream<T>(at("qkv", shapes.qkv), weights.qkv(), before_qkv, append);

  Workspace attention_workspace = workspace;
  attention_workspace.scratch = memory + scratch.attention;
  cuda::launch_decode_attention(attention_of(a, query, attended), attention_workspace, stream);

  const ResidualEpilogue<T> to_middle{.residual = hidden,
                                      .bias = static_cast<const T*>(a.o_bias),
                                      .multiplier = a.residual_multiplier,
                                      .out = middle,
                                      .places = places_of(a),
                                      .rows = a.rows,
                                      .hidden_size = hidden_size};
  launch_stream<T>(at("o_proj", shapes.o), weights.o(), PlainInput<T>{attended}, to_middle);

  const NormalisedInput<T> before_gate_up{
      .hidden = middle, .norm = static_cast<const T*>(a.post_attention_layernorm), .eps = a.rms_norm_eps};
  const GateUpEpilogue<T> to_swiglu{.out = swiglu, .rows = a.rows, .channels = channels};
  launch_stream<T>(at("gate_up", shapes.gate_up), weights.gate_up(), before_gate_up, to_swiglu);

  const ResidualEpilogue<T> to_out{.residual = middle,
                                   .bias = nullptr,
                                   .multiplier = a.residual_multiplier,
                                   .out = static_cast<T*>(a.out),
                                   .places = places_of(a),
                                   .rows = a.rows,
                                   .hidden_size = hidden_size};
  launch_stream<T>(at("down_proj", shapes.down), weights.down(), PlainInput<T>{swiglu}, to_out);
}

// What a layer needs of a Workspace
inline cuda::WorkspaceSize layer_workspace(const BlockArgs& a, int channels) {
  const LayerShapes shapes(a, channels);
  cuda::WorkspaceSize size{
      .partials = 0, .counters = a.rows * a.num_kv_heads, .scratch = LayerScratch(a, channels).total};
  for (const StreamShape& shape : {shapes.qkv, shapes.o, shapes.gate_up, shapes.down}) {
    size.partials = std::max(size.partials, shape.partials());
    size.counters = std::max<int64_t>(size.counters, shape.strips + a.num_heads + a.num_kv_heads);
  }
  return size;
}

}  // namespace river::device
