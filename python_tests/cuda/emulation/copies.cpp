// Copies to shared memory, and the mbarriers that say when they have landed. A copy lands at the time that the schedule
// chooses: at once, or when a thread waits for it and nothing else can run.
#include <cstring>
#include <utility>

#include "scheduler.h"

namespace river::emulation {

namespace {

std::vector<std::pair<const void*, size_t>> copied;  // what was read, and how many bytes of it

// An mbarrier: the 64 bits in shared memory are its whole state. Its parity changes once all arrivals and bytes are
// there.
struct Mbarrier {
  uint64_t count : 12, pending : 12, parity : 1, magic : 7;
  int64_t bytes : 32;
};
static_assert(sizeof(Mbarrier) == 8);
constexpr unsigned kMagic = 0x2a;

Mbarrier read_mbarrier(const uint64_t* p) {
  Mbarrier state;
  memcpy(&state, p, sizeof(state));
  if (state.magic != kMagic) fail("an mbarrier is used before mbarrier_init");
  return state;
}

// f changes the barrier at p; if that changes its parity, whoever waited for it goes on.
template <class F>
void change(Block& block, uint64_t* p, F f) {
  Mbarrier state;
  memcpy(&state, p, sizeof(state));
  f(state);
  if (state.pending == 0 && state.bytes == 0) {
    state.parity ^= 1;
    state.pending = state.count;
    for (auto& thread : block.threads)
      if (thread->mbarrier == p && thread->parity != state.parity) {
        thread->mbarrier = nullptr;
        wake(thread.get());
      }
  }
  memcpy(p, &state, sizeof(state));
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

}  // namespace

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

void start_copy(std::vector<Piece> pieces, uint64_t* barrier, uint32_t transaction_bytes) {
  read_mbarrier(barrier);
  Block& block = *current->block;
  for (const Piece& piece : pieces)
    if (reinterpret_cast<uintptr_t>(piece.to) % 16 || reinterpret_cast<uintptr_t>(piece.from) % 16 || piece.bytes % 16)
      fail("a copy to shared memory is not in multiples of 16 bytes");
  for (const Piece& piece : pieces) copied.emplace_back(piece.from, piece.bytes);
  block.copies.push_back({std::move(pieces), barrier, transaction_bytes});
  const Choice when = schedule().copies;
  if (when == Choice::kFirst || (when == Choice::kRandom && draw(*block.grid, 2))) land(block, block.copies.size() - 1);
}

void forget_copies() { copied.clear(); }

size_t copied_bytes(const void* from, size_t bytes) {
  const auto start = reinterpret_cast<uintptr_t>(from);
  size_t sum = 0;
  for (const auto& [p, size] : copied)
    if (reinterpret_cast<uintptr_t>(p) - start < bytes) sum += size;
  return sum;
}

void mbarrier_init(uint64_t* barrier, int count) {
  const auto arrivals = static_cast<uint64_t>(count);
  const Mbarrier state{.count = arrivals, .pending = arrivals, .parity = 0, .magic = kMagic, .bytes = 0};
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
  if (read_mbarrier(barrier).parity != (parity & 1)) return;
  current->mbarrier = barrier;
  current->parity = parity & 1;
  wait_at("an mbarrier", 0);
}

}  // namespace river::emulation
