// The ops beside the layers: attention, similarity, head, linears and the W4 format.
#include <algorithm>
#include <tuple>
#include <utility>

#include "dispatch.h"

namespace river::ops {
namespace {

Tensor decode_attention(const Tensor& query, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
                        const Tensor& positions, std::optional<double> softmax_scale,
                        std::optional<int64_t> sliding_window, const OptionalTensor& kv_valid) {
  Check check("decode_attention", "query", query);
  const ScalarType type = query.scalar_type();
  AttentionArgs args{};
  args.dtype = check.model_dtype("query", type);
  args.rows = check.rows("query", query, 3);
  args.num_heads = check.size("num_attention_heads of query", query.size(1));
  const Cache cache(check, type, args.rows, args.num_heads, k_cache, v_cache, slots, positions, kv_valid);
  args.num_kv_heads = cache.kv_heads;
  args.head_dim = cache.head_dim;
  args.num_slots = cache.slots;
  args.max_len = cache.max_len;
  check.vectors("query", query, type, {args.rows, args.num_heads, args.head_dim});
  args.softmax_scale = scale_of(check, softmax_scale, args.head_dim);
  args.sliding_window = window(check, sliding_window);
  args.query = data(query);
  args.k_cache = data(k_cache);
  args.v_cache = data(v_cache);
  args.slots = cache.row_slots;
  args.positions = cache.row_positions;
  args.kv_valid = kv_valid ? data<bool>(*kv_valid) : nullptr;
  const Tensor out = empty({args.rows, args.num_heads, args.head_dim}, type, query);
  args.out = out.mutable_data_ptr();
  launch(
      check, [&] { cpu::launch_decode_attention(args, kParallel); },
      [&](auto& gpu) {
        cuda::launch_decode_attention(args, gpu.workspace(cuda::decode_attention_workspace(args)), gpu.stream());
      });
  return out;
}

Tensor state_similarity(const Tensor& x, const Tensor& y) {
  Check check("state_similarity", "x", x);
  StateSimilarityArgs args{};
  args.dtype = check.model_dtype("x", x.scalar_type());
  args.rows = check.rows("x", x, 2);
  args.hidden_size = check.size("hidden_size", x.size(1));
  check.require(args.hidden_size % 16 == 0, "hidden_size is ", args.hidden_size, ", expected a multiple of 16");
  check.vectors("x", x, x.scalar_type(), {args.rows, args.hidden_size});
  check.vectors("y", y, x.scalar_type(), {args.rows, args.hidden_size});
  args.x = data(x);
  args.y = data(y);
  const Tensor out = empty({args.rows}, ScalarType::Float, x);
  args.out = mutable_data<float>(out);
  launch(
      check, [&] { cpu::launch_state_similarity(args, kParallel); },
      [&](auto& gpu) { cuda::launch_state_similarity(args, gpu.workspace({}), gpu.stream()); });
  return out;
}

std::tuple<Tensor, Tensor> lm_head(const Tensor& hidden, const Tensor& norm, const Tensor& weight, double rms_norm_eps,
                                   bool return_logits, const OptionalTensor& temperature, const OptionalTensor& seeds,
                                   const OptionalTensor& positions) {
  Check check("lm_head", "hidden", hidden);
  const ScalarType type = hidden.scalar_type();
  LmHeadArgs args{};
  args.dtype = check.model_dtype("hidden", type);
  args.rows = check.rows("hidden", hidden, 2);
  args.hidden_size = check.size("hidden_size", hidden.size(1));
  check.require(!check.on_cuda() || args.hidden_size % 64 == 0, "hidden_size is ", args.hidden_size,
                ", expected a multiple of 64 on CUDA");
  check.vectors("hidden", hidden, type, {args.rows, args.hidden_size});
  check.vectors("norm", norm, type, {args.hidden_size});
  check.vectors("weight", weight, type, {kAny, args.hidden_size});
  args.vocab_size = check.size("vocab_size of weight", weight.size(0));
  args.temperature = check.optional<float>("temperature", temperature, ScalarType::Float, {args.rows});
  args.seeds = check.optional<int64_t>("seeds", seeds, ScalarType::Long, {args.rows});
  args.positions = check.optional<int32_t>("positions", positions, ScalarType::Int, {args.rows});
  check.require(!temperature == !seeds && !temperature == !positions,
                "temperature, seeds and positions are given in part, expected all three or none");
  for (int row = 0; temperature && !check.on_cuda() && row < args.rows; row++)
    check.require(std::isfinite(args.temperature[row]) && args.temperature[row] >= 0, "temperature[", row, "] is ",
                  args.temperature[row], ", expected a finite number >= 0");
  args.rms_norm_eps = eps_of(check, rms_norm_eps);
  const Tensor tokens = empty({args.rows}, ScalarType::Long, hidden);
  const Tensor logits = empty({return_logits ? args.rows : 0, args.vocab_size}, ScalarType::Float, hidden);
  args.hidden = data(hidden);
  args.norm = data(norm);
  args.weight = data(weight);
  args.tokens = mutable_data<int64_t>(tokens);
  args.logits = return_logits ? mutable_data<float>(logits) : nullptr;
  launch(
      check, [&] { cpu::launch_lm_head(args, kParallel); },
      [&](auto& gpu) { cuda::launch_lm_head(args, gpu.workspace(cuda::lm_head_workspace(args)), gpu.stream()); });
  return {tokens, logits};
}

Tensor run_linear(Check check, const Tensor& x, const Tensor& weight, bool packed, int64_t out_features,
                  const OptionalTensor& bias) {
  const ScalarType type = x.scalar_type();
  LinearArgs args{};
  args.dtype = check.model_dtype("x", type);
  args.packed = packed;
  args.rows = check.rows("x", x, 2);
  args.in_features = check.vector_size("in_features", x.size(1));
  check.vectors("x", x, type, {args.rows, args.in_features});
  if (packed) {
    args.out_features = check.size("out_features", out_features);
    check.vectors("weight", weight, ScalarType::Byte,
                  {tiles_of(out_features), column_tiles_of(args.in_features), kTileBytes});
  } else {
    check.vectors("weight", weight, type, {kAny, args.in_features});
    args.out_features = check.size("out_features of weight", weight.size(0));
  }
  args.x = data(x);
  args.weight = data(weight);
  args.bias = check.optional("bias", bias, type, {args.out_features});
  const Tensor out = empty({args.rows, args.out_features}, type, x);
  args.out = out.mutable_data_ptr();
  launch(
      check, [&] { cpu::launch_linear(args, kParallel); },
      [&](auto& gpu) { cuda::launch_linear(args, gpu.workspace(cuda::linear_workspace(args)), gpu.stream()); });
  return out;
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return run_linear(Check("linear", "x", x), x, weight, false, 0, bias);
}

Tensor linear_w4(const Tensor& x, const Tensor& weight, int64_t out_features, const OptionalTensor& bias) {
  return run_linear(Check("linear_w4", "x", x), x, weight, true, out_features, bias);
}

// Levels 0 to 15, finite metadata
void check_levels(const Check& check, const Tensor& q, const Tensor& scale, const Tensor& zero) {
  const int64_t columns = q.size(1), groups = scale.size(1);
  const auto* values = data<uint8_t>(q);
  for (int64_t i = 0; i < q.size(0) * columns; i++)
    check.require(values[i] <= 15, "q[", i / columns, ", ", i % columns, "] is ", (int)values[i], ", expected 0 to 15");
  for (const auto& [name, t] : {std::pair("scale", &scale), std::pair("zero", &zero)}) {
    const auto* bits = data<uint16_t>(*t);
    for (int64_t i = 0; i < q.size(0) * groups; i++)
      check.require((bits[i] & 0x7c00) != 0x7c00, name, "[", i / groups, ", ", i % groups, "] is not finite");
  }
}

Tensor pack_w4(const Tensor& q, const Tensor& scale, const Tensor& zero) {
  Check check("pack_w4", "q", q);
  check.tensor("q", q, ScalarType::Byte, {kAny, kAny});
  W4Args args{};
  args.out_features = check.size("out_features of q", q.size(0));
  args.in_features = check.size("in_features of q", q.size(1));
  check.tensor("scale", scale, ScalarType::Half, {args.out_features, kAny});
  const int64_t groups = scale.size(1), tiles = column_tiles_of(args.in_features);
  check.require(groups >= 1 && groups <= tiles, "scale has ", groups, " groups for ", args.in_features,
                " columns, expected 1 to ", tiles, " (groups of at least ", kTileCols, " columns)");
  args.group_tiles = (int)ceil_div(tiles, groups);
  check.require(ceil_div(tiles, args.group_tiles) == groups, "scale has ", groups, " groups for ", args.in_features,
                " columns, expected a number that groups of a multiple of ", kTileCols, " give");
  check.tensor("zero", zero, ScalarType::Half, {args.out_features, groups});
  if (!check.on_cuda()) check_levels(check, q, scale, zero);
  args.q = const_cast<uint8_t*>(data<uint8_t>(q));
  args.scale = const_cast<uint16_t*>(data<uint16_t>(scale));
  args.zero = const_cast<uint16_t*>(data<uint16_t>(zero));
  const Tensor packed = empty({tiles_of(args.out_features), tiles, kTileBytes}, ScalarType::Byte, q);
  args.packed = mutable_data<uint8_t>(packed);
  launch(
      check, [&] { cpu::launch_pack_w4(args, kParallel); },
      [&](auto& gpu) { cuda::launch_pack_w4(args, gpu.stream()); });
  return packed;
}

W4Args unpacking(Check& check, const Tensor& packed, int64_t out_features, int64_t in_features) {
  W4Args args{};
  args.out_features = check.size("out_features", out_features);
  args.in_features = check.size("in_features", in_features);
  check.vectors("packed", packed, ScalarType::Byte, {tiles_of(out_features), column_tiles_of(in_features), kTileBytes});
  args.packed = const_cast<uint8_t*>(data<uint8_t>(packed));
  return args;
}

std::tuple<Tensor, Tensor, Tensor> unpack_w4(const Tensor& packed, int64_t out_features, int64_t in_features,
                                             int64_t group_size) {
  Check check("unpack_w4", "packed", packed);
  W4Args args = unpacking(check, packed, out_features, in_features);
  check.require(group_size >= kTileCols && group_size % kTileCols == 0, "group_size is ", group_size,
                ", expected a multiple of ", kTileCols);
  group_size = std::min(group_size, round_up(in_features, kTileCols));
  args.group_tiles = (int)(group_size / kTileCols);
  const int64_t groups = ceil_div(in_features, group_size);
  const Tensor q = empty({out_features, in_features}, ScalarType::Byte, packed);
  const Tensor scale = empty({out_features, groups}, ScalarType::Half, packed);
  const Tensor zero = empty({out_features, groups}, ScalarType::Half, packed);
  args.q = mutable_data<uint8_t>(q);
  args.scale = mutable_data<uint16_t>(scale);
  args.zero = mutable_data<uint16_t>(zero);
  launch(
      check, [&] { cpu::launch_unpack_w4(args, kParallel); },
      [&](auto& gpu) { cuda::launch_unpack_w4(args, gpu.stream()); });
  return {q, scale, zero};
}

Tensor dequantize_w4(const Tensor& packed, int64_t out_features, int64_t in_features, ScalarType dtype) {
  Check check("dequantize_w4", "packed", packed);
  W4Args args = unpacking(check, packed, out_features, in_features);
  args.group_tiles = 1;
  args.dtype = check.dense_dtype("dtype", dtype);
  const Tensor dense = empty({out_features, in_features}, dtype, packed);
  args.dense = dense.mutable_data_ptr();
  launch(
      check, [&] { cpu::launch_dequantize_w4(args, kParallel); },
      [&](auto& gpu) { cuda::launch_dequantize_w4(args, gpu.stream()); });
  return dense;
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("state_similarity", TORCH_BOX(&state_similarity));
  m.impl("lm_head", TORCH_BOX(&lm_head));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_w4", TORCH_BOX(&linear_w4));
  m.impl("pack_w4", TORCH_BOX(&pack_w4));
  m.impl("unpack_w4", TORCH_BOX(&unpack_w4));
  m.impl("dequantize_w4", TORCH_BOX(&dequantize_w4));
}

}  // namespace

RIVER_IMPLEMENT(implement)

STABLE_TORCH_LIBRARY_FRAGMENT(river, m) {
  m.def(
      "decode_attention(Tensor query, Tensor k_cache, Tensor v_cache, Tensor slots, Tensor positions, "
      "float? softmax_scale=None, int? sliding_window=None, Tensor? kv_valid=None) -> Tensor");
  m.def("state_similarity(Tensor x, Tensor y) -> Tensor");
  m.def(
      "lm_head(Tensor hidden, Tensor norm, Tensor weight, float rms_norm_eps, bool return_logits=True, "
      "Tensor? temperature=None, Tensor? seeds=None, Tensor? positions=None) -> (Tensor, Tensor)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("linear_w4(Tensor x, Tensor weight, int out_features, Tensor? bias=None) -> Tensor");
  m.def("pack_w4(Tensor q, Tensor scale, Tensor zero) -> Tensor");
  m.def("unpack_w4(Tensor packed, int out_features, int in_features, int group_size=64) -> (Tensor, Tensor, Tensor)");
  m.def("dequantize_w4(Tensor packed, int out_features, int in_features, ScalarType dtype) -> Tensor");
}

}  // namespace river::ops
