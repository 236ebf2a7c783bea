// advance, the end of a step.
#include "../step_rules.h"
#include "arguments.h"
#include "dispatch.h"
#include "step_end.h"

namespace river::ops {
namespace {

constexpr char kAdvance[] =
    "(Tensor before, Tensor after, Tensor tokens, Tensor embed_tokens, Tensor stop_tokens, Tensor(a!) hidden, "
    "Tensor(b!) slots, Tensor(c!) positions, Tensor(d!) draw_positions, Tensor(e!) remaining, Tensor(f!) exited, "
    "Tensor(g!) similarities, Tensor(h!) step, Tensor(i!) records) -> ()";

struct StepTensors {
  Tensor before, after;                     // [T, hidden]
  Tensor tokens;                            // [T]
  Tensor embed_tokens;                      // [vocab, hidden]
  Tensor hidden;                            // [T, hidden]
  Tensor slots, positions, draw_positions;  // [T]
  Tensor exited, similarities;              // [layers, T]
  StepEndTensors end;                       // of T rows
};

StepTensors read_step(Arguments<kAdvance>& read) {
  return {.before = read.tensor("before"),
          .after = read.tensor("after"),
          .tokens = read.tensor("tokens"),
          .embed_tokens = read.tensor("embed_tokens"),
          .hidden = read.tensor("hidden"),
          .slots = read.tensor("slots"),
          .positions = read.tensor("positions"),
          .draw_positions = read.tensor("draw_positions"),
          .exited = read.tensor("exited"),
          .similarities = read.tensor("similarities"),
          .end = read_step_end(read)};
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
  check.vectors("hidden", t.hidden, type, {rows, size});
  check.tensor<int32_t>("slots", t.slots, {rows});
  check.tensor<int32_t>("positions", t.positions, {rows});
  check.tensor<int32_t>("draw_positions", t.draw_positions, {rows});
  args.layers = check.layers(t.exited, t.similarities, rows);
  fill_step_end(check, t.end, rows, RecordLayout::size(rows, args.layers), args);
}

void fill_outputs(const StepTensors& t, AdvanceArgs& args) {
  args.hidden = mutable_data(t.hidden);
  args.slots = mutable_data<int32_t>(t.slots);
  args.positions = mutable_data<int32_t>(t.positions);
  args.draw_positions = mutable_data<int32_t>(t.draw_positions);
  args.exited = mutable_data<int32_t>(t.exited);
  args.similarities = mutable_data<float>(t.similarities);
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
  launch(check, args, check_step<AdvanceArgs>, cpu::launch_advance, [&](auto& gpu) {
    require_pinned(check, args.records);
    cuda::launch_advance(args, gpu.workspace({}), gpu.stream());
  });
  return {};
}

RIVER_OP(advance, kAdvance, boxed<&advance>)

}  // namespace
}  // namespace river::ops
