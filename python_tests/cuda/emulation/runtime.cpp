// The scheduler: blocks are started in the schedule's order, their threads run until they wait, waiting ones are woken
// by the last arrival. When nothing can run, copies in flight land; when none is left either, that is a deadlock.
#include "runtime.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <new>
#include <utility>

namespace river::emulation {

Thread* current = nullptr;

namespace {

constexpr unsigned char kPoison = 0xff;  // NaN in every float type, -1 in integers
constexpr size_t kMaxEarlyBlocks = 16;   // of a dependent kernel; the hardware too has room for some only
constexpr size_t kMaxQueued = 3;         // kernels in flight: each may have triggered its successor before its own wait
constexpr int kMaxSpins = 10000;         // rounds in which all that runs polls memory
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kCanary = 0;  // the sanitizer is exact
#else
constexpr size_t kCanary = 64;
#endif

std::deque<std::unique_ptr<Grid>> queued;  // not begun, or run up to the dependency wait
std::string failure;                       // of the thread that just ran
uint64_t launches = 0;

uint64_t draw(Grid& grid, uint64_t below) {  // splitmix64
  uint64_t z = grid.random += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return (z ^ (z >> 31)) % below;
}

template <class T>
void arrange(Grid& grid, std::vector<T>& items) {
  if (schedule().order == Choice::kLast) std::reverse(items.begin(), items.end());
  if (schedule().order == Choice::kRandom)
    for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[draw(grid, i)]);
}

std::string text(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

[[noreturn]] void fail_launch(const Launch& launch, const std::string& what) {
  throw Failure("emulation: kernel " + std::string(launch.name) + ": " + what);
}

void wake(Thread* thread) {
  thread->waits_at = nullptr;
  thread->block->grid->runnable.push_back(thread);
}

void wait_at(const char* name, int line) {
  current->waits_at = name;
  current->line = line;
  current->block->grid->idle_spins = 0;
  Fiber::suspend();
}

// A wild or misaligned access ends the process: says where, then leaves it to whoever handled the signal before.
struct sigaction handled_before[NSIG];

void report_signal(int signal) {
  if (current) {
    const std::string where = "emulation: kernel " + std::string(current->block->grid->launch.name) + ", block " +
                              text(current->block->index) + ", thread " + text(current->index) +
                              ": wild or misaligned access (or a stack overflow); the sanitized build says more\n";
    [[maybe_unused]] const auto written = write(STDERR_FILENO, where.data(), where.size());
  }
  sigaction(signal, &handled_before[signal], nullptr);
}

void watch_signals() {
  static bool done = kCanary == 0;  // AddressSanitizer reports by itself
  if (std::exchange(done, true)) return;
  static char stack[64 << 10];  // the fiber's own may be what overflowed
  const stack_t alternate{stack, 0, sizeof(stack)};
  sigaltstack(&alternate, nullptr);
  struct sigaction action{};
  action.sa_handler = report_signal;
  action.sa_flags = SA_ONSTACK;
  for (int signal : {SIGSEGV, SIGBUS}) sigaction(signal, &action, &handled_before[signal]);
}

void thread_main(void*) {
  try {
    current->block->grid->launch.body();
  } catch (const std::exception& error) {
    failure = error.what();
  }
}

// ---- mbarriers: the 64 bits in shared memory are the whole state ------------------------------

struct Mbarrier {
  uint64_t count : 12, pending : 12, phase : 1, magic : 7;
  int64_t bytes : 32;
};
static_assert(sizeof(Mbarrier) == 8);
constexpr unsigned kMagic = 0x2a;

// Of the barrier at p: f changes it; whoever waited for the phase that this completes goes on.
template <class F>
void change(Block& block, uint64_t* p, F f) {
  Mbarrier state;
  memcpy(&state, p, sizeof(state));
  f(state);
  if (state.pending == 0 && state.bytes == 0) {
    state.phase ^= 1;
    state.pending = state.count;
    for (auto& thread : block.threads)
      if (thread->mbarrier == p && thread->parity != state.phase) {
        thread->mbarrier = nullptr;
        wake(thread.get());
      }
  }
  memcpy(p, &state, sizeof(state));
}

Mbarrier read_mbarrier(const uint64_t* p) {
  Mbarrier state;
  memcpy(&state, p, sizeof(state));
  if (state.magic != kMagic) fail("an mbarrier is used before mbarrier_init");
  return state;
}

void land(Block& block, size_t i) {
  const Block::Copy copy = std::move(block.copies[i]);
  block.copies.erase(block.copies.begin() + i);
  for (const Piece& piece : copy.pieces) memcpy(piece.to, piece.from, piece.bytes);
  change(block, copy.mbarrier, [&](Mbarrier& state) {
    if (copy.transaction_bytes) state.bytes -= copy.transaction_bytes;
    else state.pending--;
  });
}

// Lets one copy land that somebody waits for.
bool land_one(Grid& grid) {
  for (auto& block : grid.resident)
    for (size_t i = 0; i < block->copies.size(); i++)
      for (auto& thread : block->threads)
        if (thread->mbarrier == block->copies[i].mbarrier) {
          land(*block, i);
          return true;
        }
  return false;
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
  const std::string name = "block " + text(block->index) + " ";
  for (const auto& shared : block->shared)
    for (size_t i = 0; i < kCanary; i++)
      if (shared.memory.get()[shared.bytes + i] != kPoison)
        fail_launch(grid.launch, name + "wrote past the end of " + (shared.site ? "a shared variable of " : "its ") +
                                     std::to_string(shared.bytes) + " bytes" +
                                     (shared.site ? "" : " of dynamic shared memory"));
  size_t shared_bytes = 0;
  for (const auto& shared : block->shared) shared_bytes += shared.bytes;
  if (shared_bytes > static_cast<size_t>(device().shared_memory_per_block()))
    fail_launch(grid.launch, name + "uses " + std::to_string(shared_bytes) + " bytes of shared memory");
  if (!block->copies.empty()) fail_launch(grid.launch, name + "returned with copies in flight");
  if (grid.launch.pdl && !block->met_dependency)
    fail_launch(grid.launch, name + "returned without a dependency wait, but was launched with pdl");
  auto& resident = grid.resident;
  resident.erase(std::find_if(resident.begin(), resident.end(), [&](auto& b) { return b.get() == block; }));
}

std::string describe(const Block& block) {
  std::map<std::string, std::vector<int>> groups;
  for (const auto& t : block.threads) {
    std::string what = "runs";
    if (t->fiber.finished()) what = "returned";
    else if (t->waits_at) what = "at " + std::string(t->waits_at);
    if (t->waits_at && t->line) what += " (line " + std::to_string(t->line) + ")";
    groups[what].push_back(t->linear);
  }
  std::string out = "block " + text(block.index) + ":";
  for (const auto& [what, threads] : groups) {
    out += " threads";
    for (size_t i = 0; i < threads.size();) {
      size_t end = i + 1;
      while (end < threads.size() && threads[end] == threads[end - 1] + 1) end++;
      out += (i ? "," : "") + std::string(" ") + std::to_string(threads[i]);
      if (end - i > 1) out += "-" + std::to_string(threads[end - 1]);
      i = end;
    }
    out += " " + what + ";";
  }
  return out;
}

[[noreturn]] void report_deadlock(Grid& grid) {
  std::string what = "deadlock. ";
  for (size_t i = 0; i < grid.resident.size() && i < 2; i++) what += describe(*grid.resident[i]) + " ";
  fail_launch(grid.launch, what + std::to_string(grid.resident.size()) + " blocks in all are stuck");
}

// Runs the grid with at most `max_resident` blocks at a time until nothing can go on.
void advance(Grid& grid, size_t max_resident) {
  while (true) {
    while (grid.resident.size() < max_resident && grid.next < grid.order.size()) start_block(grid);
    if (grid.head == grid.runnable.size()) {
      grid.runnable.clear();
      grid.head = 0;
      if (land_one(grid)) continue;
      return;
    }
    const int64_t ready = grid.runnable.size() - grid.head;
    if (grid.idle_spins > ready && !land_one(grid) && grid.idle_spins > kMaxSpins * ready) report_deadlock(grid);
    if (schedule().order == Choice::kRandom)
      std::swap(grid.runnable[grid.head], grid.runnable[grid.head + draw(grid, ready)]);
    Thread* thread = grid.runnable[grid.head++];
    if (grid.head > 4096) {
      grid.runnable.erase(grid.runnable.begin(), grid.runnable.begin() + grid.head);
      grid.head = 0;
    }
    current = thread;
    thread->fiber.resume();
    current = nullptr;
    if (!thread->fiber.finished()) continue;
    grid.idle_spins = 0;
    Block* block = thread->block;
    if (!failure.empty())
      fail_launch(grid.launch, "block " + text(block->index) + ", thread " + text(thread->index) + ": " + failure);
    if (!thread->async_copies.empty()) fail_launch(grid.launch, "a thread returned with copies that nobody awaits");
    if (++block->returned == static_cast<int>(block->threads.size())) finish_block(grid, block);
  }
}

size_t blocks_at_a_time(Grid& grid) {
  if (grid.launch.cooperative) return grid.order.size();
  return schedule().order == Choice::kRandom ? 1 + draw(grid, 3) : 1;
}

void complete(Grid& grid) {
  grid.dependency_met = true;
  for (Thread* thread : std::exchange(grid.at_dependency, {})) wake(thread);
  advance(grid, blocks_at_a_time(grid));
  if (!grid.resident.empty()) report_deadlock(grid);
}

void check_launch(const Launch& l) {
  const auto threads = static_cast<uint64_t>(l.block.x) * l.block.y * l.block.z;
  const auto blocks = static_cast<uint64_t>(l.grid.x) * l.grid.y * l.grid.z;
  if (threads < 1 || threads > 1024) fail_launch(l, "block of " + std::to_string(threads) + " threads");
  if (blocks < 1 || l.grid.y > 65535 || l.grid.z > 65535)
    fail_launch(l, "grid of " + text({l.grid.x, l.grid.y, l.grid.z}));
  if (l.shared_bytes > static_cast<size_t>(device().shared_memory_per_block()))
    fail_launch(l, std::to_string(l.shared_bytes) + " bytes of dynamic shared memory");
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

Thread::Thread(Block* block, int linear)
    : block(block), linear(linear), lane(linear % 32), fiber(thread_main, nullptr) {
  const dim3 size = block->grid->launch.block;
  index = {linear % size.x, linear / size.x % size.y, linear / (size.x * size.y)};
}

void reset() {
  queued.clear();
  failure.clear();
  current = nullptr;
}

// Completes all but the last `count` launches; after a failure nothing is left.
void drain(size_t count) {
  try {
    for (; queued.size() > count; queued.pop_front()) complete(*queued.front());
  } catch (...) {
    reset();
    throw;
  }
}

void synchronize() { drain(0); }

bool sanitized() { return kCanary == 0; }

void enqueue(Launch launch) {
  if (current) throw Failure("emulation: a launch from device code");
  watch_signals();
  check_launch(launch);
  auto grid = std::make_unique<Grid>();
  grid->launch = std::move(launch);
  grid->random = schedule().seed * 1000003 + launches++;
  const dim3 size = grid->launch.grid;
  for (unsigned z = 0; z < size.z; z++)
    for (unsigned y = 0; y < size.y; y++)
      for (unsigned x = 0; x < size.x; x++) grid->order.push_back({x, y, z});
  arrange(*grid, grid->order);
  if (grid->launch.pdl && schedule().early_dependents && device().arch >= 90) {
    try {
      advance(*grid, grid->launch.cooperative ? grid->order.size() : kMaxEarlyBlocks);
    } catch (...) {
      reset();
      throw;
    }
  } else {
    grid->dependency_met = true;
  }
  queued.push_back(std::move(grid));
  drain(kMaxQueued);
}

// ---- device code --------------------------------------------------------------------------------

void fail(const std::string& what) { throw Failure(what); }

void spin() {
  Grid& grid = *current->block->grid;
  grid.idle_spins++;
  grid.runnable.push_back(current);
  Thread* self = current;
  self->waits_at = "a spin loop";
  self->line = 0;
  Fiber::suspend();
  self->waits_at = nullptr;
}

int sync_block(int id, int threads, const char* name, int line, bool value) {
  Block& block = *current->block;
  Block::Barrier& b = block.barriers[id];
  if (id == 0) threads = block.threads.size();
  if (b.arrived == 0) b.expected = threads, b.line = line;
  if (b.expected != threads) fail("named barrier " + std::to_string(id) + " is used with different thread counts");
  if (id == 0 && b.line != line)
    fail("divergent " + std::string(name) + ": at line " + std::to_string(line) + ", other threads at line " +
         std::to_string(b.line));
  b.any |= value;
  if (++b.arrived < b.expected) {
    b.waiting.push_back(current);
    wait_at(name, line);
  } else {
    b.result = std::exchange(b.any, 0);
    b.arrived = 0;
    for (Thread* thread : std::exchange(b.waiting, {})) wake(thread);
  }
  return b.result;
}

Collective& join(uint32_t mask, const char* name, int line, const void* mine, size_t bytes,
                 void (*combine)(Collective&)) {
  Block& block = *current->block;
  const int warp = current->linear / 32, lanes = std::min<int>(32, block.threads.size() - 32 * warp);
  mask &= 0xffffffffu >> (32 - lanes);
  if (!(mask >> current->lane & 1))
    fail(std::string(name) + " (line " + std::to_string(line) + "): the mask leaves out the calling lane");
  auto& pool = block.warps[warp];
  Collective* c = nullptr;
  for (auto& candidate : pool)
    if (candidate->mask == mask && candidate->arrived != mask) c = candidate.get();
  if (!c) {
    for (auto& candidate : pool)
      if (candidate->mask == 0) c = candidate.get();
    if (!c) {
      pool.push_back(std::make_unique<Collective>());
      c = pool.back().get();
    }
    c->mask = mask, c->arrived = c->left = 0, c->name = name, c->line = line;
  }
  if (c->line != line || strcmp(c->name, name) != 0)
    fail("divergent warp: lane " + std::to_string(current->lane) + " at " + name + " (line " + std::to_string(line) +
         "), others at " + c->name + " (line " + std::to_string(c->line) + ")");
  if (bytes) memcpy(c->slots[current->lane], mine, bytes);
  c->arrived |= 1u << current->lane;
  if (c->arrived != mask) {
    c->waiting.push_back(current);
    wait_at(name, line);
  } else {
    if (combine) combine(*c);
    for (Thread* thread : std::exchange(c->waiting, {})) wake(thread);
  }
  return *c;
}

void leave(Collective& c) {
  c.left |= 1u << current->lane;
  if (c.left == c.mask) c.mask = 0;  // free
}

void wait_for_dependency() {
  current->block->met_dependency = true;
  Grid& grid = *current->block->grid;
  if (grid.dependency_met) return;
  grid.at_dependency.push_back(current);
  wait_at("the dependency wait", 0);
}

unsigned char* shared_memory(const void* site, size_t bytes) {
  Block& block = *current->block;
  for (auto& shared : block.shared)
    if (shared.site == site) return shared.memory.get();
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes + kCanary + (bytes + kCanary == 0)) != 0) throw std::bad_alloc();
  memset(memory, kPoison, bytes + kCanary);
  block.shared.push_back({site, bytes, {static_cast<unsigned char*>(memory), free}});
  return static_cast<unsigned char*>(memory);
}

unsigned char* dynamic_shared_memory() { return shared_memory(nullptr, current->block->grid->launch.shared_bytes); }

void mbarrier_init(uint64_t* barrier, int count) {
  const Mbarrier state{static_cast<uint64_t>(count), static_cast<uint64_t>(count), 0, kMagic, 0};
  memcpy(barrier, &state, sizeof(state));
}

void mbarrier_arrive(uint64_t* barrier, uint32_t expect_bytes) {
  if (read_mbarrier(barrier).pending == 0) fail("more arrivals at an mbarrier than it was initialised for");
  if (expect_bytes >= 1u << 20) fail("an mbarrier expects 2^20 bytes or more");
  change(*current->block, barrier, [&](Mbarrier& state) {
    state.bytes += expect_bytes;
    state.pending--;
  });
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  if (read_mbarrier(barrier).phase != (parity & 1)) return;
  current->mbarrier = barrier;
  current->parity = parity & 1;
  wait_at("an mbarrier", 0);
}

void start_copy(std::vector<Piece> pieces, uint64_t* barrier, uint32_t transaction_bytes) {
  read_mbarrier(barrier);
  Block& block = *current->block;
  for (const Piece& piece : pieces)
    if (reinterpret_cast<uintptr_t>(piece.to) % 16 || reinterpret_cast<uintptr_t>(piece.from) % 16 || piece.bytes % 16)
      fail("a copy to shared memory is not in multiples of 16 bytes");
  block.copies.push_back({std::move(pieces), barrier, transaction_bytes});
  const Choice when = schedule().copies;
  if (when == Choice::kFirst || (when == Choice::kRandom && draw(*block.grid, 2))) land(block, block.copies.size() - 1);
}

void check_prefetch(const void* p, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % 16 || bytes == 0 || bytes % 16)
    fail("a prefetch is not of multiples of 16 bytes");
  const auto* data = static_cast<const volatile unsigned char*>(p);
  for (uint32_t i = 0; i < bytes; i += 16) (void)data[i];
  (void)data[bytes - 1];
}

}  // namespace river::emulation
