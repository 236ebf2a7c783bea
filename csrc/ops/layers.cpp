// The ops of a step's layers: decoder_block, exit_layer, the choice between them, and the step's end.
#include <tuple>

#include "dispatch.h"

namespace river::ops {
namespace {

struct BlockTensors {
  const Tensor &hidden, &input_layernorm, &post_attention_layernorm, &k_cache, &v_cache, &slots, &positions, &cos, &sin;
  int64_t num_attention_heads;
  double rms_norm_eps;
  const OptionalTensor &q_bias, &k_bias, &v_bias, &o_bias, &q_norm, &k_norm, &query_scale;
  std::optional<double> softmax_scale;
  std::optional<int64_t> sliding_window;
  const OptionalTensor& kv_valid;
};

// Checks what both layers share and fills their common arguments but out and similarity.
void fill_block(Check& check, const BlockTensors& t, BlockArgs& args) {
  const ScalarType type = t.hidden.scalar_type();
  args.dtype = check.model_dtype("hidden", type);
  args.rows = check.rows("hidden", t.hidden, 2);
  args.hidden_size = check.size("hidden_size", t.hidden.size(1));
  check.require(args.hidden_size % 64 == 0, "hidden_size is ", args.hidden_size, ", expected a multiple of 64");
  const int64_t hidden = args.hidden_size;
  check.vectors("hidden", t.hidden, type, {args.rows, hidden});
  check.vectors("input_layernorm", t.input_layernorm, type, {hidden});
  check.vectors("post_attention_layernorm", t.post_attention_layernorm, type, {hidden});
  args.num_heads = check.size("num_attention_heads", t.num_attention_heads);
  const Cache cache(check, type, args.rows, args.num_heads, t.k_cache, t.v_cache, t.slots, t.positions, t.kv_valid);
  args.num_kv_heads = cache.kv_heads;
  args.head_dim = cache.head_dim;
  args.num_slots = cache.slots;
  args.max_len = cache.max_len;
  args.slots = cache.row_slots;
  args.positions = cache.row_positions;
  for (int i = 0; i < args.rows && !check.on_cuda(); i++)
    for (int j = 0; j < i; j++)
      check.require(args.slots[i] < 0 || args.slots[i] != args.slots[j] || args.positions[i] != args.positions[j],
                    "rows ", j, " and ", i, " are both at slot ", args.slots[i], ", position ", args.positions[i],
                    ", expected each place once");
  check.tensor("cos", t.cos, ScalarType::Float, {kAny, kAny});
  check.require(t.cos.size(0) >= args.max_len && t.cos.size(1) <= args.head_dim / 2, "cos has shape ",
                text(t.cos.sizes()), ", expected at least ", args.max_len, " rows (max_len) of at most ",
                args.head_dim / 2, " columns (head_dim / 2)");
  check.tensor("sin", t.sin, ScalarType::Float, {t.cos.size(0), t.cos.size(1)});
  args.rotary_dim = (int)(2 * t.cos.size(1));
  const int64_t q_size = (int64_t)args.num_heads * args.head_dim, kv_size = (int64_t)args.num_kv_heads * args.head_dim;
  args.q_bias = check.optional("q_bias", t.q_bias, type, {q_size});
  args.k_bias = check.optional("k_bias", t.k_bias, type, {kv_size});
  args.v_bias = check.optional("v_bias", t.v_bias, type, {kv_size});
  args.o_bias = check.optional("o_bias", t.o_bias, type, {hidden});
  args.q_norm = check.optional("q_norm", t.q_norm, type, {args.head_dim});
  args.k_norm = check.optional("k_norm", t.k_norm, type, {args.head_dim});
  args.query_scale = check.optional<float>("query_scale", t.query_scale, ScalarType::Float, {kAny});
  check.require(!t.query_scale || t.query_scale->size(0) >= args.max_len, "query_scale has ",
                t.query_scale ? t.query_scale->size(0) : 0, " entries, expected at least max_len = ", args.max_len);
  args.rms_norm_eps = eps_of(check, t.rms_norm_eps);
  args.softmax_scale = scale_of(check, t.softmax_scale, args.head_dim);
  args.sliding_window = window(check, t.sliding_window);
  args.kv_valid = t.kv_valid ? data<bool>(*t.kv_valid) : nullptr;
  args.hidden = data(t.hidden);
  args.input_layernorm = data(t.input_layernorm);
  args.post_attention_layernorm = data(t.post_attention_layernorm);
  args.cos = data<float>(t.cos);
  args.sin = data<float>(t.sin);
  args.k_cache = t.k_cache.mutable_data_ptr();
  args.v_cache = t.v_cache.mutable_data_ptr();
}

struct DenseTensors {
  const Tensor &q_proj, &k_proj, &v_proj, &o_proj, &gate_proj, &up_proj, &down_proj;
};

// After fill_block
void fill_dense(Check& check, ScalarType type, const DenseTensors& t, DecoderBlockArgs& args) {
  const int64_t size = args.hidden_size, q_size = (int64_t)args.num_heads * args.head_dim,
                kv_size = (int64_t)args.num_kv_heads * args.head_dim;
  check.vectors("q_proj", t.q_proj, type, {q_size, size});
  check.vectors("k_proj", t.k_proj, type, {kv_size, size});
  check.vectors("v_proj", t.v_proj, type, {kv_size, size});
  check.vectors("o_proj", t.o_proj, type, {size, q_size});
  check.vectors("gate_proj", t.gate_proj, type, {kAny, size});
  args.intermediate_size = check.vector_size("intermediate_size", t.gate_proj.size(0));
  check.vectors("up_proj", t.up_proj, type, {args.intermediate_size, size});
  check.vectors("down_proj", t.down_proj, type, {size, args.intermediate_size});
  args.q_proj = data(t.q_proj);
  args.k_proj = data(t.k_proj);
  args.v_proj = data(t.v_proj);
  args.o_proj = data(t.o_proj);
  args.gate_proj = data(t.gate_proj);
  args.up_proj = data(t.up_proj);
  args.down_proj = data(t.down_proj);
}

struct PackedTensors {
  struct Named {
    const char* name;
    const Tensor& tensor;
  };
  Named qkv, o, gate_up, down;
};

// After fill_block. `gate_up_tiles`: the row tiles that the gate and up rows must have, kAny where nothing says
void fill_packed(Check& check, const PackedTensors& t, int64_t gate_up_tiles, ExitLayerArgs& args) {
  const auto tiles = [&](const PackedTensors::Named& t, int64_t row_tiles, int64_t columns) {
    check.vectors(t.name, t.tensor, ScalarType::Byte, {row_tiles, column_tiles_of(columns), kTileBytes});
    return data<uint8_t>(t.tensor);
  };
  const int64_t q_size = (int64_t)args.num_heads * args.head_dim, kv_size = (int64_t)args.num_kv_heads * args.head_dim;
  args.qkv_proj = tiles(t.qkv, tiles_of(q_size) + 2 * tiles_of(kv_size), args.hidden_size);
  args.o_proj = tiles(t.o, tiles_of(args.hidden_size), q_size);
  args.gate_up_proj = tiles(t.gate_up, gate_up_tiles, args.hidden_size);
  args.gate_up_tiles = check.size("row tiles of gate_up", t.gate_up.tensor.size(0));
  const int64_t inner = check.size("channels of gate_up", args.gate_up_tiles * (int64_t)kTileRows / 2);
  args.down_proj = tiles(t.down, tiles_of(args.hidden_size), inner);
}

Tensor new_out(const Tensor& hidden, BlockArgs& args) {
  Tensor out = empty({args.rows, args.hidden_size}, hidden.scalar_type(), hidden);
  args.out = out.mutable_data_ptr();
  return out;
}

Tensor new_similarity(const Tensor& hidden, BlockArgs& args) {
  Tensor similarity = empty({args.rows}, ScalarType::Float, hidden);
  args.similarity = mutable_data<float>(similarity);
  return similarity;
}

std::tuple<Tensor, Tensor> decoder_block(
    const Tensor& hidden, const Tensor& input_layernorm, const Tensor& q_proj, const Tensor& k_proj,
    const Tensor& v_proj, const Tensor& o_proj, const Tensor& post_attention_layernorm, const Tensor& gate_proj,
    const Tensor& up_proj, const Tensor& down_proj, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
    const Tensor& positions, const Tensor& cos, const Tensor& sin, int64_t num_attention_heads, double rms_norm_eps,
    const OptionalTensor& q_bias, const OptionalTensor& k_bias, const OptionalTensor& v_bias,
    const OptionalTensor& o_bias, const OptionalTensor& q_norm, const OptionalTensor& k_norm,
    const OptionalTensor& query_scale, std::optional<double> softmax_scale, std::optional<int64_t> sliding_window,
    const OptionalTensor& kv_valid) {
  Check check("decoder_block", "hidden", hidden);
  DecoderBlockArgs args{};
  fill_block(check,
             {hidden,
              input_layernorm,
              post_attention_layernorm,
              k_cache,
              v_cache,
              slots,
              positions,
              cos,
              sin,
              num_attention_heads,
              rms_norm_eps,
              q_bias,
              k_bias,
              v_bias,
              o_bias,
              q_norm,
              k_norm,
              query_scale,
              softmax_scale,
              sliding_window,
              kv_valid},
             args);
  fill_dense(check, hidden.scalar_type(), {q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj}, args);
  check.written({"k_cache", "v_cache"});
  const Tensor out = new_out(hidden, args), similarity = new_similarity(hidden, args);
  launch(
      check, [&] { cpu::launch_decoder_block(args, kParallel); },
      [&](auto& gpu) {
        cuda::launch_decoder_block(args, gpu.workspace(cuda::decoder_block_workspace(args)), gpu.stream());
      });
  return {out, similarity};
}

std::tuple<Tensor, Tensor> exit_layer(const Tensor& hidden, const Tensor& input_layernorm, const Tensor& qkv_proj,
                                      const Tensor& o_proj, const Tensor& post_attention_layernorm,
                                      const Tensor& gate_up_proj, const Tensor& down_proj, const Tensor& k_cache,
                                      const Tensor& v_cache, const Tensor& slots, const Tensor& positions,
                                      const Tensor& cos, const Tensor& sin, int64_t num_attention_heads,
                                      double rms_norm_eps, const OptionalTensor& q_bias, const OptionalTensor& k_bias,
                                      const OptionalTensor& v_bias, const OptionalTensor& o_bias,
                                      const OptionalTensor& q_norm, const OptionalTensor& k_norm,
                                      const OptionalTensor& query_scale, std::optional<double> softmax_scale,
                                      std::optional<int64_t> sliding_window, const OptionalTensor& kv_valid) {
  Check check("exit_layer", "hidden", hidden);
  ExitLayerArgs args{};
  fill_block(check,
             {hidden,
              input_layernorm,
              post_attention_layernorm,
              k_cache,
              v_cache,
              slots,
              positions,
              cos,
              sin,
              num_attention_heads,
              rms_norm_eps,
              q_bias,
              k_bias,
              v_bias,
              o_bias,
              q_norm,
              k_norm,
              query_scale,
              softmax_scale,
              sliding_window,
              kv_valid},
             args);
  fill_packed(check,
              {{"qkv_proj", qkv_proj}, {"o_proj", o_proj}, {"gate_up_proj", gate_up_proj}, {"down_proj", down_proj}},
              kAny, args);
  check.written({"k_cache", "v_cache"});
  const Tensor out = new_out(hidden, args), similarity = new_similarity(hidden, args);
  launch(
      check, [&] { cpu::launch_exit_layer(args, kParallel); },
      [&](auto& gpu) { cuda::launch_exit_layer(args, gpu.workspace(cuda::exit_layer_workspace(args)), gpu.stream()); });
  return {out, similarity};
}

// exited int32 [layers] and similarities fp32 [layers, T]; returns the number of layers.
int check_exits(Check& check, const Tensor& exited, const Tensor& similarities, int rows) {
  check.tensor("exited", exited, ScalarType::Int, {kAny});
  const int layers = check.size("layers of exited", exited.size(0));
  check.tensor("similarities", similarities, ScalarType::Float, {layers, rows});
  return layers;
}

Tensor dual_layer(int64_t index, const Tensor& hidden, const OptionalTensor& previous, const Tensor& thresholds,
                  const Tensor& min_layers, const Tensor& limit, const Tensor& exited, const Tensor& similarities,
                  const Tensor& input_layernorm, const Tensor& q_proj, const Tensor& k_proj, const Tensor& v_proj,
                  const Tensor& o_proj, const Tensor& post_attention_layernorm, const Tensor& gate_proj,
                  const Tensor& up_proj, const Tensor& down_proj, const Tensor& qkv_tiles, const Tensor& o_tiles,
                  const Tensor& gate_up_tiles, const Tensor& down_tiles, const Tensor& k_cache, const Tensor& v_cache,
                  const Tensor& slots, const Tensor& positions, const Tensor& cos, const Tensor& sin,
                  int64_t num_attention_heads, double rms_norm_eps, const OptionalTensor& q_bias,
                  const OptionalTensor& k_bias, const OptionalTensor& v_bias, const OptionalTensor& o_bias,
                  const OptionalTensor& q_norm, const OptionalTensor& k_norm, const OptionalTensor& query_scale,
                  std::optional<double> softmax_scale, std::optional<int64_t> sliding_window,
                  const OptionalTensor& kv_valid) {
  Check check("dual_layer", "hidden", hidden);
  const ScalarType type = hidden.scalar_type();
  DualLayerArgs args{};
  fill_block(check,
             {hidden,
              input_layernorm,
              post_attention_layernorm,
              k_cache,
              v_cache,
              slots,
              positions,
              cos,
              sin,
              num_attention_heads,
              rms_norm_eps,
              q_bias,
              k_bias,
              v_bias,
              o_bias,
              q_norm,
              k_norm,
              query_scale,
              softmax_scale,
              sliding_window,
              kv_valid},
             args.block);
  fill_dense(check, type, {q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj}, args.block);
  static_cast<BlockArgs&>(args.exit_layer) = args.block;
  fill_packed(
      check,
      {{"qkv_tiles", qkv_tiles}, {"o_tiles", o_tiles}, {"gate_up_tiles", gate_up_tiles}, {"down_tiles", down_tiles}},
      tiles_of(2 * (int64_t)args.block.intermediate_size), args.exit_layer);
  const int rows = args.block.rows, layers = check_exits(check, exited, similarities, rows);
  check.tensor("thresholds", thresholds, ScalarType::Float, {rows});
  check.tensor("min_layers", min_layers, ScalarType::Int, {rows});
  check.tensor("limit", limit, ScalarType::Int, {1});
  check.require(index >= 0 && index < layers, "index is ", index, ", expected 0 to ", layers - 1);
  check.require(previous.has_value() == (index > 0), "previous is ", previous ? "given" : "None", " at index ", index,
                ", expected None at index 0 and a tensor at every other");
  if (previous) check.vectors("previous", *previous, type, {rows, args.block.hidden_size});
  args.decision = {.index = (int)index,
                   .previous = previous ? data(*previous) : nullptr,
                   .thresholds = data<float>(thresholds),
                   .min_layers = data<int32_t>(min_layers),
                   .limit = data<int32_t>(limit),
                   .exited = mutable_data<int32_t>(exited),
                   .similarities = mutable_data<float>(similarities)};
  check.written({"exited", "similarities", "k_cache", "v_cache"});
  const Tensor out = new_out(hidden, args.block);
  args.exit_layer.out = args.block.out;
  launch(
      check, [&] { cpu::launch_dual_layer(args, kParallel); },
      [&](auto& gpu) { cuda::launch_dual_layer(args, gpu.workspace(cuda::dual_layer_workspace(args)), gpu.stream()); });
  return out;
}

void advance(const Tensor& before, const Tensor& after, const Tensor& tokens, const Tensor& embed_tokens,
             const Tensor& stop_tokens, const Tensor& hidden, const Tensor& slots, const Tensor& positions,
             const Tensor& draw_positions, const Tensor& remaining, const Tensor& exited, const Tensor& similarities,
             const Tensor& step, const Tensor& records) {
  Check check("advance", "before", before);
  const ScalarType type = before.scalar_type();
  AdvanceArgs args{};
  args.dtype = check.model_dtype("before", type);
  const int rows = args.rows = check.rows("before", before, 2);
  const int size = args.hidden_size = check.size("hidden_size", before.size(1));
  check.require(size % 16 == 0, "hidden_size is ", size, ", expected a multiple of 16");
  check.vectors("before", before, type, {rows, size});
  check.vectors("after", after, type, {rows, size});
  check.tensor("tokens", tokens, ScalarType::Long, {rows});
  check.vectors("embed_tokens", embed_tokens, type, {kAny, size});
  args.vocab_size = check.size("vocab_size of embed_tokens", embed_tokens.size(0));
  check.tensor("stop_tokens", stop_tokens, ScalarType::Long, {kAny});
  check.vectors("hidden", hidden, type, {rows, size});
  check.tensor("slots", slots, ScalarType::Int, {rows});
  check.tensor("positions", positions, ScalarType::Int, {rows});
  check.tensor("draw_positions", draw_positions, ScalarType::Int, {rows});
  check.tensor("remaining", remaining, ScalarType::Int, {rows});
  args.layers = check_exits(check, exited, similarities, rows);
  check.tensor("step", step, ScalarType::Int, {1});
  // The host reads the records while the GPU works: there they are memory of the host.
  check.defined("records", records);
  check.require(records.is_cpu(), "records is on ", device_of(records), ", expected cpu");
  const int record = check.size("the size of a record", 2 + rows + args.layers * (int64_t)rows);
  check.content("records", records, ScalarType::Int, {kAny, record});
  args.num_records = check.size("entries of records", records.size(0));
  args.num_stop_tokens = stop_tokens.size(0) ? check.size("entries of stop_tokens", stop_tokens.size(0)) : 0;
  args.before = data(before);
  args.after = data(after);
  args.tokens = data<int64_t>(tokens);
  args.embed_tokens = data(embed_tokens);
  args.stop_tokens = data<int64_t>(stop_tokens);
  args.hidden = hidden.mutable_data_ptr();
  args.slots = mutable_data<int32_t>(slots);
  args.positions = mutable_data<int32_t>(positions);
  args.draw_positions = mutable_data<int32_t>(draw_positions);
  args.remaining = mutable_data<int32_t>(remaining);
  args.exited = mutable_data<int32_t>(exited);
  args.similarities = mutable_data<float>(similarities);
  args.step = mutable_data<int32_t>(step);
  args.records = mutable_data<int32_t>(records);
  check.written(
      {"hidden", "slots", "positions", "draw_positions", "remaining", "exited", "similarities", "step", "records"},
      "before");  // of a network of one layer, whose input `hidden` is
  if (!check.on_cuda()) check.in_place("step", 0, *args.step, 0, INT32_MAX - 1);
  launch(
      check, [&] { cpu::launch_advance(args, kParallel); },
      [&](auto& gpu) {
        check.require(cuda::is_pinned(args.records), "records is not in pinned memory, expected a pinned CPU tensor ",
                      "where the others are on CUDA");
        cuda::launch_advance(args, gpu.workspace({}), gpu.stream());
      });
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("decoder_block", TORCH_BOX(&decoder_block));
  m.impl("exit_layer", TORCH_BOX(&exit_layer));
  m.impl("dual_layer", TORCH_BOX(&dual_layer));
  m.impl("advance", TORCH_BOX(&advance));
}

}  // namespace

RIVER_IMPLEMENT(implement)

#define RIVER_BLOCK_OPTIONS(k_alias, v_alias)                                                                      \
  "Tensor(" k_alias "!) k_cache, Tensor(" v_alias                                                                  \
  "!) v_cache, Tensor slots, Tensor positions, Tensor cos, "                                                       \
  "Tensor sin, int num_attention_heads, float rms_norm_eps, Tensor? q_bias=None, Tensor? k_bias=None, "            \
  "Tensor? v_bias=None, Tensor? o_bias=None, Tensor? q_norm=None, Tensor? k_norm=None, Tensor? query_scale=None, " \
  "float? softmax_scale=None, int? sliding_window=None, Tensor? kv_valid=None"

STABLE_TORCH_LIBRARY_FRAGMENT(river, m) {
  m.def(
      "decoder_block(Tensor hidden, Tensor input_layernorm, Tensor q_proj, Tensor k_proj, Tensor v_proj, "
      "Tensor o_proj, Tensor post_attention_layernorm, Tensor gate_proj, Tensor up_proj, Tensor down_proj, " RIVER_BLOCK_OPTIONS(
          "a", "b") ") -> (Tensor, Tensor)");
  m.def(
      "exit_layer(Tensor hidden, Tensor input_layernorm, Tensor qkv_proj, Tensor o_proj, "
      "Tensor post_attention_layernorm, Tensor gate_up_proj, Tensor down_proj, " RIVER_BLOCK_OPTIONS(
          "a", "b") ") -> (Tensor, Tensor)");
  m.def(
      "dual_layer(int index, Tensor hidden, Tensor? previous, Tensor thresholds, Tensor min_layers, Tensor limit, "
      "Tensor(a!) exited, Tensor(b!) similarities, Tensor input_layernorm, Tensor q_proj, Tensor k_proj, "
      "Tensor v_proj, Tensor o_proj, Tensor post_attention_layernorm, Tensor gate_proj, Tensor up_proj, "
      "Tensor down_proj, Tensor qkv_tiles, Tensor o_tiles, Tensor gate_up_tiles, Tensor down_tiles, " RIVER_BLOCK_OPTIONS(
          "c", "d") ") -> Tensor");
  m.def(
      "advance(Tensor before, Tensor after, Tensor tokens, Tensor embed_tokens, Tensor stop_tokens, "
      "Tensor(a!) hidden, Tensor(b!) slots, Tensor(c!) positions, Tensor(d!) draw_positions, "
      "Tensor(e!) remaining, Tensor(f!) exited, Tensor(g!) similarities, Tensor(h!) step, Tensor(i!) records) -> ()");
}

}  // namespace river::ops
