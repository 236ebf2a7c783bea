// Shared memory, and accesses to any memory that no kernel may make. AddressSanitizer watches the ends of all memory;
// without it, shared variables end in bytes that nobody may change, and a fault is reported with its thread.
#include <signal.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "scheduler.h"

namespace river::emulation {

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kCanary = 0;
#else
constexpr size_t kCanary = 64;
#endif

struct sigaction handled_before[NSIG];

// A wild or misaligned access ends the process: says where, then leaves it to whoever handled the signal before.
void report_signal(int signal) {
  if (current) {
    const std::string where = "emulation: kernel " + std::string(current->block->grid->launch.name) + ", block " +
                              text(current->block->index) + ", thread " + text(current->index) +
                              ": wild or misaligned access (or a stack overflow); the sanitized build says more\n";
    [[maybe_unused]] const auto written = write(STDERR_FILENO, where.data(), where.size());
  }
  sigaction(signal, &handled_before[signal], nullptr);
}

}  // namespace

bool sanitized() { return kCanary == 0; }

void watch_signals() {
  static bool done = sanitized();  // AddressSanitizer reports by itself
  if (std::exchange(done, true)) return;
  static char stack[64 << 10];  // the fiber's own may be what overflowed
  const stack_t alternate{stack, 0, sizeof(stack)};
  sigaltstack(&alternate, nullptr);
  struct sigaction action{};
  action.sa_handler = report_signal;
  action.sa_flags = SA_ONSTACK;
  for (int signal : {SIGSEGV, SIGBUS}) sigaction(signal, &action, &handled_before[signal]);
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

void check_shared_memory(const Block& block) {
  const Launch& launch = block.grid->launch;
  const std::string name = "block " + text(block.index) + " ";
  size_t bytes = 0;
  for (const auto& shared : block.shared) {
    bytes += shared.bytes;
    const unsigned char* end = shared.memory.get() + shared.bytes;
    if (std::all_of(end, end + kCanary, [](unsigned char byte) { return byte == kPoison; })) continue;
    const std::string size = std::to_string(shared.bytes) + " bytes";
    const std::string what = shared.site ? "a shared variable of " + size : "its " + size + " of dynamic shared memory";
    fail_launch(launch, name + "wrote past the end of " + what);
  }
  if (bytes > static_cast<size_t>(device().shared_memory_per_block()))
    fail_launch(launch, name + "uses " + std::to_string(bytes) + " bytes of shared memory");
}

void check_prefetch(const void* p, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % 16 || bytes == 0 || bytes % 16)
    fail("a prefetch is not of multiples of 16 bytes");
  const auto* data = static_cast<const volatile unsigned char*>(p);
  for (uint32_t i = 0; i < bytes; i += 16) (void)data[i];
  (void)data[bytes - 1];
}

}  // namespace river::emulation
