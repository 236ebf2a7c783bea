// lm_head: the final norm, the head and the token.
#include <cmath>

#include "arguments.h"
#include "dispatch.h"

namespace river::ops {
namespace {

constexpr char kLmHead[] =
    "(Tensor hidden, Tensor norm, Tensor weight, float rms_norm_eps, bool return_logits=True, "
    "Tensor? temperature=None, Tensor? seeds=None, Tensor? positions=None) -> (Tensor, Tensor)";

struct HeadTensors {
  Tensor hidden;  // [T, hidden]
  Tensor norm;    // [hidden]
  Tensor weight;  // [vocab, hidden]
  double rms_norm_eps;
  bool return_logits;
  OptionalTensor temperature, seeds, positions;  // [T]
};

HeadTensors read_head(Arguments<kLmHead>& read) {
  return {.hidden = read.tensor("hidden"),
          .norm = read.tensor("norm"),
          .weight = read.tensor("weight"),
          .rms_norm_eps = read.number("rms_norm_eps"),
          .return_logits = read.boolean("return_logits"),
          .temperature = read.optional_tensor("temperature"),
          .seeds = read.optional_tensor("seeds"),
          .positions = read.optional_tensor("positions")};
}

void fill_sampling(Check& check, const HeadTensors& t, LmHeadArgs& args) {
  args.temperature = check.optional<float>("temperature", t.temperature, {args.rows});
  args.seeds = check.optional<int64_t>("seeds", t.seeds, {args.rows});
  args.positions = check.optional<int32_t>("positions", t.positions, {args.rows});
  check.require(!t.temperature == !t.seeds && !t.temperature == !t.positions,
                "temperature, seeds and positions are given in part, expected all three or none");
  for (int row = 0; t.temperature && !check.on_cuda() && row < args.rows; row++)
    check.require(std::isfinite(args.temperature[row]) && args.temperature[row] >= 0, "temperature[", row, "] is ",
                  args.temperature[row], ", expected a finite number >= 0");
}

void fill_inputs(Check& check, const HeadTensors& t, LmHeadArgs& args) {
  const ScalarType type = t.hidden.scalar_type();
  args.dtype = check.model_dtype("hidden", type);
  args.rows = check.rows("hidden", t.hidden, 2);
  args.hidden_size = check.size("hidden_size", t.hidden.size(1));
  check.require(!check.on_cuda() || args.hidden_size % 64 == 0, "hidden_size is ", args.hidden_size,
                ", expected a multiple of 64 on CUDA");
  args.hidden = check.vectors("hidden", t.hidden, type, {args.rows, args.hidden_size});
  args.norm = check.vectors("norm", t.norm, type, {args.hidden_size});
  args.weight = check.vectors("weight", t.weight, type, {kAny, args.hidden_size});
  args.vocab_size = check.size("vocab_size of weight", t.weight.size(0));
  fill_sampling(check, t, args);
  args.rms_norm_eps = check.rms_norm_eps(t.rms_norm_eps);
}

std::tuple<Tensor, Tensor> lm_head(Arguments<kLmHead>& read) {
  const HeadTensors tensors = read_head(read);
  Check check("lm_head", "hidden", tensors.hidden);
  LmHeadArgs args{};
  fill_inputs(check, tensors, args);
  const bool with_logits = tensors.return_logits;
  const Tensor tokens = empty({args.rows}, ScalarType::Long, tensors.hidden);
  const Tensor logits = empty({with_logits ? args.rows : 0, args.vocab_size}, ScalarType::Float, tensors.hidden);
  args.tokens = mutable_data<int64_t>(tokens);
  args.logits = with_logits ? mutable_data<float>(logits) : nullptr;
  launch(
      check, [&] { cpu::launch_lm_head(args, kParallel); },
      [&](auto& gpu) { cuda::launch_lm_head(args, gpu.workspace(cuda::lm_head_workspace(args)), gpu.stream()); });
  return {tokens, logits};
}

RIVER_OP(lm_head, kLmHead, boxed<&lm_head>)

}  // namespace
}  // namespace river::ops
