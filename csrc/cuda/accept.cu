// accept: the end of a verification in lossless mode. It finds the new tokens of each request, writes them into the
// record that the host polls, and sets up what the next cycle starts from. The work is small and each part needs what
// the part before has found, so that one block does all of it: a thread first has a row, then a request.
#include "../step_rules.h"
#include "device/embed.cuh"
#include "device/launch.h"

namespace river::cuda {
namespace {

using namespace device;

constexpr int kThreads = 512;

struct VerifiedRow {
  int64_t draft, target;
  int slot;
  bool drawn, stop_token;  // the target
};

RIVER_DEVICE VerifiedRow load_row(const AcceptArgs& a, int row) {
  const int slot = load_written(a.verify_slots + row);
  const int64_t draft = load_written(a.drafts + row), target = load_written(a.tokens + row);
  return {.draft = draft,
          .target = target,
          .slot = slot,
          .drawn = is_drawn(target, a.vocab_size),
          .stop_token = is_stop_token(a.stop_tokens, a.num_stop_tokens, row % a.requests, target)};
}

// From the state of request r before the verification. rows: [a.rows]
RIVER_DEVICE NewTokens new_tokens(const AcceptArgs& a, int r, NewTokens found, const VerifiedRow* rows) {
  for (int row = r; row < a.rows && found.follows(rows[row].slot >= 0, rows[row].draft); row += a.requests)
    found = found.with(rows[row].target, rows[row].drawn, rows[row].stop_token);
  return found;
}

// All but the stamp, of request r
RIVER_DEVICE void write_record(const AcceptArgs& a, int r, const NewTokens& found, const VerifiedRow* rows,
                               int32_t* record) {
  record[CycleLayout::kCounts + r] = found.count > 0 ? found.count : kInactive;
  int32_t* tokens = record + CycleLayout::tokens(a.requests);
  for (int i = 0; i < a.max_tokens; i++) {
    const int row = i * a.requests + r;
    tokens[row] = i < found.count ? recorded_token(true, rows[row].target, rows[row].drawn) : kInactive;
  }
}

// The state of a request after its new tokens, of which there are some
RIVER_DEVICE void move_on(const AcceptArgs& a, int r, const NewTokens& found, int slot) {
  a.slots[r] = a.verify_slots[r] = found.row.ends ? -1 : slot;
  a.positions[r] = found.row.position;
  a.draw_positions[r] = found.row.draw_position;
  a.remaining[r] = found.row.remaining;
}

// A row of the next verification, where nothing has been drafted yet
RIVER_DEVICE void set_up_row(const AcceptArgs& a, int row, const NewTokens& found) {
  const int i = row / a.requests;
  a.drafts[row] = -1;
  if (i > 0) a.verify_slots[row] = -1;
  if (found.count == 0) return;
  a.verify_positions[row] = found.row.position + i;
  a.verify_draw_positions[row] = found.row.draw_position + i;
}

// Budget: 512 threads, 64 registers
__global__ void __launch_bounds__(kThreads) accept_kernel(AcceptArgs a) {  // shapes: river.h
  RIVER_SHARED(VerifiedRow, rows, [kMaxRows]);
  RIVER_SHARED(NewTokens, of_request, [kMaxRows]);
  RIVER_SHARED(int64_t, last_tokens, [kMaxRows]);
  dependency_trigger();
  dependency_wait();
  const int t = threadIdx.x, r = t % a.requests, num_rows = a.max_tokens * a.requests;
  const uint32_t step = load_written(a.step);
  const NewTokens none = no_new_tokens(load_written(a.verify_positions + r), load_written(a.remaining + r));
  if (t < a.rows) rows[t] = load_row(a, t);
  int32_t* record = a.records + int64_t(step % a.num_records) * CycleLayout::size(a.requests, num_rows);
  if (t < kMaxRows) last_tokens[t] = kNoToken;
  __syncthreads();
  if (t < a.requests) {
    const NewTokens found = of_request[t] = new_tokens(a, t, none, rows);
    if (found.count > 0 && is_drawn(found.last, a.vocab_size)) last_tokens[t] = found.last;
    write_record(a, t, found, rows, record);
    if (found.count > 0) move_on(a, t, found, rows[t].slot);
  }
  __syncthreads();  // the record is there, and all have read the rows
  if (t == 0) {
    a.step[0] = step + 1;
    // One release is enough for what all threads wrote: the barrier has ordered that before it.
    store_release_system(reinterpret_cast<uint32_t*>(record + CycleLayout::kStamp), step + 1);
  }
  if (t < num_rows) set_up_row(a, t, of_request[r]);
  embed<kThreads>(a, last_tokens, 0);
}

}  // namespace

void launch_accept(const AcceptArgs& a, const Workspace& workspace, Stream stream) {
  const LaunchOptions options{.name = "accept", .pdl = workspace.overlap != Overlap::kNone};
  launch(accept_kernel, 1, kThreads, 0, stream, options, a);
}

}  // namespace river::cuda
