// What advance and accept, which end a step and a cycle, check alike: what ends a row or a request, and the records
// that the host polls.
#pragma once

#include "arguments.h"  // before any header of torch
#include "dispatch.h"

namespace river::ops {

struct StepEndTensors {
  Tensor stop_tokens;  // [rows, any number]
  Tensor remaining;    // [rows]
  Tensor step;         // [1]
  Tensor records;      // [any number, the size of a record]
};

template <const char* schema>
StepEndTensors read_step_end(Arguments<schema>& read) {
  return {.stop_tokens = read.tensor("stop_tokens"),
          .remaining = read.tensor("remaining"),
          .step = read.tensor("step"),
          .records = read.tensor("records")};
}

// Checks and fills what AdvanceArgs and AcceptArgs say of it.
template <class Args>
void fill_step_end(Check& check, const StepEndTensors& t, int rows, int64_t record_size, Args& args) {
  args.stop_tokens = check.tensor<int64_t>("stop_tokens", t.stop_tokens, {rows, kAny});
  const int64_t stops = t.stop_tokens.size(1);
  args.num_stop_tokens = stops ? check.size("columns of stop_tokens", stops) : 0;
  check.tensor<int32_t>("remaining", t.remaining, {rows});
  check.tensor<int32_t>("step", t.step, {1});
  // The host reads the records while the GPU works: there they are memory of the host.
  check.defined("records", t.records);
  check.require(t.records.is_cpu(), "records is on ", device_of(t.records), ", expected cpu");
  check.content("records", t.records, ScalarType::Int, {kAny, check.size("the size of a record", record_size)});
  args.num_records = check.size("entries of records", t.records.size(0));
  args.remaining = mutable_data<int32_t>(t.remaining);
  args.step = mutable_data<int32_t>(t.step);
  args.records = mutable_data<int32_t>(t.records);
}

// On a CPU; of AdvanceArgs or AcceptArgs
template <class Args>
void check_step(const Requirements& check, const Args& args) {
  check.in_range("step", 0, *args.step, 0, INT32_MAX - 1);
}

// Where the op runs on a GPU
inline void require_pinned(const Check& check, const int32_t* records) {
  check.require(cuda::is_pinned(records), "records is not in pinned memory, expected a pinned CPU tensor where the ",
                "others are on CUDA");
}

}  // namespace river::ops
