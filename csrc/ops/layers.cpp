// The ops of a network's layers: decoder_block, exit_layer, and dual_layer, which chooses between them.
#include "../row_order.h"
#include "cache.h"
#include "dispatch.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

namespace river::ops {
namespace {

// --- what all three take ---

struct BlockTensors {
  Tensor hidden;                                     // [T, hidden]
  Tensor input_layernorm, post_attention_layernorm;  // [hidden]
  CacheTensors cache;
  Tensor cos, sin;  // [max_len, rotary_dim / 2]
  int64_t num_attention_heads;
  double rms_norm_eps, residual_multiplier;
  OptionalTensor q_bias, k_bias, v_bias;  // [heads * head_dim], [kv_heads * head_dim] x 2
  OptionalTensor o_bias;                  // [hidden]
  OptionalTensor q_norm, k_norm;          // [head_dim]
  OptionalTensor query_scale;             // [max_len]
};

#define RIVER_BLOCK_OPTIONS                                                                                      \
  "Tensor(k!) k_cache, Tensor(v!) v_cache, Tensor slots, Tensor positions, Tensor cos, Tensor sin, "             \
  "int num_attention_heads, float rms_norm_eps, Tensor? q_bias=None, Tensor? k_bias=None, Tensor? v_bias=None, " \
  "Tensor? o_bias=None, Tensor? q_norm=None, Tensor? k_norm=None, Tensor? query_scale=None, "                    \
  "float? softmax_scale=None, int? sliding_window=None, Tensor? kv_valid=None, float residual_multiplier=1.0"

template <const char* schema>
BlockTensors read_block(Arguments<schema>& read) {
  return {.hidden = read.tensor("hidden"),
          .input_layernorm = read.tensor("input_layernorm"),
          .post_attention_layernorm = read.tensor("post_attention_layernorm"),
          .cache = read_cache(read),
          .cos = read.tensor("cos"),
          .sin = read.tensor("sin"),
          .num_attention_heads = read.integer("num_attention_heads"),
          .rms_norm_eps = read.number("rms_norm_eps"),
          .residual_multiplier = read.number("residual_multiplier"),
          .q_bias = read.optional_tensor("q_bias"),
          .k_bias = read.optional_tensor("k_bias"),
          .v_bias = read.optional_tensor("v_bias"),
          .o_bias = read.optional_tensor("o_bias"),
          .q_norm = read.optional_tensor("q_norm"),
          .k_norm = read.optional_tensor("k_norm"),
          .query_scale = read.optional_tensor("query_scale")};
}

int64_t q_size(const BlockArgs& args) { return int64_t(args.num_heads) * args.head_dim; }
int64_t kv_size(const BlockArgs& args) { return int64_t(args.num_kv_heads) * args.head_dim; }

// On a CPU
void check_values(Requirements& check, BlockArgs& args) {
  check_places(check, args);
  const auto place = [&](int row) { return std::tuple(args.slots[row], args.positions[row], row); };
  std::vector<int> order;  // of active rows, by place
  for (int row = 0; row < args.rows; row++)
    if (args.slots[row] >= 0) order.push_back(row);
  std::sort(order.begin(), order.end(), [&](int i, int j) { return place(i) < place(j); });
  for (size_t n = 1; n < order.size(); n++) {
    const int i = order[n - 1], j = order[n];
    check.require(args.slots[i] != args.slots[j] || args.positions[i] != args.positions[j], "rows ", i, " and ", j,
                  " are both at slot ", args.slots[i], ", position ", args.positions[i], ", expected each place once");
  }
}

void fill_rotation(Check& check, const BlockTensors& t, BlockArgs& args) {
  args.cos = check.tensor<float>("cos", t.cos, {kAny, kAny});
  const int64_t length = t.cos.size(0), pairs = t.cos.size(1);
  check.require(length >= args.max_len && pairs <= args.head_dim / 2, "cos has shape ", Shape{t.cos.sizes()},
                ", expected at least ", args.max_len, " rows (max_len) of at most ", args.head_dim / 2,
                " columns (head_dim / 2)");
  args.sin = check.tensor<float>("sin", t.sin, {length, pairs});
  args.rotary_dim = int(2 * pairs);
}

void fill_options(Check& check, const BlockTensors& t, ScalarType type, BlockArgs& args) {
  args.q_bias = check.optional("q_bias", t.q_bias, type, {q_size(args)});
  args.k_bias = check.optional("k_bias", t.k_bias, type, {kv_size(args)});
  args.v_bias = check.optional("v_bias", t.v_bias, type, {kv_size(args)});
  args.o_bias = check.optional("o_bias", t.o_bias, type, {args.hidden_size});
  args.q_norm = check.optional("q_norm", t.q_norm, type, {args.head_dim});
  args.k_norm = check.optional("k_norm", t.k_norm, type, {args.head_dim});
  check.require(!args.q_norm == !args.k_norm, args.q_norm ? "k_norm" : "q_norm", " is None beside a ",
                args.q_norm ? "q_norm" : "k_norm", ", expected both or none");
  args.query_scale = check.optional<float>("query_scale", t.query_scale, {kAny});
  const int64_t scales = t.query_scale ? t.query_scale->size(0) : args.max_len;
  check.require(scales >= args.max_len, "query_scale has ", scales,
                " entries, expected at least max_len = ", args.max_len);
}

// Fills all but `out` and `similarity`.
void fill_block(Check& check, const BlockTensors& t, BlockArgs& args) {
  const ScalarType type = t.hidden.scalar_type();
  args.dtype = check.model_dtype("hidden", type);
  args.rows = check.many_rows("hidden", t.hidden, 2);
  args.hidden_size = check.hidden_size(t.hidden, 64);
  args.hidden = check.vectors("hidden", t.hidden, type, {args.rows, args.hidden_size});
  args.input_layernorm = check.vectors("input_layernorm", t.input_layernorm, type, {args.hidden_size});
  args.post_attention_layernorm =
      check.vectors("post_attention_layernorm", t.post_attention_layernorm, type, {args.hidden_size});
  args.num_heads = check.size("num_attention_heads", t.num_attention_heads);
  fill_cache(check, t.cache, type, args);
  fill_rotation(check, t, args);
  fill_options(check, t, type, args);
  args.rms_norm_eps = check.rms_norm_eps(t.rms_norm_eps);
  args.residual_multiplier = float(t.residual_multiplier);
  check.require(std::isfinite(args.residual_multiplier), "residual_multiplier is ", t.residual_multiplier,
                ", expected a finite number");
  fill_scores(check, t.cache, args);
  args.k_cache = mutable_data(t.cache.k_cache);
  args.v_cache = mutable_data(t.cache.v_cache);
}

Tensor new_out(Check& check, const Tensor& hidden, BlockArgs& args) {
  const Tensor out = check.output({args.rows, args.hidden_size}, hidden.scalar_type());
  args.out = mutable_data(out);
  return out;
}

Tensor new_similarity(Check& check, BlockArgs& args) {
  const Tensor similarity = check.output({args.rows}, ScalarType::Float);
  args.similarity = mutable_data<float>(similarity);
  return similarity;
}

// --- the backbone's weights ---

struct DenseTensors {
  Tensor q_proj, k_proj, v_proj;  // [heads * head_dim, hidden], [kv_heads * head_dim, hidden] x 2
  Tensor o_proj;                  // [hidden, heads * head_dim]
  Tensor gate_proj, up_proj;      // [intermediate, hidden]
  Tensor down_proj;               // [hidden, intermediate]
};

template <const char* schema>
DenseTensors read_dense(Arguments<schema>& read) {
  return {.q_proj = read.tensor("q_proj"),
          .k_proj = read.tensor("k_proj"),
          .v_proj = read.tensor("v_proj"),
          .o_proj = read.tensor("o_proj"),
          .gate_proj = read.tensor("gate_proj"),
          .up_proj = read.tensor("up_proj"),
          .down_proj = read.tensor("down_proj")};
}

// fill_block comes first.
void fill_dense(Check& check, const DenseTensors& t, ScalarType type, DecoderBlockArgs& args) {
  const int64_t hidden = args.hidden_size;
  args.q_proj = check.vectors("q_proj", t.q_proj, type, {q_size(args), hidden});
  args.k_proj = check.vectors("k_proj", t.k_proj, type, {kv_size(args), hidden});
  args.v_proj = check.vectors("v_proj", t.v_proj, type, {kv_size(args), hidden});
  args.o_proj = check.vectors("o_proj", t.o_proj, type, {hidden, q_size(args)});
  args.gate_proj = check.vectors("gate_proj", t.gate_proj, type, {kAny, hidden});
  args.intermediate_size = check.vector_size("intermediate_size", t.gate_proj.size(0));
  args.up_proj = check.vectors("up_proj", t.up_proj, type, {args.intermediate_size, hidden});
  args.down_proj = check.vectors("down_proj", t.down_proj, type, {hidden, args.intermediate_size});
}

// --- the exit layer's weights, whose names differ where both kinds are given ---

struct PackedTensors {
  struct Named {
    const char* name;
    Tensor tensor;  // [out / 16, in / 64, 576]
  };
  Named qkv, o, gate_up, down;
};

// fill_block comes first. `strips` is how many gate_up must have, kAny where nothing says.
void fill_packed(Check& check, const PackedTensors& t, int64_t strips, ExitLayerArgs& args) {
  const auto tiles = [&](const PackedTensors::Named& weight, int64_t count, int64_t columns) {
    return check.tiles(weight.name, weight.tensor, count, columns);
  };
  args.qkv_proj = tiles(t.qkv, QkvOrder(args).strips(), args.hidden_size);
  args.o_proj = tiles(t.o, strips_of(args.hidden_size), q_size(args));
  args.gate_up_proj = tiles(t.gate_up, strips, args.hidden_size);
  args.gate_up_strips = check.size("strips of gate_up", t.gate_up.tensor.size(0));
  const int channels = check.size("channels of gate_up", gate_up_channels(args.gate_up_strips));
  args.down_proj = tiles(t.down, strips_of(args.hidden_size), channels);
}

// --- decoder_block ---

constexpr char kDecoderBlock[] =
    "(Tensor hidden, Tensor input_layernorm, Tensor q_proj, Tensor k_proj, Tensor v_proj, Tensor o_proj, "
    "Tensor post_attention_layernorm, Tensor gate_proj, Tensor up_proj, Tensor down_proj, " RIVER_BLOCK_OPTIONS
    ") -> (Tensor, Tensor)";

std::tuple<Tensor, Tensor> decoder_block(Arguments<kDecoderBlock>& read) {
  const BlockTensors tensors = read_block(read);
  const DenseTensors weights = read_dense(read);
  const Tensor& hidden = tensors.hidden;
  Check check("decoder_block", "hidden", hidden);
  DecoderBlockArgs args{};
  fill_block(check, tensors, args);
  fill_dense(check, weights, hidden.scalar_type(), args);
  check.written({"k_cache", "v_cache"});
  const Tensor out = new_out(check, hidden, args), similarity = new_similarity(check, args);
  launch(check, args, check_values, cpu::launch_decoder_block, [&](auto& gpu) {
    cuda::launch_decoder_block(args, gpu.workspace(cuda::decoder_block_workspace(args)), gpu.stream());
  });
  return {out, similarity};
}

RIVER_OP(decoder_block, kDecoderBlock, boxed<&decoder_block>)

// --- exit_layer ---

constexpr char kExitLayer[] =
    "(Tensor hidden, Tensor input_layernorm, Tensor qkv_proj, Tensor o_proj, Tensor post_attention_layernorm, "
    "Tensor gate_up_proj, Tensor down_proj, " RIVER_BLOCK_OPTIONS ") -> (Tensor, Tensor)";

std::tuple<Tensor, Tensor> exit_layer(Arguments<kExitLayer>& read) {
  const BlockTensors tensors = read_block(read);
  const PackedTensors weights = {.qkv = {.name = "qkv_proj", .tensor = read.tensor("qkv_proj")},
                                 .o = {.name = "o_proj", .tensor = read.tensor("o_proj")},
                                 .gate_up = {.name = "gate_up_proj", .tensor = read.tensor("gate_up_proj")},
                                 .down = {.name = "down_proj", .tensor = read.tensor("down_proj")}};
  const Tensor& hidden = tensors.hidden;
  Check check("exit_layer", "hidden", hidden);
  ExitLayerArgs args{};
  fill_block(check, tensors, args);
  fill_packed(check, weights, kAny, args);
  check.written({"k_cache", "v_cache"});
  const Tensor out = new_out(check, hidden, args), similarity = new_similarity(check, args);
  launch(check, args, check_values, cpu::launch_exit_layer, [&](auto& gpu) {
    cuda::launch_exit_layer(args, gpu.workspace(cuda::exit_layer_workspace(args)), gpu.stream());
  });
  return {out, similarity};
}

RIVER_OP(exit_layer, kExitLayer, boxed<&exit_layer>)

// --- dual_layer ---

constexpr char kDualLayer[] =
    "(int index, Tensor hidden, Tensor? previous, Tensor thresholds, Tensor min_layers, Tensor limit, "
    "Tensor(a!) exited, Tensor(b!) similarities, Tensor input_layernorm, Tensor q_proj, Tensor k_proj, Tensor v_proj, "
    "Tensor o_proj, Tensor post_attention_layernorm, Tensor gate_proj, Tensor up_proj, Tensor down_proj, "
    "Tensor qkv_tiles, Tensor o_tiles, Tensor gate_up_tiles, Tensor down_tiles, " RIVER_BLOCK_OPTIONS
    ", bool together=False) -> Tensor";

struct DecisionTensors {
  int64_t index;
  OptionalTensor previous;               // [T, hidden]
  Tensor thresholds, min_layers, limit;  // [T]
  Tensor exited, similarities;           // [layers, T]
  bool together;
};

DecisionTensors read_decision(Arguments<kDualLayer>& read) {
  return {.index = read.integer("index"),
          .previous = read.optional_tensor("previous"),
          .thresholds = read.tensor("thresholds"),
          .min_layers = read.tensor("min_layers"),
          .limit = read.tensor("limit"),
          .exited = read.tensor("exited"),
          .similarities = read.tensor("similarities"),
          .together = read.boolean("together")};
}

ExitDecision decision_args(Check& check, const DecisionTensors& t, ScalarType type, const BlockArgs& block) {
  const int layers = check.layers(t.exited, t.similarities, block.rows);
  const auto* thresholds = check.tensor<float>("thresholds", t.thresholds, {block.rows});
  const auto* min_layers = check.tensor<int32_t>("min_layers", t.min_layers, {block.rows});
  const auto* limit = check.tensor<int32_t>("limit", t.limit, {block.rows});
  check.require(t.index >= 0 && t.index < layers, "index is ", t.index, ", expected 0 to ", layers - 1);
  check.require(t.previous.has_value() == (t.index > 0), "previous is ", t.previous ? "given" : "None", " at index ",
                t.index, ", expected None at index 0 and a tensor at every other");
  const void* previous =
      t.previous ? check.vectors("previous", *t.previous, type, {block.rows, block.hidden_size}) : nullptr;
  return {.index = int(t.index),
          .together = t.together,
          .previous = previous,
          .thresholds = thresholds,
          .min_layers = min_layers,
          .limit = limit,
          .exited = mutable_data<int32_t>(t.exited),
          .similarities = mutable_data<float>(t.similarities)};
}

std::tuple<Tensor> dual_layer(Arguments<kDualLayer>& read) {
  const DecisionTensors decision = read_decision(read);
  const BlockTensors tensors = read_block(read);
  const DenseTensors dense = read_dense(read);
  const PackedTensors packed = {.qkv = {.name = "qkv_tiles", .tensor = read.tensor("qkv_tiles")},
                                .o = {.name = "o_tiles", .tensor = read.tensor("o_tiles")},
                                .gate_up = {.name = "gate_up_tiles", .tensor = read.tensor("gate_up_tiles")},
                                .down = {.name = "down_tiles", .tensor = read.tensor("down_tiles")}};
  Check check("dual_layer", "hidden", tensors.hidden);
  const ScalarType type = tensors.hidden.scalar_type();
  DualLayerArgs args{};
  fill_block(check, tensors, args.block);
  check.rows("hidden", tensors.hidden, 2);  // no more than a step has, on either device
  fill_dense(check, dense, type, args.block);
  static_cast<BlockArgs&>(args.exit_layer) = args.block;
  fill_packed(check, packed, gate_up_strips(args.block.intermediate_size), args.exit_layer);
  args.decision = decision_args(check, decision, type, args.block);
  check.written({"exited", "similarities", "k_cache", "v_cache"});
  const Tensor out = new_out(check, tensors.hidden, args.block);
  args.exit_layer.out = args.block.out;
  const auto check_block = [](Requirements& its, DualLayerArgs& all) {
    check_values(its, all.block);
    all.exit_layer.slots = all.block.slots;
    all.exit_layer.positions = all.block.positions;
  };
  launch(check, args, check_block, cpu::launch_dual_layer, [&](auto& gpu) {
    cuda::launch_dual_layer(args, gpu.workspace(cuda::dual_layer_workspace(args)), gpu.stream());
  });
  return {out};
}

RIVER_OP(dual_layer, kDualLayer, boxed<&dual_layer>)

}  // namespace
}  // namespace river::ops
