// The queue of launches: what is enqueued may begin at once, as far as it need not wait for its predecessors, and ends
// in order.
#include <deque>

#include "scheduler.h"

namespace river::emulation {

namespace {

constexpr size_t kMaxEarlyBlocks = 16;  // of a dependent kernel; the hardware too has room for some only
constexpr size_t kMaxQueued = 3;        // kernels in flight: each may have triggered its successor before its own wait

std::deque<std::unique_ptr<Grid>> queued;  // not begun, or run up to the dependency wait
uint64_t launches = 0;

void check_launch(const Launch& l) {
  const auto threads = static_cast<uint64_t>(l.block.x) * l.block.y * l.block.z;
  const auto blocks = static_cast<uint64_t>(l.grid.x) * l.grid.y * l.grid.z;
  if (threads < 1 || threads > 1024) fail_launch(l, "block of " + std::to_string(threads) + " threads");
  if (blocks < 1 || l.grid.y > 65535 || l.grid.z > 65535)
    fail_launch(l, "grid of " + text({l.grid.x, l.grid.y, l.grid.z}));
  if (l.shared_bytes > static_cast<size_t>(device().shared_memory_per_block()))
    fail_launch(l, std::to_string(l.shared_bytes) + " bytes of dynamic shared memory");
}

std::unique_ptr<Grid> grid_of(Launch launch) {
  auto grid = std::make_unique<Grid>();
  grid->launch = std::move(launch);
  grid->random = schedule().seed * 1000003 + launches++;
  const dim3 size = grid->launch.grid;
  for (unsigned z = 0; z < size.z; z++)
    for (unsigned y = 0; y < size.y; y++)
      for (unsigned x = 0; x < size.x; x++) grid->order.push_back({x, y, z});
  arrange(*grid, grid->order);
  return grid;
}

// After a failure nothing is left.
template <class F>
void or_reset(F f) {
  try {
    f();
  } catch (...) {
    reset();
    throw;
  }
}

// Completes all but the last `count` launches.
void drain(size_t count) {
  or_reset([&] {
    for (; queued.size() > count; queued.pop_front()) complete(*queued.front());
  });
}

}  // namespace

Schedule& schedule() {
  static Schedule instance;
  return instance;
}

Device& device() {
  static Device instance;
  return instance;
}

std::vector<Watched>& watched() {
  static std::vector<Watched> instance;
  return instance;
}

void note_load(const void* p, size_t bytes) {
  for (Watched& w : watched())
    if (reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(w.begin) < w.bytes) w.loaded += bytes;
}

void enqueue(Launch launch) {
  if (current) throw Failure("emulation: a launch from device code");
  watch_signals();
  check_launch(launch);
  auto grid = grid_of(std::move(launch));
  grid->dependency_met = !(grid->launch.pdl && schedule().early_dependents && device().arch >= 90);
  if (!grid->dependency_met) or_reset([&] { advance(*grid, kMaxEarlyBlocks); });
  queued.push_back(std::move(grid));
  drain(kMaxQueued);
}

void synchronize() { drain(0); }

void reset() {
  queued.clear();
  current = nullptr;
}

}  // namespace river::emulation
