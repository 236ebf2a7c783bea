// lm_head and lm_head_w4: the final norm, the head, dense or packed, and the token.
#include <cmath>

#include "arguments.h"
#include "dispatch.h"

namespace river::ops {
namespace {

#define RIVER_HEAD_OPTIONS                                                                      \
  "float rms_norm_eps, bool return_logits=True, Tensor? temperature=None, Tensor? seeds=None, " \
  "Tensor? positions=None, float logits_scaling=1.0"

struct HeadTensors {
  Tensor hidden;  // [T, hidden]
  Tensor norm;    // [hidden]
  Tensor weight;  // [vocab, hidden], or packed
  double rms_norm_eps;
  bool return_logits;
  OptionalTensor temperature, seeds, positions;  // [T]
  double logits_scaling;
};

template <const char* schema>
HeadTensors read_head(Arguments<schema>& read) {
  return {.hidden = read.tensor("hidden"),
          .norm = read.tensor("norm"),
          .weight = read.tensor("weight"),
          .rms_norm_eps = read.number("rms_norm_eps"),
          .return_logits = read.boolean("return_logits"),
          .temperature = read.optional_tensor("temperature"),
          .seeds = read.optional_tensor("seeds"),
          .positions = read.optional_tensor("positions"),
          .logits_scaling = read.number("logits_scaling")};
}

void fill_sampling(Check& check, const HeadTensors& t, LmHeadArgs& args) {
  args.temperature = check.optional<float>("temperature", t.temperature, {args.rows});
  args.seeds = check.optional<int64_t>("seeds", t.seeds, {args.rows});
  args.positions = check.optional<int32_t>("positions", t.positions, {args.rows});
  check.require(!t.temperature == !t.seeds && !t.temperature == !t.positions,
                "temperature, seeds and positions are given in part, expected all three or none");
}

// On a CPU
void check_values(const Requirements& check, const LmHeadArgs& args) {
  for (int row = 0; args.temperature && row < args.rows; row++)
    check.require(std::isfinite(args.temperature[row]) && args.temperature[row] >= 0, "temperature[", row, "] is ",
                  args.temperature[row], ", expected a finite number >= 0");
}

// All but the weight and what is written
void fill_inputs(Check& check, const HeadTensors& t, LmHeadArgs& args) {
  const ScalarType type = t.hidden.scalar_type();
  args.dtype = check.model_dtype("hidden", type);
  args.rows = check.rows("hidden", t.hidden, 2);
  args.hidden_size = check.size("hidden_size", t.hidden.size(1));
  check.require(!check.on_cuda() || args.hidden_size % 64 == 0, "hidden_size is ", args.hidden_size,
                ", expected a multiple of 64 on CUDA");
  args.hidden = check.vectors("hidden", t.hidden, type, {args.rows, args.hidden_size});
  args.norm = check.vectors("norm", t.norm, type, {args.hidden_size});
  fill_sampling(check, t, args);
  args.rms_norm_eps = check.rms_norm_eps(t.rms_norm_eps);
  args.logits_scaling = float(t.logits_scaling);
  check.require(std::isfinite(args.logits_scaling) && args.logits_scaling > 0, "logits_scaling is ", t.logits_scaling,
                ", expected a finite number > 0");
}

// What follows the checks
std::tuple<Tensor, Tensor, Tensor> run(Check& check, const HeadTensors& tensors, LmHeadArgs& args) {
  const bool with_logits = tensors.return_logits;
  const Tensor tokens = check.output({args.rows}, ScalarType::Long);
  const Tensor logits = check.output({with_logits ? args.rows : 0, args.vocab_size}, ScalarType::Float);
  const Tensor margins = check.output({args.rows}, ScalarType::Float);
  args.tokens = mutable_data<int64_t>(tokens);
  args.logits = with_logits ? mutable_data<float>(logits) : nullptr;
  args.margins = mutable_data<float>(margins);
  launch(check, args, check_values, cpu::launch_lm_head,
         [&](auto& gpu) { cuda::launch_lm_head(args, gpu.workspace(cuda::lm_head_workspace(args)), gpu.stream()); });
  return {tokens, logits, margins};
}

constexpr char kLmHead[] =
    "(Tensor hidden, Tensor norm, Tensor weight, " RIVER_HEAD_OPTIONS ") -> (Tensor, Tensor, Tensor)";

std::tuple<Tensor, Tensor, Tensor> lm_head(Arguments<kLmHead>& read) {
  const HeadTensors tensors = read_head(read);
  Check check("lm_head", "hidden", tensors.hidden);
  LmHeadArgs args{};
  args.packed = false;
  fill_inputs(check, tensors, args);
  args.weight = check.vectors("weight", tensors.weight, tensors.hidden.scalar_type(), {kAny, args.hidden_size});
  args.vocab_size = check.size("vocab_size of weight", tensors.weight.size(0));
  return run(check, tensors, args);
}

RIVER_OP(lm_head, kLmHead, boxed<&lm_head>)

constexpr char kLmHeadW4[] =
    "(Tensor hidden, Tensor norm, Tensor weight, int vocab_size, " RIVER_HEAD_OPTIONS ") -> (Tensor, Tensor, Tensor)";

std::tuple<Tensor, Tensor, Tensor> lm_head_w4(Arguments<kLmHeadW4>& read) {
  const HeadTensors tensors = read_head(read);
  const int64_t vocab_size = read.integer("vocab_size");
  Check check("lm_head_w4", "hidden", tensors.hidden);
  LmHeadArgs args{};
  args.packed = true;
  fill_inputs(check, tensors, args);
  args.vocab_size = check.size("vocab_size", vocab_size);
  args.weight = check.tiles("weight", tensors.weight, strips_of(vocab_size), args.hidden_size);
  return run(check, tensors, args);
}

RIVER_OP(lm_head_w4, kLmHeadW4, boxed<&lm_head_w4>)

}  // namespace
}  // namespace river::ops
