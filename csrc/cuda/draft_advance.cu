// draft_advance: the end of a draft step in lossless mode. The token that a request drew becomes a row of the
// verification and what the next draft step starts from. A thread has a request; then all threads copy embeddings.
#include "../step_rules.h"
#include "device/embed.cuh"
#include "device/launch.h"

namespace river::cuda {
namespace {

using namespace device;

constexpr int kThreads = 512;

// Moves request r on. Returns its draft, or kNoToken where none counts.
RIVER_DEVICE int64_t move_on(const DraftAdvanceArgs& a, int r) {
  const int slot = load_written(a.slots + r), wanted = load_written(a.wanted + r);
  const int position = load_written(a.positions + r), draw_position = load_written(a.draw_positions + r);
  const int64_t token = load_written(a.tokens + r);
  const float margin = load_written(a.margins + r), sure = load_written(a.sure + r);
  if (slot < 0) return kNoToken;
  const NextDraft next = next_draft(a.index, wanted, is_drawn(token, a.vocab_size), margin >= sure);
  if (next.ends) a.slots[r] = -1;
  if (!next.counts) return kNoToken;
  const int row = (a.index + 1) * a.requests + r;
  a.drafts[row] = token;
  a.verify_slots[row] = slot;
  a.positions[r] = position + 1;
  a.draw_positions[r] = draw_position + 1;
  return token;
}

// Budget: 512 threads, 64 registers
__global__ void __launch_bounds__(kThreads) draft_advance_kernel(DraftAdvanceArgs a) {  // shapes: river.h
  RIVER_SHARED(int64_t, drafts, [kMaxRows]);
  dependency_trigger();
  dependency_wait();
  const int t = threadIdx.x;
  if (t < kMaxRows) drafts[t] = t < a.requests ? move_on(a, t) : kNoToken;
  __syncthreads();
  embed<kThreads>(a, drafts, (a.index + 1) * a.requests);
}

}  // namespace

void launch_draft_advance(const DraftAdvanceArgs& a, const Workspace& workspace, Stream stream) {
  const LaunchOptions options{.name = "draft_advance", .pdl = workspace.overlap != Overlap::kNone};
  launch(draft_advance_kernel, 1, kThreads, 0, stream, options, a);
}

}  // namespace river::cuda
