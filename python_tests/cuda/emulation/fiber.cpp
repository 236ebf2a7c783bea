// Fibers by a hand-written switch on x86-64, by ucontext (ten times slower) elsewhere.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
#define RIVER_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace river::emulation {

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;  // instrumented frames are large
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

Fiber* running = nullptr;
void* host_context = nullptr;

// Stacks are reused: most launches need as many as the one before.
std::vector<char*> free_stacks;

char* take_stack() {
  if (!free_stacks.empty()) {
    char* stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  const size_t page = sysconf(_SC_PAGESIZE);
  void* memory =
      mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page, PROT_NONE);  // an overflowing stack faults instead of reaching its neighbour
  return static_cast<char*>(memory) + page;
}

// AddressSanitizer must know on which stack the program is.
#if defined(__SANITIZE_ADDRESS__)
const void* host_stack = nullptr;
size_t host_stack_bytes = 0;
void before_switch(void** save, const void* stack, size_t bytes) { __sanitizer_start_switch_fiber(save, stack, bytes); }
void after_switch(void* saved, const void** stack, size_t* bytes) {
  __sanitizer_finish_switch_fiber(saved, stack, bytes);
}
void forget_stack(char* stack) { ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes); }
#else
const void* host_stack = nullptr;
size_t host_stack_bytes = 0;
void before_switch(void**, const void*, size_t) {}
void after_switch(void*, const void**, size_t*) {}
void forget_stack(char*) {}
#endif

}  // namespace

#if defined(RIVER_OWN_SWITCH)

// Saves what a call must preserve on the old stack and takes it from the new one.
extern "C" void river_fiber_switch(void** save, void* load);
asm(R"(
  .text
  .hidden river_fiber_switch
  .globl river_fiber_switch
  .type river_fiber_switch, @function
river_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size river_fiber_switch, .-river_fiber_switch
)");

namespace {

void* first_context(char* stack, void (*main)()) {
  auto** top = reinterpret_cast<void**>(stack + kStackBytes);
  top[-1] = nullptr;  // main's return address: it never returns, and unwinding ends here
  top[-2] = reinterpret_cast<void*>(main);
  for (int i = 3; i <= 8; i++) top[-i] = nullptr;
  return top - 8;
}

void switch_context(void*& save, void* load) { river_fiber_switch(&save, load); }
void drop_context(void*) {}

}  // namespace

#else

namespace {

void* first_context(char* stack, void (*main)()) {
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, main, 0);
  return context;
}

void switch_context(void*& save, void* load) {
  if (!save) save = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(save), static_cast<ucontext_t*>(load));
}

void drop_context(void* context) { delete static_cast<ucontext_t*>(context); }

}  // namespace

#endif

Fiber::Fiber(void (*entry)(void*), void* argument) : entry_(entry), argument_(argument), stack_(take_stack()) {
  context_ = first_context(stack_, &Fiber::main);
}

Fiber::~Fiber() {
  forget_stack(stack_);
  drop_context(context_);
  free_stacks.push_back(stack_);
}

void Fiber::main() {
  after_switch(nullptr, &host_stack, &host_stack_bytes);
  Fiber* self = running;
  self->entry_(self->argument_);
  self->finished_ = true;
  before_switch(nullptr, host_stack, host_stack_bytes);
  switch_context(self->context_, host_context);
}

void Fiber::resume() {
  running = this;
  void* saved = nullptr;
  before_switch(&saved, stack_, kStackBytes);
  switch_context(host_context, context_);
  after_switch(saved, nullptr, nullptr);
  running = nullptr;
}

void Fiber::suspend() {
  Fiber* self = running;
  before_switch(&self->sanitizer_, host_stack, host_stack_bytes);
  switch_context(self->context_, host_context);
  after_switch(self->sanitizer_, &host_stack, &host_stack_bytes);
}

}  // namespace river::emulation
