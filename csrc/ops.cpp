// The torch side: schemas, argument checks, registration of torch.ops.river.*, and the pybind11 facts.
// The only file that includes torch (stable ABI: one binary serves torch 2.11 and later).
#include <pybind11/pybind11.h>  // before the next line: the pybind11 that torch 2.11 bundles refuses it
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "river.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;
namespace cpu = river::cpu;

const cpu::Parallel kParallel{[](int64_t n, int64_t grain, cpu::Parallel::Body body, void* context) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}};

// ---- argument checks: device, dtype, shape, layout, range ---------------------------------------

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

constexpr int64_t kAny = -1;

template <class Values>
std::string text(const Values& values) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < values.size(); i++) {
    if (i) out << ", ";
    if (values[i] == kAny) out << "*";
    else out << values[i];
  }
  out << "]";
  return out.str();
}

class Check {  // of one op's arguments
 public:
  explicit Check(const char* op) : op_(op) {}

  template <class... Parts>
  void require(bool ok, const Parts&... parts) const {
    if (ok) return;
    std::ostringstream out;
    out << "river::" << op_ << ": ";
    (out << ... << parts);
    throw std::runtime_error(out.str());
  }

  void tensor(const char* name, const Tensor& t, ScalarType type, const Sizes& sizes) const {
    require(t.is_cpu(), name, " is on another device than the CPU tensors beside it");
    require(t.scalar_type() == type, name, " is ", name_of(t.scalar_type()), ", expected ", name_of(type));
    const auto have = t.sizes();
    bool same = have.size() == sizes.size();
    for (size_t i = 0; same && i < sizes.size(); i++) same = sizes[i] == kAny || have[i] == sizes[i];
    require(same, name, " has shape ", text(have), ", expected ", text(sizes));
    require(t.is_contiguous(), name, " is not contiguous");
  }

  // Null where absent
  template <class T = void>
  const T* optional(const char* name, const OptionalTensor& t, ScalarType type, const Sizes& sizes) const {
    if (!t) return nullptr;
    tensor(name, *t, type, sizes);
    return static_cast<const T*>(t->const_data_ptr());
  }

  river::DType model_dtype(const char* name, ScalarType type) const {
    if (type == ScalarType::Float) return river::DType::kFloat32;
    if (type == ScalarType::BFloat16) return river::DType::kBFloat16;
    require(type == ScalarType::Half, name, " is ", name_of(type), ", expected bfloat16, float16 or float32");
    return river::DType::kFloat16;
  }

  // The first dim of a [T, ...] tensor
  int rows(const char* name, const Tensor& t, int dims) const {
    require((int)t.dim() == dims, name, " has ", t.dim(), " dimensions, expected ", dims);
    const int64_t rows = t.size(0);
    require(rows >= 1 && rows <= river::kMaxRows, name, " has ", rows, " rows, expected 1 to ", river::kMaxRows);
    return (int)rows;
  }

  // Sizes that fit the int fields of the Args and every product of two of them an int64
  int size(const char* name, int64_t value) const {
    require(value >= 1 && value < (int64_t(1) << 30), name, " is ", value, ", expected 1 to 2^30 - 1");
    return (int)value;
  }

  void in_place(const char* name, int row, int64_t value, int64_t first, int64_t last) const {
    require(value >= first && value <= last, name, "[", row, "] is ", value, ", expected ", first, " to ", last);
  }

 private:
  const char* op_;
};

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

Tensor empty(const Sizes& sizes, ScalarType type, const Tensor& like) {
  return torch::stable::new_empty(like, sizes, type);
}

// What decode_attention and the blocks check alike: the caches, and every row's place in them.
struct Cache {
  int slots, kv_heads, max_len, head_dim;

  Cache(const Check& check, ScalarType type, int rows, int heads, const Tensor& k, const Tensor& v,
        const Tensor& slots_, const Tensor& positions, const OptionalTensor& kv_valid) {
    check.tensor("k_cache", k, type, {kAny, kAny, kAny, kAny});
    slots = check.size("slots of k_cache", k.size(0));
    kv_heads = check.size("num_key_value_heads of k_cache", k.size(1));
    max_len = check.size("max_len of k_cache", k.size(2));
    head_dim = check.size("head_dim of k_cache", k.size(3));
    check.tensor("v_cache", v, type, {slots, kv_heads, max_len, head_dim});
    check.require(head_dim % 2 == 0 && head_dim <= river::kMaxHeadDim, "head_dim is ", head_dim,
                  ", expected an even number up to ", river::kMaxHeadDim);
    check.require(heads >= 1 && heads % kv_heads == 0 && heads / kv_heads <= river::kMaxGroup,
                  "num_attention_heads is ", heads, ", expected a multiple of num_key_value_heads = ", kv_heads,
                  ", at most ", river::kMaxGroup, " times as many");
    check.size("num_attention_heads * head_dim", (int64_t)heads * head_dim);
    check.require(k.const_data_ptr() != v.const_data_ptr(), "k_cache and v_cache are the same memory");
    check.tensor("slots", slots_, ScalarType::Int, {rows});
    check.tensor("positions", positions, ScalarType::Int, {rows});
    check.optional("kv_valid", kv_valid, ScalarType::Bool, {slots, max_len});
    const auto* slot = data<int32_t>(slots_);
    const auto* position = data<int32_t>(positions);
    for (int row = 0; row < rows; row++) {
      check.in_place("slots", row, slot[row], -1, slots - 1);
      if (slot[row] >= 0) check.in_place("positions", row, position[row], 0, max_len - 1);
    }
  }
};

int64_t window(const Check& check, std::optional<int64_t> sliding_window) {
  check.require(!sliding_window || *sliding_window >= 1, "sliding_window is ", sliding_window.value_or(0),
                ", expected at least 1");
  return std::min(sliding_window.value_or(0), int64_t(1) << 31);  // no position is larger
}

float scale_of(const Check& check, std::optional<double> softmax_scale, int head_dim) {
  const double scale = softmax_scale.value_or(1 / std::sqrt((double)head_dim));
  check.require(std::isfinite((float)scale), "softmax_scale is ", scale, ", expected a finite number");
  return (float)scale;
}

void finite_eps(const Check& check, double eps) {
  check.require(std::isfinite((float)eps) && eps >= 0, "rms_norm_eps is ", eps, ", expected a finite number >= 0");
}

// ---- the blocks -----------------------------------------------------------------------------------

struct BlockTensors {
  const Tensor &hidden, &input_layernorm, &post_attention_layernorm, &k_cache, &v_cache, &slots, &positions, &cos,
      &sin;
  int64_t num_attention_heads;
  double rms_norm_eps;
  const OptionalTensor &q_bias, &k_bias, &v_bias, &o_bias, &q_norm, &k_norm, &query_scale;
  std::optional<double> softmax_scale;
  std::optional<int64_t> sliding_window;
  const OptionalTensor& kv_valid;
};

// Checks what both layers share and fills their common arguments; out and similarity are allocated.
void fill_block(const Check& check, const BlockTensors& t, river::BlockArgs& args, Tensor& out, Tensor& similarity) {
  check.require(t.hidden.is_cpu(), "hidden is not on the CPU");
  const ScalarType type = t.hidden.scalar_type();
  args.dtype = check.model_dtype("hidden", type);
  args.rows = check.rows("hidden", t.hidden, 2);
  args.hidden_size = check.size("hidden_size", t.hidden.size(1));
  check.require(args.hidden_size % 64 == 0, "hidden_size is ", args.hidden_size, ", expected a multiple of 64");
  const int64_t hidden = args.hidden_size;
  check.tensor("hidden", t.hidden, type, {args.rows, hidden});
  check.tensor("input_layernorm", t.input_layernorm, type, {hidden});
  check.tensor("post_attention_layernorm", t.post_attention_layernorm, type, {hidden});
  args.num_heads = check.size("num_attention_heads", t.num_attention_heads);
  const Cache cache(check, type, args.rows, args.num_heads, t.k_cache, t.v_cache, t.slots, t.positions, t.kv_valid);
  args.num_kv_heads = cache.kv_heads;
  args.head_dim = cache.head_dim;
  args.num_slots = cache.slots;
  args.max_len = cache.max_len;
  const auto* slot = data<int32_t>(t.slots);
  const auto* position = data<int32_t>(t.positions);
  for (int i = 0; i < args.rows; i++)
    for (int j = 0; j < i; j++)
      check.require(slot[i] < 0 || slot[i] != slot[j] || position[i] != position[j], "rows ", j, " and ", i,
                    " are both at slot ", slot[i], ", position ", position[i], ", expected each place once");
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
  if (t.query_scale) {
    check.tensor("query_scale", *t.query_scale, ScalarType::Float, {kAny});
    check.require(t.query_scale->size(0) >= args.max_len, "query_scale has ", t.query_scale->size(0),
                  " entries, expected at least max_len = ", args.max_len);
  }
  args.query_scale = t.query_scale ? data<float>(*t.query_scale) : nullptr;
  finite_eps(check, t.rms_norm_eps);
  args.rms_norm_eps = (float)t.rms_norm_eps;
  args.softmax_scale = scale_of(check, t.softmax_scale, args.head_dim);
  args.sliding_window = window(check, t.sliding_window);
  args.kv_valid = t.kv_valid ? data<bool>(*t.kv_valid) : nullptr;
  args.hidden = t.hidden.const_data_ptr();
  args.input_layernorm = t.input_layernorm.const_data_ptr();
  args.post_attention_layernorm = t.post_attention_layernorm.const_data_ptr();
  args.cos = data<float>(t.cos);
  args.sin = data<float>(t.sin);
  args.slots = slot;
  args.positions = position;
  args.k_cache = t.k_cache.mutable_data_ptr();
  args.v_cache = t.v_cache.mutable_data_ptr();
  out = empty({args.rows, hidden}, type, t.hidden);
  similarity = empty({args.rows}, ScalarType::Float, t.hidden);
  args.out = out.mutable_data_ptr();
  args.similarity = static_cast<float*>(similarity.mutable_data_ptr());
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
  const Check check("decoder_block");
  river::DecoderBlockArgs args{};
  Tensor out, similarity;
  fill_block(check,
             {hidden, input_layernorm, post_attention_layernorm, k_cache, v_cache, slots, positions, cos, sin,
              num_attention_heads, rms_norm_eps, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm, query_scale,
              softmax_scale, sliding_window, kv_valid},
             args, out, similarity);
  const ScalarType type = hidden.scalar_type();
  const int64_t size = args.hidden_size, q_size = (int64_t)args.num_heads * args.head_dim,
                kv_size = (int64_t)args.num_kv_heads * args.head_dim;
  check.tensor("q_proj", q_proj, type, {q_size, size});
  check.tensor("k_proj", k_proj, type, {kv_size, size});
  check.tensor("v_proj", v_proj, type, {kv_size, size});
  check.tensor("o_proj", o_proj, type, {size, q_size});
  check.tensor("gate_proj", gate_proj, type, {kAny, size});
  args.intermediate_size = check.size("intermediate_size", gate_proj.size(0));
  check.tensor("up_proj", up_proj, type, {args.intermediate_size, size});
  check.tensor("down_proj", down_proj, type, {size, args.intermediate_size});
  args.q_proj = q_proj.const_data_ptr();
  args.k_proj = k_proj.const_data_ptr();
  args.v_proj = v_proj.const_data_ptr();
  args.o_proj = o_proj.const_data_ptr();
  args.gate_proj = gate_proj.const_data_ptr();
  args.up_proj = up_proj.const_data_ptr();
  args.down_proj = down_proj.const_data_ptr();
  cpu::launch_decoder_block(args, kParallel);
  return {out, similarity};
}

int64_t tiles_of(int64_t rows) { return river::ceil_div(rows, river::kTileRows); }
int64_t column_tiles_of(int64_t columns) { return river::ceil_div(columns, river::kTileCols); }

std::tuple<Tensor, Tensor> exit_layer(
    const Tensor& hidden, const Tensor& input_layernorm, const Tensor& qkv_proj, const Tensor& o_proj,
    const Tensor& post_attention_layernorm, const Tensor& gate_up_proj, const Tensor& down_proj, const Tensor& k_cache,
    const Tensor& v_cache, const Tensor& slots, const Tensor& positions, const Tensor& cos, const Tensor& sin,
    int64_t num_attention_heads, double rms_norm_eps, const OptionalTensor& q_bias, const OptionalTensor& k_bias,
    const OptionalTensor& v_bias, const OptionalTensor& o_bias, const OptionalTensor& q_norm,
    const OptionalTensor& k_norm, const OptionalTensor& query_scale, std::optional<double> softmax_scale,
    std::optional<int64_t> sliding_window, const OptionalTensor& kv_valid) {
  const Check check("exit_layer");
  river::ExitLayerArgs args{};
  Tensor out, similarity;
  fill_block(check,
             {hidden, input_layernorm, post_attention_layernorm, k_cache, v_cache, slots, positions, cos, sin,
              num_attention_heads, rms_norm_eps, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm, query_scale,
              softmax_scale, sliding_window, kv_valid},
             args, out, similarity);
  const int64_t q_size = (int64_t)args.num_heads * args.head_dim, kv_size = (int64_t)args.num_kv_heads * args.head_dim;
  const int64_t hidden_tiles = column_tiles_of(args.hidden_size);
  const ScalarType byte = ScalarType::Byte;
  check.tensor("qkv_proj", qkv_proj, byte, {tiles_of(q_size) + 2 * tiles_of(kv_size), hidden_tiles, river::kTileBytes});
  check.tensor("o_proj", o_proj, byte, {tiles_of(args.hidden_size), column_tiles_of(q_size), river::kTileBytes});
  check.tensor("gate_up_proj", gate_up_proj, byte, {kAny, hidden_tiles, river::kTileBytes});
  args.gate_up_tiles = check.size("row tiles of gate_up_proj", gate_up_proj.size(0));
  const int64_t inner = check.size("channels of gate_up_proj", args.gate_up_tiles * (int64_t)river::kTileRows / 2);
  check.tensor("down_proj", down_proj, byte, {tiles_of(args.hidden_size), column_tiles_of(inner), river::kTileBytes});
  args.qkv_proj = data<uint8_t>(qkv_proj);
  args.o_proj = data<uint8_t>(o_proj);
  args.gate_up_proj = data<uint8_t>(gate_up_proj);
  args.down_proj = data<uint8_t>(down_proj);
  cpu::launch_exit_layer(args, kParallel);
  return {out, similarity};
}

// ---- the small ops ----------------------------------------------------------------------------------

Tensor decode_attention(const Tensor& query, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
                        const Tensor& positions, std::optional<double> softmax_scale,
                        std::optional<int64_t> sliding_window, const OptionalTensor& kv_valid) {
  const Check check("decode_attention");
  check.require(query.is_cpu(), "query is not on the CPU");
  const ScalarType type = query.scalar_type();
  const river::DType dtype = check.model_dtype("query", type);
  const int rows = check.rows("query", query, 3);
  const int heads = check.size("num_attention_heads of query", query.size(1));
  const Cache cache(check, type, rows, heads, k_cache, v_cache, slots, positions, kv_valid);
  check.tensor("query", query, type, {rows, heads, cache.head_dim});
  Tensor out = empty({rows, heads, cache.head_dim}, type, query);
  cpu::launch_decode_attention(
      {.dtype = dtype, .rows = rows, .num_heads = heads, .num_kv_heads = cache.kv_heads, .head_dim = cache.head_dim,
       .num_slots = cache.slots, .max_len = cache.max_len,
       .softmax_scale = scale_of(check, softmax_scale, cache.head_dim),
       .sliding_window = window(check, sliding_window), .query = query.const_data_ptr(),
       .k_cache = k_cache.const_data_ptr(), .v_cache = v_cache.const_data_ptr(), .slots = data<int32_t>(slots),
       .positions = data<int32_t>(positions), .kv_valid = kv_valid ? data<bool>(*kv_valid) : nullptr,
       .out = out.mutable_data_ptr()},
      kParallel);
  return out;
}

Tensor state_similarity(const Tensor& x, const Tensor& y) {
  const Check check("state_similarity");
  check.require(x.is_cpu(), "x is not on the CPU");
  const river::DType dtype = check.model_dtype("x", x.scalar_type());
  const int rows = check.rows("x", x, 2);
  const int size = check.size("hidden_size", x.size(1));
  check.require(size % 16 == 0, "hidden_size is ", size, ", expected a multiple of 16");
  check.tensor("x", x, x.scalar_type(), {rows, size});
  check.tensor("y", y, x.scalar_type(), {rows, size});
  Tensor out = empty({rows}, ScalarType::Float, x);
  cpu::launch_state_similarity({.dtype = dtype, .rows = rows, .hidden_size = size, .x = x.const_data_ptr(),
                                .y = y.const_data_ptr(), .out = static_cast<float*>(out.mutable_data_ptr())},
                               kParallel);
  return out;
}

std::tuple<Tensor, Tensor> lm_head(const Tensor& hidden, const Tensor& norm, const Tensor& weight, double rms_norm_eps,
                                   bool return_logits, const OptionalTensor& temperature, const OptionalTensor& seeds,
                                   const OptionalTensor& positions) {
  const Check check("lm_head");
  check.require(hidden.is_cpu(), "hidden is not on the CPU");
  const ScalarType type = hidden.scalar_type();
  river::LmHeadArgs args{};
  args.dtype = check.model_dtype("hidden", type);
  args.rows = check.rows("hidden", hidden, 2);
  args.hidden_size = check.size("hidden_size", hidden.size(1));
  check.tensor("hidden", hidden, type, {args.rows, args.hidden_size});
  check.tensor("norm", norm, type, {args.hidden_size});
  check.tensor("weight", weight, type, {kAny, args.hidden_size});
  args.vocab_size = check.size("vocab_size of weight", weight.size(0));
  args.temperature = check.optional<float>("temperature", temperature, ScalarType::Float, {args.rows});
  args.seeds = check.optional<int64_t>("seeds", seeds, ScalarType::Long, {args.rows});
  args.positions = check.optional<int32_t>("positions", positions, ScalarType::Int, {args.rows});
  check.require(!temperature == !seeds && !temperature == !positions,
                "temperature, seeds and positions are given in part, expected all three or none");
  for (int row = 0; temperature && row < args.rows; row++)
    check.require(std::isfinite(args.temperature[row]) && args.temperature[row] >= 0, "temperature[", row, "] is ",
                  args.temperature[row], ", expected a finite number >= 0");
  finite_eps(check, rms_norm_eps);
  args.rms_norm_eps = (float)rms_norm_eps;
  Tensor tokens = empty({args.rows}, ScalarType::Long, hidden);
  Tensor logits = empty({return_logits ? args.rows : 0, args.vocab_size}, ScalarType::Float, hidden);
  args.hidden = hidden.const_data_ptr();
  args.norm = norm.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  args.logits = return_logits ? static_cast<float*>(logits.mutable_data_ptr()) : nullptr;
  cpu::launch_lm_head(args, kParallel);
  return {tokens, logits};
}

Tensor run_linear(const Check& check, const Tensor& x, const Tensor& weight, bool packed, int64_t out_features,
                  const OptionalTensor& bias) {
  check.require(x.is_cpu(), "x is not on the CPU");
  const ScalarType type = x.scalar_type();
  const river::DType dtype = check.model_dtype("x", type);
  const int rows = check.rows("x", x, 2);
  const int in_features = check.size("in_features", x.size(1));
  check.tensor("x", x, type, {rows, in_features});
  if (packed) {
    check.size("out_features", out_features);
    check.tensor("weight", weight, ScalarType::Byte,
                 {tiles_of(out_features), column_tiles_of(in_features), river::kTileBytes});
  } else {
    check.tensor("weight", weight, type, {kAny, in_features});
    out_features = check.size("out_features of weight", weight.size(0));
  }
  const void* bias_data = check.optional("bias", bias, type, {out_features});
  Tensor out = empty({rows, out_features}, type, x);
  cpu::launch_linear({.dtype = dtype, .packed = packed, .rows = rows, .in_features = in_features,
                      .out_features = (int)out_features, .x = x.const_data_ptr(), .weight = weight.const_data_ptr(),
                      .bias = bias_data, .out = out.mutable_data_ptr()},
                     kParallel);
  return out;
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return run_linear(Check("linear"), x, weight, false, 0, bias);
}

Tensor linear_w4(const Tensor& x, const Tensor& weight, int64_t out_features, const OptionalTensor& bias) {
  return run_linear(Check("linear_w4"), x, weight, true, out_features, bias);
}

Tensor pack_w4(const Tensor& q, const Tensor& scale, const Tensor& zero) {
  const Check check("pack_w4");
  check.tensor("q", q, ScalarType::Byte, {kAny, kAny});
  const int n = check.size("out_features of q", q.size(0)), k = check.size("in_features of q", q.size(1));
  check.tensor("scale", scale, ScalarType::Half, {n, kAny});
  const int64_t groups = scale.size(1), tiles = column_tiles_of(k);
  check.require(groups >= 1 && groups <= tiles, "scale has ", groups, " groups for ", k,
                " columns, expected 1 to ", tiles, " (groups of at least ", river::kTileCols, " columns)");
  const int64_t group_tiles = river::ceil_div(tiles, groups);
  check.require(river::ceil_div(tiles, group_tiles) == groups, "scale has ", groups, " groups for ", k,
                " columns, expected a number that groups of a multiple of ", river::kTileCols, " give");
  check.tensor("zero", zero, ScalarType::Half, {n, groups});
  const auto* values = data<uint8_t>(q);
  for (int64_t i = 0; i < (int64_t)n * k; i++)
    check.require(values[i] <= 15, "q[", i / k, ", ", i % k, "] is ", (int)values[i], ", expected 0 to 15");
  for (const auto& [name, t] : {std::pair("scale", &scale), std::pair("zero", &zero)})
    for (int64_t i = 0; i < n * groups; i++)
      check.require((data<uint16_t>(*t)[i] & 0x7c00) != 0x7c00, name, "[", i / groups, ", ", i % groups,
                    "] is not finite");
  Tensor packed = empty({tiles_of(n), tiles, river::kTileBytes}, ScalarType::Byte, q);
  cpu::launch_pack_w4({.out_features = n, .in_features = k, .group_tiles = (int)group_tiles, .dtype = {},
                       .packed = static_cast<uint8_t*>(packed.mutable_data_ptr()),
                       .q = const_cast<uint8_t*>(values),
                       .scale = const_cast<uint16_t*>(data<uint16_t>(scale)),
                       .zero = const_cast<uint16_t*>(data<uint16_t>(zero)), .dense = nullptr},
                      kParallel);
  return packed;
}

void check_packed(const Check& check, const Tensor& packed, int64_t out_features, int64_t in_features) {
  check.size("out_features", out_features);
  check.size("in_features", in_features);
  check.tensor("packed", packed, ScalarType::Byte,
               {tiles_of(out_features), column_tiles_of(in_features), river::kTileBytes});
}

std::tuple<Tensor, Tensor, Tensor> unpack_w4(const Tensor& packed, int64_t out_features, int64_t in_features,
                                             int64_t group_size) {
  const Check check("unpack_w4");
  check_packed(check, packed, out_features, in_features);
  check.require(group_size >= river::kTileCols && group_size % river::kTileCols == 0, "group_size is ", group_size,
                ", expected a multiple of ", river::kTileCols);
  group_size = std::min(group_size, river::round_up(in_features, river::kTileCols));
  const int64_t groups = river::ceil_div(in_features, group_size);
  Tensor q = empty({out_features, in_features}, ScalarType::Byte, packed);
  Tensor scale = empty({out_features, groups}, ScalarType::Half, packed);
  Tensor zero = empty({out_features, groups}, ScalarType::Half, packed);
  cpu::launch_unpack_w4({.out_features = (int)out_features, .in_features = (int)in_features,
                         .group_tiles = (int)(group_size / river::kTileCols), .dtype = {},
                         .packed = const_cast<uint8_t*>(data<uint8_t>(packed)),
                         .q = static_cast<uint8_t*>(q.mutable_data_ptr()),
                         .scale = static_cast<uint16_t*>(scale.mutable_data_ptr()),
                         .zero = static_cast<uint16_t*>(zero.mutable_data_ptr()), .dense = nullptr},
                        kParallel);
  return {q, scale, zero};
}

Tensor dequantize_w4(const Tensor& packed, int64_t out_features, int64_t in_features, ScalarType dtype) {
  const Check check("dequantize_w4");
  check_packed(check, packed, out_features, in_features);
  const river::DType to = check.model_dtype("dtype", dtype);
  Tensor out = empty({out_features, in_features}, dtype, packed);
  cpu::launch_dequantize_w4({.out_features = (int)out_features, .in_features = (int)in_features, .group_tiles = 1,
                             .dtype = to, .packed = const_cast<uint8_t*>(data<uint8_t>(packed)), .q = nullptr,
                             .scale = nullptr, .zero = nullptr, .dense = out.mutable_data_ptr()},
                            kParallel);
  return out;
}

}  // namespace

#define RIVER_BLOCK_OPTIONS                                                                                          \
  "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor positions, Tensor cos, Tensor sin, "                 \
  "int num_attention_heads, float rms_norm_eps, Tensor? q_bias=None, Tensor? k_bias=None, Tensor? v_bias=None, "     \
  "Tensor? o_bias=None, Tensor? q_norm=None, Tensor? k_norm=None, Tensor? query_scale=None, "                        \
  "float? softmax_scale=None, int? sliding_window=None, Tensor? kv_valid=None) -> (Tensor, Tensor)"

STABLE_TORCH_LIBRARY(river, m) {
  m.def("decoder_block(Tensor hidden, Tensor input_layernorm, Tensor q_proj, Tensor k_proj, Tensor v_proj, "
        "Tensor o_proj, Tensor post_attention_layernorm, Tensor gate_proj, Tensor up_proj, Tensor down_proj, "
        RIVER_BLOCK_OPTIONS);
  m.def("exit_layer(Tensor hidden, Tensor input_layernorm, Tensor qkv_proj, Tensor o_proj, "
        "Tensor post_attention_layernorm, Tensor gate_up_proj, Tensor down_proj, " RIVER_BLOCK_OPTIONS);
  m.def("decode_attention(Tensor query, Tensor k_cache, Tensor v_cache, Tensor slots, Tensor positions, "
        "float? softmax_scale=None, int? sliding_window=None, Tensor? kv_valid=None) -> Tensor");
  m.def("state_similarity(Tensor x, Tensor y) -> Tensor");
  m.def("lm_head(Tensor hidden, Tensor norm, Tensor weight, float rms_norm_eps, bool return_logits=True, "
        "Tensor? temperature=None, Tensor? seeds=None, Tensor? positions=None) -> (Tensor, Tensor)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("linear_w4(Tensor x, Tensor weight, int out_features, Tensor? bias=None) -> Tensor");
  m.def("pack_w4(Tensor q, Tensor scale, Tensor zero) -> Tensor");
  m.def("unpack_w4(Tensor packed, int out_features, int in_features, int group_size=64) -> (Tensor, Tensor, Tensor)");
  m.def("dequantize_w4(Tensor packed, int out_features, int in_features, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(river, CPU, m) {
  m.impl("decoder_block", TORCH_BOX(&decoder_block));
  m.impl("exit_layer", TORCH_BOX(&exit_layer));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("state_similarity", TORCH_BOX(&state_similarity));
  m.impl("lm_head", TORCH_BOX(&lm_head));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_w4", TORCH_BOX(&linear_w4));
  m.impl("pack_w4", TORCH_BOX(&pack_w4));
  m.impl("unpack_w4", TORCH_BOX(&unpack_w4));
  m.impl("dequantize_w4", TORCH_BOX(&dequantize_w4));
}

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers torch.ops.river.* and holds facts about the build.";
  m.attr("MAX_ROWS") = river::kMaxRows;
  m.attr("TILE_ROWS") = river::kTileRows;
  m.attr("TILE_COLS") = river::kTileCols;
  m.attr("TILE_BYTES") = river::kTileBytes;
  m.def("build_info", [] {
    py::dict info;
    info["version"] = RIVER_VERSION;
    info["cuda"] = (bool)RIVER_WITH_CUDA;
    info["cuda_archs"] = RIVER_CUDA_ARCHS;
    info["cuda_note"] = std::string(RIVER_CUDA_NOTE) + (RIVER_WITH_CUDA ? "; not registered as ops yet" : "");
    info["cpu_isa"] = cpu::isa();
    return info;
  });
  m.def("cpu_isas", [] {
    py::list names;
    for (const char* const* name = cpu::supported_isas(); *name; name++) names.append(*name);
    return py::tuple(names);
  }, "Instruction sets this machine can run, best first");
  m.def("set_cpu_isa", [](const std::string& name) {
    if (!cpu::set_isa(name.c_str())) throw py::value_error("cpu isa '" + name + "' is not supported on this machine");
  }, "Chooses the instruction set of the CPU kernels, for tests and measurements; not while an op runs");
}
