// advance, the end of a step.
#include "../step_rules.h"
#include "arguments.h"
#include "dispatch.h"

namespace river::ops {
namespace {

constexpr char kAdvance[] =
    "(Tensor before, Tensor after, Tensor tokens, Tensor embed_tokens, Tensor stop_tokens, Tensor(a!) hidden, "
    "Tensor(b!) slots, Tensor(c!) positions, Tensor(d!) draw_positions, Tensor(e!) remaining, Tensor(f!) exited, "
    "Tensor(g!) similarities, Tensor(h!) step, Tensor(i!) records) -> ()";

struct StepTensors {
  Tensor before, after;                                // [T, hidden]
  Tensor tokens;                                       // [T]
  Tensor embed_tokens;                                 // [vocab, hidden]
  Tensor stop_tokens;                                  // [T, any number]
  Tensor hidden;                                       // [T, hidden]
  Tensor slots, positions, draw_positions, remaining;  // [T]
  Tensor exited, similarities;                         // [layers, T]
  Tensor step;                                         // [1]
  Tensor records;                                      // [any number, 1 + 2 * T + layers * T]
};

StepTensors read_step(Arguments<kAdvance>& read) {
  return {.before = read.tensor("before"),
          .after = read.tensor("after"),
          .tokens = read.tensor("tokens"),
          .embed_tokens = read.tensor("embed_tokens"),
          .stop_tokens = read.tensor("stop_tokens"),
          .hidden = read.tensor("hidden"),
          .slots = read.tensor("slots"),
          .positions = read.tensor("positions"),
          .draw_positions = read.tensor("draw_positions"),
          .remaining = read.tensor("remaining"),
          .exited = read.tensor("exited"),
          .similarities = read.tensor("similarities"),
          .step = read.tensor("step"),
          .records = read.tensor("records")};
}

// Checks all and fills what is read, and the sizes.
void fill_inputs(Check& check, const StepTensors& t, AdvanceArgs& args) {
  const ScalarType type = t.before.scalar_type();
  args.dtype = check.model_dtype("before", type);
  const int rows = args.rows = check.rows("before", t.before, 2);
  const int size = args.hidden_size = check.hidden_size(t.before, 16);
  args.before = check.vectors("before", t.before, type, {rows, size});
  args.after = check.vectors("after", t.after, type, {rows, size});
  args.tokens = check.tensor<int64_t>("tokens", t.tokens, {rows});
  args.embed_tokens = check.vectors("embed_tokens", t.embed_tokens, type, {kAny, size});
  args.vocab_size = check.size("vocab_size of embed_tokens", t.embed_tokens.size(0));
  args.stop_tokens = check.tensor<int64_t>("stop_tokens", t.stop_tokens, {rows, kAny});
  check.vectors("hidden", t.hidden, type, {rows, size});
  check.tensor<int32_t>("slots", t.slots, {rows});
  check.tensor<int32_t>("positions", t.positions, {rows});
  check.tensor<int32_t>("draw_positions", t.draw_positions, {rows});
  check.tensor<int32_t>("remaining", t.remaining, {rows});
  args.layers = check.layers(t.exited, t.similarities, rows);
  check.tensor<int32_t>("step", t.step, {1});
  // The host reads the records while the GPU works: there they are memory of the host.
  check.defined("records", t.records);
  check.require(t.records.is_cpu(), "records is on ", device_of(t.records), ", expected cpu");
  const int record = check.size("the size of a record", RecordLayout::size(rows, args.layers));
  check.content("records", t.records, ScalarType::Int, {kAny, record});
  args.num_records = check.size("entries of records", t.records.size(0));
  const int64_t stops = t.stop_tokens.size(1);
  args.num_stop_tokens = stops ? check.size("columns of stop_tokens", stops) : 0;
}

void fill_outputs(const StepTensors& t, AdvanceArgs& args) {
  args.hidden = mutable_data(t.hidden);
  args.slots = mutable_data<int32_t>(t.slots);
  args.positions = mutable_data<int32_t>(t.positions);
  args.draw_positions = mutable_data<int32_t>(t.draw_positions);
  args.remaining = mutable_data<int32_t>(t.remaining);
  args.exited = mutable_data<int32_t>(t.exited);
  args.similarities = mutable_data<float>(t.similarities);
  args.step = mutable_data<int32_t>(t.step);
  args.records = mutable_data<int32_t>(t.records);
}

std::tuple<> advance(Arguments<kAdvance>& read) {
  const StepTensors tensors = read_step(read);
  Check check("advance", "before", tensors.before);
  AdvanceArgs args{};
  fill_inputs(check, tensors, args);
  fill_outputs(tensors, args);
  check.written(
      {"hidden", "slots", "positions", "draw_positions", "remaining", "exited", "similarities", "step", "records"},
      "before");  // in a network of one layer, whose input is `hidden`
  if (!check.on_cuda()) check.in_range("step", 0, *args.step, 0, INT32_MAX - 1);
  launch(
      check, [&] { cpu::launch_advance(args, kParallel); },
      [&](auto& gpu) {
        check.require(cuda::is_pinned(args.records), "records is not in pinned memory, expected a pinned CPU tensor ",
                      "where the others are on CUDA");
        cuda::launch_advance(args, gpu.workspace({}), gpu.stream());
      });
  return {};
}

RIVER_OP(advance, kAdvance, boxed<&advance>)

}  // namespace
}  // namespace river::ops
