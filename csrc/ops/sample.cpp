// sample: tokens from logits.
#include "../sampling.h"
#include "arguments.h"
#include "dispatch.h"

namespace river::ops {
namespace {

constexpr char kSample[] =
    "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor positions) "
    "-> (Tensor, Tensor)";

struct SampleTensors {
  Tensor logits;                                              // [T, vocab]
  Tensor temperature, top_k, top_p, min_p, seeds, positions;  // [T]
};

SampleTensors read_sample(Arguments<kSample>& read) {
  return {.logits = read.tensor("logits"),
          .temperature = read.tensor("temperature"),
          .top_k = read.tensor("top_k"),
          .top_p = read.tensor("top_p"),
          .min_p = read.tensor("min_p"),
          .seeds = read.tensor("seeds"),
          .positions = read.tensor("positions")};
}

// On a CPU
void check_values(const Requirements& check, const SampleArgs& a) {
  for (int row = 0; row < a.rows; row++) {
    check.require(std::isfinite(a.temperature[row]) && a.temperature[row] >= 0, "temperature[", row, "] is ",
                  a.temperature[row], ", expected a finite number >= 0");
    check.require(a.top_k[row] >= 0, "top_k[", row, "] is ", a.top_k[row], ", expected at least 0");
    check.require(a.top_p[row] > 0 && a.top_p[row] <= 1, "top_p[", row, "] is ", a.top_p[row],
                  ", expected above 0, at most 1");
    check.require(a.min_p[row] >= 0 && a.min_p[row] <= 1, "min_p[", row, "] is ", a.min_p[row], ", expected 0 to 1");
  }
}

void fill_inputs(Check& check, const SampleTensors& t, SampleArgs& args) {
  const int rows = args.rows = check.rows("logits", t.logits, 2);
  args.logits = check.tensor<float>("logits", t.logits, {rows, kAny});
  args.vocab_size = check.size("vocab_size of logits", t.logits.size(1));
  check.require(args.vocab_size <= kMaxSampledVocab, "vocab_size of logits is ", args.vocab_size, ", expected at most ",
                kMaxSampledVocab);
  args.temperature = check.tensor<float>("temperature", t.temperature, {rows});
  args.top_k = check.tensor<int32_t>("top_k", t.top_k, {rows});
  args.top_p = check.tensor<float>("top_p", t.top_p, {rows});
  args.min_p = check.tensor<float>("min_p", t.min_p, {rows});
  args.seeds = check.tensor<int64_t>("seeds", t.seeds, {rows});
  args.positions = check.tensor<int32_t>("positions", t.positions, {rows});
}

std::tuple<Tensor, Tensor> sample(Arguments<kSample>& read) {
  const SampleTensors tensors = read_sample(read);
  Check check("sample", "logits", tensors.logits);
  SampleArgs args{};
  fill_inputs(check, tensors, args);
  const Tensor tokens = check.output({args.rows}, ScalarType::Long);
  const Tensor logprobs = check.output({args.rows}, ScalarType::Float);
  args.tokens = mutable_data<int64_t>(tokens);
  args.logprobs = mutable_data<float>(logprobs);
  launch(check, args, check_values, cpu::launch_sample,
         [&](auto& gpu) { cuda::launch_sample(args, gpu.workspace({}), gpu.stream()); });
  return {tokens, logprobs};
}

RIVER_OP(sample, kSample, boxed<&sample>)

}  // namespace
}  // namespace river::ops
