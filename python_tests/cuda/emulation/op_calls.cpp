// Every op of the CUDA backend, and which fields its Args have.
#include "op_calls.h"

#include <map>

#include "cuda/read_ring.h"
#include "row_order.h"

namespace py = pybind11;

namespace river::emulation {

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw py::value_error("no such dtype: " + name);
}

namespace {

// Moves keyword arguments into fields; in the end none may be left.
class Fields {
 public:
  explicit Fields(const py::kwargs& values) : values_(values) {}
  ~Fields() noexcept(false) {
    if (!failed_ && !values_.empty())
      throw py::type_error("unknown field " + py::str(values_.begin()->first).cast<std::string>());
  }

  template <class M>
  Fields& operator()(const char* name, M& member) {
    if (!values_.contains(name)) {
      failed_ = true;
      throw py::type_error(std::string("missing field ") + name);
    }
    const py::object value = values_[name];
    if constexpr (std::is_pointer_v<M>) member = reinterpret_cast<M>(value.cast<uintptr_t>());
    else if constexpr (std::is_same_v<M, DType>) member = dtype_of(value.cast<std::string>());
    else member = value.cast<M>();
    PyDict_DelItemString(values_.ptr(), name);
    return *this;
  }

 private:
  py::dict values_;
  bool failed_ = false;
};

template <class Args>
Call call(const Args& args, cuda::WorkspaceSize size,
          void (*launch)(const Args&, const cuda::Workspace&, cuda::Stream)) {
  return {size, [args, launch](const cuda::Workspace& workspace) { launch(args, workspace, nullptr); }};
}

Call state_similarity(const py::kwargs& values) {
  StateSimilarityArgs a{};
  Fields{values}("dtype", a.dtype)("rows", a.rows)("hidden_size", a.hidden_size)("x", a.x)("y", a.y)("out", a.out);
  return call(a, {}, cuda::launch_state_similarity);
}

Call read_ring(const py::kwargs& values) {
  ReadRingArgs a{};
  Fields{values}("bytes", a.bytes)("stage_bytes", a.stage_bytes)("copy_bytes", a.copy_bytes)("stages", a.stages)(
      "blocks_per_sm", a.blocks_per_sm)("data", a.data)("checksums", a.checksums);
  return call(a, {}, cuda::launch_read_ring);
}

template <void (*kLaunch)(const W4Args&, cuda::Stream)>
Call w4_format(const py::kwargs& values) {
  W4Args a{};
  Fields{values}("out_features", a.out_features)("in_features", a.in_features)("group_tiles", a.group_tiles)(
      "dtype", a.dtype)("packed", a.packed)("q", a.q)("scale", a.scale)("zero", a.zero)("dense", a.dense);
  return {{}, [a](const cuda::Workspace&) { kLaunch(a, nullptr); }};
}

Call linear(const py::kwargs& values) {
  LinearArgs a{};
  Fields{values}("dtype", a.dtype)("packed", a.packed)("rows", a.rows)("in_features", a.in_features)(
      "out_features", a.out_features)("x", a.x)("weight", a.weight)("bias", a.bias)("out", a.out);
  return call(a, cuda::linear_workspace(a), cuda::launch_linear);
}

Call lm_head(const py::kwargs& values) {
  LmHeadArgs a{};
  Fields{values}("dtype", a.dtype)("packed", a.packed)("rows", a.rows)("hidden_size", a.hidden_size)(
      "vocab_size", a.vocab_size)("rms_norm_eps", a.rms_norm_eps)("logits_scaling", a.logits_scaling)(
      "hidden", a.hidden)("norm", a.norm)("weight", a.weight)("temperature", a.temperature)("seeds", a.seeds)(
      "positions", a.positions)("tokens", a.tokens)("logits", a.logits)("margins", a.margins);
  return call(a, cuda::lm_head_workspace(a), cuda::launch_lm_head);
}

Call sample(const py::kwargs& values) {
  SampleArgs a{};
  Fields{values}("rows", a.rows)("vocab_size", a.vocab_size)("logits", a.logits)("temperature", a.temperature)(
      "top_k", a.top_k)("top_p", a.top_p)("min_p", a.min_p)("seeds", a.seeds)("positions", a.positions)(
      "tokens", a.tokens)("logprobs", a.logprobs);
  return call(a, {}, cuda::launch_sample);
}

Call decode_attention(const py::kwargs& values) {
  AttentionArgs a{};
  Fields{values}("dtype", a.dtype)("rows", a.rows)("num_heads", a.num_heads)("num_kv_heads", a.num_kv_heads)(
      "head_dim", a.head_dim)("num_slots", a.num_slots)("max_len", a.max_len)("softmax_scale", a.softmax_scale)(
      "sliding_window", a.sliding_window)("query", a.query)("k_cache", a.k_cache)("v_cache", a.v_cache)(
      "slots", a.slots)("positions", a.positions)("kv_valid", a.kv_valid)("out", a.out);
  return call(a, cuda::decode_attention_workspace(a), cuda::launch_decode_attention);
}

Fields& block_fields(Fields& fields, BlockArgs& a) {
  return fields("dtype", a.dtype)("rows", a.rows)("hidden_size", a.hidden_size)("num_heads", a.num_heads)(
      "num_kv_heads", a.num_kv_heads)("head_dim", a.head_dim)("rotary_dim", a.rotary_dim)("num_slots", a.num_slots)(
      "max_len", a.max_len)("rms_norm_eps", a.rms_norm_eps)("softmax_scale", a.softmax_scale)(
      "residual_multiplier", a.residual_multiplier)("sliding_window", a.sliding_window)("hidden", a.hidden)(
      "input_layernorm", a.input_layernorm)("post_attention_layernorm", a.post_attention_layernorm)("q_bias", a.q_bias)(
      "k_bias", a.k_bias)("v_bias", a.v_bias)("o_bias", a.o_bias)("q_norm", a.q_norm)("k_norm", a.k_norm)("cos", a.cos)(
      "sin", a.sin)("query_scale", a.query_scale)("slots", a.slots)("positions", a.positions)("kv_valid", a.kv_valid)(
      "k_cache", a.k_cache)("v_cache", a.v_cache)("out", a.out)("similarity", a.similarity);
}

Fields& block_weights(Fields& fields, DecoderBlockArgs& a) {
  return fields("intermediate_size", a.intermediate_size)("q_proj", a.q_proj)("k_proj", a.k_proj)("v_proj", a.v_proj)(
      "o_proj", a.o_proj)("gate_proj", a.gate_proj)("up_proj", a.up_proj)("down_proj", a.down_proj);
}

Call decoder_block(const py::kwargs& values) {
  DecoderBlockArgs a{};
  {
    Fields fields{values};
    block_weights(block_fields(fields, a), a);
  }
  return call(a, cuda::decoder_block_workspace(a), cuda::launch_decoder_block);
}

Call exit_layer(const py::kwargs& values) {
  ExitLayerArgs a{};
  {
    Fields fields{values};
    block_fields(fields, a)("gate_up_strips", a.gate_up_strips)("qkv_proj", a.qkv_proj)("o_proj", a.o_proj)(
        "gate_up_proj", a.gate_up_proj)("down_proj", a.down_proj);
  }
  return call(a, cuda::exit_layer_workspace(a), cuda::launch_exit_layer);
}

Call dual_layer(const py::kwargs& values) {
  DualLayerArgs a{};
  ExitDecision& d = a.decision;
  {
    Fields fields{values};
    block_weights(block_fields(fields, a.block), a.block)("qkv_tiles", a.exit_layer.qkv_proj)(
        "o_tiles", a.exit_layer.o_proj)("gate_up_tiles", a.exit_layer.gate_up_proj)(
        "down_tiles", a.exit_layer.down_proj)("index", d.index)("previous", d.previous)("thresholds", d.thresholds)(
        "min_layers", d.min_layers)("limit", d.limit)("exited", d.exited)("similarities", d.similarities)("together",
                                                                                                          d.together);
  }
  static_cast<BlockArgs&>(a.exit_layer) = a.block;
  a.exit_layer.gate_up_strips = gate_up_strips(a.block.intermediate_size);
  return call(a, cuda::dual_layer_workspace(a), cuda::launch_dual_layer);
}

Call advance(const py::kwargs& values) {
  AdvanceArgs a{};
  Fields{values}("dtype", a.dtype)("rows", a.rows)("hidden_size", a.hidden_size)("vocab_size", a.vocab_size)(
      "layers", a.layers)("num_stop_tokens", a.num_stop_tokens)("num_records", a.num_records)("before", a.before)(
      "after", a.after)("tokens", a.tokens)("embed_tokens", a.embed_tokens)("stop_tokens", a.stop_tokens)(
      "hidden", a.hidden)("slots", a.slots)("positions", a.positions)("draw_positions", a.draw_positions)(
      "remaining", a.remaining)("exited", a.exited)("similarities", a.similarities)("step", a.step)("records",
                                                                                                    a.records);
  return call(a, {}, cuda::launch_advance);
}

Fields& lossless_fields(Fields& fields, LosslessArgs& a) {
  return fields("dtype", a.dtype)("requests", a.requests)("max_tokens", a.max_tokens)("hidden_size", a.hidden_size)(
      "vocab_size", a.vocab_size)("tokens", a.tokens)("embed_tokens", a.embed_tokens)("drafts", a.drafts)(
      "hidden", a.hidden)("slots", a.slots)("positions", a.positions)("draw_positions", a.draw_positions)(
      "verify_hidden", a.verify_hidden)("verify_slots", a.verify_slots);
}

Call draft_advance(const py::kwargs& values) {
  DraftAdvanceArgs a{};
  {
    Fields fields{values};
    lossless_fields(fields, a)("index", a.index)("wanted", a.wanted)("margins", a.margins)("sure", a.sure);
  }
  return call(a, {}, cuda::launch_draft_advance);
}

Call accept(const py::kwargs& values) {
  AcceptArgs a{};
  {
    Fields fields{values};
    lossless_fields(fields, a)("rows", a.rows)("num_stop_tokens", a.num_stop_tokens)("num_records", a.num_records)(
        "stop_tokens", a.stop_tokens)("remaining", a.remaining)("verify_positions", a.verify_positions)(
        "verify_draw_positions", a.verify_draw_positions)("step", a.step)("records", a.records);
  }
  return call(a, {}, cuda::launch_accept);
}

using Op = Call (*)(const py::kwargs&);
const std::map<std::string, Op> kOps{
    {"decoder_block", decoder_block},
    {"exit_layer", exit_layer},
    {"dual_layer", dual_layer},
    {"advance", advance},
    {"draft_advance", draft_advance},
    {"accept", accept},
    {"decode_attention", decode_attention},
    {"lm_head", lm_head},
    {"sample", sample},
    {"linear", linear},
    {"state_similarity", state_similarity},
    {"read_ring", read_ring},
    {"pack_w4", w4_format<cuda::launch_pack_w4>},
    {"unpack_w4", w4_format<cuda::launch_unpack_w4>},
    {"dequantize_w4", w4_format<cuda::launch_dequantize_w4>},
};

}  // namespace

Call make_call(const std::string& op, const py::kwargs& fields) { return kOps.at(op)(fields); }

}  // namespace river::emulation
