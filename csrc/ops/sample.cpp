// The op that draws tokens from logits.
#include <tuple>

#include "../sampling.h"
#include "dispatch.h"

namespace river::ops {
namespace {

// What the CPU can refuse before it draws
void check_rules(const Check& check, const SampleArgs& a) {
  for (int t = 0; t < a.rows; t++) {
    check.require(std::isfinite(a.temperature[t]) && a.temperature[t] >= 0, "temperature[", t, "] is ",
                  a.temperature[t], ", expected a finite number >= 0");
    check.require(a.top_k[t] >= 0, "top_k[", t, "] is ", a.top_k[t], ", expected at least 0");
    check.require(a.top_p[t] > 0 && a.top_p[t] <= 1, "top_p[", t, "] is ", a.top_p[t], ", expected above 0, at most 1");
    check.require(a.min_p[t] >= 0 && a.min_p[t] <= 1, "min_p[", t, "] is ", a.min_p[t], ", expected 0 to 1");
  }
}

std::tuple<Tensor, Tensor> sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                                  const Tensor& top_p, const Tensor& min_p, const Tensor& seeds,
                                  const Tensor& positions) {
  Check check("sample", "logits", logits);
  SampleArgs args{};
  args.rows = check.rows("logits", logits, 2);
  check.tensor("logits", logits, ScalarType::Float, {args.rows, kAny});
  args.vocab_size = check.size("vocab_size of logits", logits.size(1));
  check.require(args.vocab_size <= kMaxSampledVocab, "vocab_size of logits is ", args.vocab_size, ", expected at most ",
                kMaxSampledVocab);
  args.logits = data<float>(logits);
  check.tensor("temperature", temperature, ScalarType::Float, {args.rows});
  args.temperature = data<float>(temperature);
  check.tensor("top_k", top_k, ScalarType::Int, {args.rows});
  args.top_k = data<int32_t>(top_k);
  check.tensor("top_p", top_p, ScalarType::Float, {args.rows});
  args.top_p = data<float>(top_p);
  check.tensor("min_p", min_p, ScalarType::Float, {args.rows});
  args.min_p = data<float>(min_p);
  check.tensor("seeds", seeds, ScalarType::Long, {args.rows});
  args.seeds = data<int64_t>(seeds);
  check.tensor("positions", positions, ScalarType::Int, {args.rows});
  args.positions = data<int32_t>(positions);
  if (!check.on_cuda()) check_rules(check, args);
  const Tensor tokens = empty({args.rows}, ScalarType::Long, logits);
  const Tensor logprobs = empty({args.rows}, ScalarType::Float, logits);
  args.tokens = mutable_data<int64_t>(tokens);
  args.logprobs = mutable_data<float>(logprobs);
  launch(
      check, [&] { cpu::launch_sample(args, kParallel); },
      [&](auto& gpu) { cuda::launch_sample(args, gpu.workspace({}), gpu.stream()); });
  return {tokens, logprobs};
}

void implement(torch::stable::detail::StableLibrary& m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace

RIVER_IMPLEMENT(implement)

STABLE_TORCH_LIBRARY_FRAGMENT(river, m) {
  m.def(
      "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, "
      "Tensor positions) -> (Tensor, Tensor)");
}

}  // namespace river::ops
