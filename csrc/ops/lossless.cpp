// draft_advance and accept: what ends a draft and a verification in lossless mode.
#include "../step_rules.h"
#include "arguments.h"
#include "dispatch.h"
#include "step_end.h"

namespace river::ops {
namespace {

constexpr char kDraftAdvance[] =
    "(Tensor tokens, Tensor margins, int index, Tensor wanted, Tensor sure, Tensor embed_tokens, Tensor(a!) drafts, "
    "Tensor(b!) hidden, Tensor(c!) slots, Tensor(d!) positions, Tensor(e!) draw_positions, "
    "Tensor(f!) verify_hidden, Tensor(g!) verify_slots) -> ()";
constexpr char kAccept[] =
    "(Tensor tokens, Tensor(a!) drafts, Tensor embed_tokens, Tensor stop_tokens, Tensor(b!) remaining, "
    "Tensor(c!) hidden, Tensor(d!) slots, Tensor(e!) positions, Tensor(f!) draw_positions, "
    "Tensor(g!) verify_hidden, Tensor(h!) verify_slots, Tensor(i!) verify_positions, "
    "Tensor(j!) verify_draw_positions, Tensor(k!) step, Tensor(l!) records) -> ()";

// What both ops take; but for the first two they are written
struct LosslessTensors {
  Tensor tokens;                            // [R], or [rows] of a verification
  Tensor embed_tokens;                      // [vocab, hidden]
  Tensor drafts;                            // [V, R]
  Tensor hidden;                            // [R, hidden]
  Tensor slots, positions, draw_positions;  // [R]
  Tensor verify_hidden;                     // [V * R, hidden]
  Tensor verify_slots;                      // [V * R]
};

template <const char* schema>
LosslessTensors read_lossless(Arguments<schema>& read) {
  return {.tokens = read.tensor("tokens"),
          .embed_tokens = read.tensor("embed_tokens"),
          .drafts = read.tensor("drafts"),
          .hidden = read.tensor("hidden"),
          .slots = read.tensor("slots"),
          .positions = read.tensor("positions"),
          .draw_positions = read.tensor("draw_positions"),
          .verify_hidden = read.tensor("verify_hidden"),
          .verify_slots = read.tensor("verify_slots")};
}

// Checks and fills all but the drawn tokens, whose number is the op's business.
void fill(Check& check, const LosslessTensors& t, LosslessArgs& args) {
  check.tensor<int64_t>("drafts", t.drafts, {kAny, kAny});
  const int64_t max_tokens = t.drafts.size(0), requests = t.drafts.size(1);
  check.require(max_tokens >= 1 && requests >= 1 && max_tokens <= kMaxRows && requests <= kMaxRows / max_tokens,
                "drafts has shape ", Shape{t.drafts.sizes()}, ", expected 1 to ", kMaxRows, " entries");
  args.max_tokens = int(max_tokens);
  args.requests = int(requests);
  check.defined("embed_tokens", t.embed_tokens);
  const ScalarType type = t.embed_tokens.scalar_type();
  args.dtype = check.model_dtype("embed_tokens", type);
  args.embed_tokens = check.vectors("embed_tokens", t.embed_tokens, type, {kAny, kAny});
  args.vocab_size = check.size("vocab_size of embed_tokens", t.embed_tokens.size(0));
  const int size = args.hidden_size = check.vector_size("hidden_size of embed_tokens", t.embed_tokens.size(1));
  check.vectors("hidden", t.hidden, type, {requests, size});
  check.tensor<int32_t>("slots", t.slots, {requests});
  check.tensor<int32_t>("positions", t.positions, {requests});
  check.tensor<int32_t>("draw_positions", t.draw_positions, {requests});
  check.vectors("verify_hidden", t.verify_hidden, type, {max_tokens * requests, size});
  check.tensor<int32_t>("verify_slots", t.verify_slots, {max_tokens * requests});
  args.drafts = mutable_data<int64_t>(t.drafts);
  args.hidden = mutable_data(t.hidden);
  args.slots = mutable_data<int32_t>(t.slots);
  args.positions = mutable_data<int32_t>(t.positions);
  args.draw_positions = mutable_data<int32_t>(t.draw_positions);
  args.verify_hidden = mutable_data(t.verify_hidden);
  args.verify_slots = mutable_data<int32_t>(t.verify_slots);
}

// On a CPU
void check_wanted(const Requirements& check, const DraftAdvanceArgs& args) {
  for (int r = 0; r < args.requests; r++) check.in_range("wanted", r, args.wanted[r], 0, args.max_tokens - 1);
}

std::tuple<> draft_advance(Arguments<kDraftAdvance>& read) {
  const LosslessTensors tensors = read_lossless(read);
  const Tensor margins = read.tensor("margins"), wanted = read.tensor("wanted"), sure = read.tensor("sure");
  const int64_t index = read.integer("index");
  Check check("draft_advance", "tokens", tensors.tokens);
  DraftAdvanceArgs args{};
  fill(check, tensors, args);
  args.tokens = check.tensor<int64_t>("tokens", tensors.tokens, {args.requests});
  args.margins = check.tensor<float>("margins", margins, {args.requests});
  args.wanted = check.tensor<int32_t>("wanted", wanted, {args.requests});
  args.sure = check.tensor<float>("sure", sure, {args.requests});
  const int most = args.max_tokens - 1;  // drafts
  check.require(most >= 1, "drafts has 1 row, expected at least 2: row 0, and one of drafts");
  check.require(index >= 0 && index < most, "index is ", index, ", expected 0 to ", most - 1);
  args.index = int(index);
  check.written({"drafts", "hidden", "slots", "positions", "draw_positions", "verify_hidden", "verify_slots"});
  launch(check, args, check_wanted, cpu::launch_draft_advance,
         [&](auto& gpu) { cuda::launch_draft_advance(args, gpu.workspace({}), gpu.stream()); });
  return {};
}

// What accept takes beside that; but for the stop tokens it is written
struct AcceptTensors {
  Tensor verify_positions, verify_draw_positions;  // [V * R]
  StepEndTensors end;                              // of R requests
};

AcceptTensors read_accept(Arguments<kAccept>& read) {
  return {.verify_positions = read.tensor("verify_positions"),
          .verify_draw_positions = read.tensor("verify_draw_positions"),
          .end = read_step_end(read)};
}

// Checks and fills them, where R and V are known.
void fill(Check& check, const AcceptTensors& t, AcceptArgs& args) {
  const int requests = args.requests, rows = args.max_tokens * requests;
  check.tensor<int32_t>("verify_positions", t.verify_positions, {rows});
  check.tensor<int32_t>("verify_draw_positions", t.verify_draw_positions, {rows});
  fill_step_end(check, t.end, requests, CycleLayout::size(requests, rows), args);
  args.verify_positions = mutable_data<int32_t>(t.verify_positions);
  args.verify_draw_positions = mutable_data<int32_t>(t.verify_draw_positions);
}

std::tuple<> accept(Arguments<kAccept>& read) {
  const LosslessTensors tensors = read_lossless(read);
  const AcceptTensors own = read_accept(read);
  Check check("accept", "tokens", tensors.tokens);
  AcceptArgs args{};
  fill(check, tensors, args);
  args.tokens = check.tensor<int64_t>("tokens", tensors.tokens, {kAny});
  const int64_t rows = tensors.tokens.size(0);
  check.require(rows >= 1 && rows % args.requests == 0 && rows <= args.max_tokens * args.requests, "tokens has ", rows,
                " entries, expected 1 to ", args.max_tokens, " of each of ", args.requests, " requests");
  args.rows = int(rows);
  fill(check, own, args);
  check.written({"drafts", "remaining", "hidden", "slots", "positions", "draw_positions", "verify_hidden",
                 "verify_slots", "verify_positions", "verify_draw_positions", "step", "records"});
  launch(check, args, check_step<AcceptArgs>, cpu::launch_accept, [&](auto& gpu) {
    require_pinned(check, args.records);
    cuda::launch_accept(args, gpu.workspace({}), gpu.stream());
  });
  return {};
}

RIVER_OP(draft_advance, kDraftAdvance, boxed<&draft_advance>)
RIVER_OP(accept, kAccept, boxed<&accept>)

}  // namespace
}  // namespace river::ops
