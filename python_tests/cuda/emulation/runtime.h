// The emulated GPU: the threads of a launch are fibers that run one after the other until they must wait. What the
// hardware leaves open (order of threads and blocks, when a copy lands, how early a dependent kernel starts) is chosen
// by a Schedule; a kernel is right only if its results are the same under all of them.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "river.h"
#include "fiber.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

namespace river::emulation {

enum class Choice { kFirst, kLast, kRandom };

struct Schedule {
  Choice order = Choice::kFirst;  // of threads and blocks: ascending, descending, shuffled at every step
  Choice copies = Choice::kLast;  // land at once, as late as allowed, either
  bool early_dependents = true;   // a PDL launch runs up to its dependency wait before its predecessor starts
  uint64_t seed = 0;
};

struct Device {
  int sm_count = 4;
  int arch = 90;
  cuda::Overlap overlap = cuda::Overlap::kPrefetch;  // what launchers are to use
  int shared_memory = 0;                             // KB of a block; 0: what the chip has
  int shared_memory_per_block() const {
    return (shared_memory ? shared_memory : arch == 90 ? 227 : arch == 80 ? 163 : 99) * 1024;
  }
};

Schedule& schedule();
Device& device();

// A piece of memory, and the bytes that kernels loaded from it by load_written
struct Watched {
  const void* begin;
  size_t bytes;
  uint64_t loaded = 0;
};

std::vector<Watched>& watched();

struct Failure : std::runtime_error {
  using runtime_error::runtime_error;
};

// ---- what a launch consists of ----------------------------------------------------------------

struct Launch {
  const char* name;
  dim3 grid, block;
  size_t shared_bytes;
  bool pdl;
  std::function<void()> body;  // the kernel with its arguments, run by every thread
};

struct Grid;
struct Block;

struct Piece {  // of a copy to shared memory
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread {
  Thread(Block* block, int linear);
  Block* block;
  int linear, lane;  // its number in the block, and in its warp
  uint3 index;
  const char* waits_at = nullptr;  // null: runs, or has returned
  int line = 0;
  uint64_t* mbarrier = nullptr;     // that it waits at
  uint32_t parity = 0;              // that it waits for the mbarrier to leave
  std::vector<Piece> async_copies;  // not yet followed by an arrival
  std::string failure;              // what ended it
  Fiber fiber;
};

// One operation of a warp under way: every lane of the mask deposits, all then read each other's slots.
struct Collective {
  uint32_t mask, arrived, left;
  const char* name;
  int line;
  std::vector<Thread*> waiting;
  alignas(16) unsigned char slots[32][64];
};

struct Block {
  Grid* grid;
  uint3 index;
  std::vector<std::unique_ptr<Thread>> threads;
  int returned = 0;
  bool met_dependency = false;

  struct Barrier {
    int arrived = 0, expected = 0, line = 0, any = 0, result = 0;
    std::vector<Thread*> waiting;
  } barriers[16];
  std::vector<std::vector<std::unique_ptr<Collective>>> warps;  // operations of each warp under way

  struct Shared {
    const void* site;  // where it is declared; null: the dynamic shared memory
    size_t bytes;
    std::unique_ptr<unsigned char, void (*)(void*)> memory;
  };
  std::vector<Shared> shared;

  struct Copy {
    std::vector<Piece> pieces;
    uint64_t* mbarrier;
    uint32_t transaction_bytes;  // 0: counts as an arrival
  };
  std::vector<Copy> copies;  // in flight
};

struct Grid {
  Launch launch;
  uint64_t random;           // state of its random numbers
  std::vector<uint3> order;  // of the blocks
  size_t next = 0;           // not yet started
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<Thread*> runnable, at_dependency;
  size_t head = 0;  // of runnable
  bool dependency_met = false;
};

extern Thread* current;  // the thread that runs

// ---- for the host -----------------------------------------------------------------------------

void enqueue(Launch launch);  // runs of it only what need not wait for its predecessors
void synchronize();           // runs everything; throws Failure
void reset();                 // forgets what is queued
void forget_copies();
size_t copied_bytes(const void* from, size_t bytes);  // that copies to shared memory have taken from there since
bool sanitized();                                     // AddressSanitizer watches the ends of all memory

// ---- for device code ----------------------------------------------------------------------------

[[noreturn]] void fail(const std::string& what);                              // in the running thread
int sync_block(int id, int threads, const char* name, int line, bool value);  // returns whether any value was true
Collective& join(uint32_t mask, const char* name, int line, const void* mine, size_t bytes,
                 void (*combine)(Collective&));
void leave(Collective& collective);
void wait_for_dependency();
unsigned char* shared_memory(const void* site, size_t bytes);  // of this block, filled with NaN at first use
unsigned char* dynamic_shared_memory();

void mbarrier_init(uint64_t* barrier, int count);
void mbarrier_arrive(uint64_t* barrier, uint32_t expect_bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
void start_copy(std::vector<Piece> pieces, uint64_t* barrier, uint32_t transaction_bytes);
void note_load(const void* p, size_t bytes);         // for those who watch
void check_prefetch(const void* p, uint32_t bytes);  // reads it, so that the sanitizer sees where it ends

}  // namespace river::emulation
