// Blocks are started in the schedule's order; their threads run until they wait, and the last arrival wakes those that
// wait. When no thread can run, copies in flight land; when none is left either, that is a deadlock.
#include "scheduler.h"

#include <map>

namespace river::emulation {

Thread* current = nullptr;

// ---- threads ----------------------------------------------------------------------------------

namespace {

void thread_main(void*) {
  try {
    current->block->grid->launch.body();
  } catch (const std::exception& error) {
    current->failure = error.what();
  }
}

}  // namespace

Thread::Thread(Block* block, int linear)
    : block(block), linear(linear), lane(linear % 32), fiber(thread_main, nullptr) {
  const dim3 size = block->grid->launch.block;
  index = {linear % size.x, linear / size.x % size.y, linear / (size.x * size.y)};
}

void wake(Thread* thread) {
  thread->waits_at = nullptr;
  thread->block->grid->runnable.push_back(thread);
}

void wait_at(const char* name, int line) {
  current->waits_at = name;
  current->line = line;
  Fiber::suspend();
}

void wait_for_dependency() {
  current->block->met_dependency = true;
  Grid& grid = *current->block->grid;
  if (grid.dependency_met) return;
  grid.at_dependency.push_back(current);
  wait_at("the dependency wait", 0);
}

// ---- what goes wrong --------------------------------------------------------------------------

void fail(const std::string& what) { throw Failure(what); }

void fail_launch(const Launch& launch, const std::string& what) {
  throw Failure("emulation: kernel " + std::string(launch.name) + ": " + what);
}

std::string text(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

namespace {

std::string state_of(const Thread& thread) {
  if (thread.fiber.finished()) return "returned";
  if (!thread.waits_at) return "runs";
  const std::string line = thread.line ? " (line " + std::to_string(thread.line) + ")" : "";
  return "at " + std::string(thread.waits_at) + line;
}

std::string ranges(const std::vector<int>& numbers) {  // " 0-15, 32"
  std::string out;
  for (size_t i = 0; i < numbers.size();) {
    size_t end = i + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) end++;
    out += (i ? "," : "") + std::string(" ") + std::to_string(numbers[i]);
    if (end - i > 1) out += "-" + std::to_string(numbers[end - 1]);
    i = end;
  }
  return out;
}

std::string describe(const Block& block) {
  std::map<std::string, std::vector<int>> by_state;
  for (const auto& thread : block.threads) by_state[state_of(*thread)].push_back(thread->linear);
  std::string out = "block " + text(block.index) + ":";
  for (const auto& [state, threads] : by_state) out += " threads" + ranges(threads) + " " + state + ";";
  return out;
}

[[noreturn]] void report_deadlock(const Grid& grid) {
  std::string what = "deadlock. ";
  for (size_t i = 0; i < grid.resident.size() && i < 2; i++) what += describe(*grid.resident[i]) + " ";
  fail_launch(grid.launch, what + std::to_string(grid.resident.size()) + " blocks in all are stuck");
}

// ---- blocks -----------------------------------------------------------------------------------

void start_block(Grid& grid) {
  auto block = std::make_unique<Block>();
  block->grid = &grid;
  block->index = grid.order[grid.next++];
  const dim3 size = grid.launch.block;
  const int count = size.x * size.y * size.z;
  block->warps.resize((count + 31) / 32);
  std::vector<Thread*> threads;
  for (int i = 0; i < count; i++) {
    block->threads.push_back(std::make_unique<Thread>(block.get(), i));
    threads.push_back(block->threads.back().get());
  }
  arrange(grid, threads);
  grid.runnable.insert(grid.runnable.end(), threads.begin(), threads.end());
  grid.resident.push_back(std::move(block));
}

void finish_block(Grid& grid, Block* block) {
  check_shared_memory(*block);
  const std::string name = "block " + text(block->index) + " ";
  if (!block->copies.empty()) fail_launch(grid.launch, name + "returned with copies in flight");
  if (grid.launch.pdl && !block->met_dependency)
    fail_launch(grid.launch, name + "returned without a dependency wait, but was launched with pdl");
  auto& resident = grid.resident;
  resident.erase(std::find_if(resident.begin(), resident.end(), [&](auto& b) { return b.get() == block; }));
}

void finish_thread(Grid& grid, Thread& thread) {
  Block* block = thread.block;
  if (!thread.failure.empty()) {
    const std::string place = "block " + text(block->index) + ", thread " + text(thread.index);
    fail_launch(grid.launch, place + ": " + thread.failure);
  }
  if (!thread.async_copies.empty()) fail_launch(grid.launch, "a thread returned with copies that nobody awaits");
  if (++block->returned == static_cast<int>(block->threads.size())) finish_block(grid, block);
}

// ---- the grid ---------------------------------------------------------------------------------

Thread* next_runnable(Grid& grid) {
  constexpr size_t kForgotten = 4096;  // entries ahead of the head, before their memory is taken back
  auto& runnable = grid.runnable;
  if (schedule().order == Choice::kLast) {  // who was woken last: a warp runs as far ahead of the others as it can
    Thread* thread = runnable.back();
    runnable.pop_back();
    return thread;
  }
  if (schedule().order == Choice::kRandom)
    std::swap(runnable[grid.head], runnable[grid.head + draw(grid, runnable.size() - grid.head)]);
  Thread* thread = runnable[grid.head++];
  if (grid.head > kForgotten) {
    runnable.erase(runnable.begin(), runnable.begin() + grid.head);
    grid.head = 0;
  }
  return thread;
}

}  // namespace

void advance(Grid& grid, size_t max_resident) {
  while (true) {
    while (grid.resident.size() < max_resident && grid.next < grid.order.size()) start_block(grid);
    if (grid.head == grid.runnable.size()) {
      grid.runnable.clear();
      grid.head = 0;
      if (land_one(grid)) continue;
      return;
    }
    current = next_runnable(grid);
    current->fiber.resume();
    Thread& thread = *std::exchange(current, nullptr);
    if (thread.fiber.finished()) finish_thread(grid, thread);
  }
}

void complete(Grid& grid) {
  grid.dependency_met = true;
  for (Thread* thread : std::exchange(grid.at_dependency, {})) wake(thread);
  advance(grid, schedule().order == Choice::kRandom ? 1 + draw(grid, 3) : 1);
  if (!grid.resident.empty()) report_deadlock(grid);
}

uint64_t draw(Grid& grid, uint64_t below) {  // splitmix64
  uint64_t z = grid.random += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return (z ^ (z >> 31)) % below;
}

}  // namespace river::emulation
