// Where threads meet: barriers of a block, and operations of a warp. Who comes first waits; the last one wakes the
// others.
#include <cstring>

#include "scheduler.h"

namespace river::emulation {

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

namespace {

// The operation of these lanes that still waits for some of them, or a new one. Its memory is one that all have left.
Collective& collective_of(std::vector<std::unique_ptr<Collective>>& pool, uint32_t mask, const char* name, int line) {
  Collective* unused = nullptr;
  for (auto& candidate : pool) {
    if (candidate->mask == mask && candidate->arrived != mask) return *candidate;
    if (candidate->mask == 0) unused = candidate.get();
  }
  if (!unused) unused = pool.emplace_back(std::make_unique<Collective>()).get();
  unused->mask = mask, unused->arrived = unused->left = 0, unused->name = name, unused->line = line;
  return *unused;
}

}  // namespace

Collective& join(uint32_t mask, const char* name, int line, const void* mine, size_t bytes,
                 void (*combine)(Collective&)) {
  Block& block = *current->block;
  const int warp = current->linear / 32, lanes = std::min<int>(32, block.threads.size() - 32 * warp);
  mask &= 0xffffffffu >> (32 - lanes);
  if (!(mask >> current->lane & 1))
    fail(std::string(name) + " (line " + std::to_string(line) + "): the mask leaves out the calling lane");
  Collective& c = collective_of(block.warps[warp], mask, name, line);
  if (c.line != line || strcmp(c.name, name) != 0)
    fail("divergent warp: lane " + std::to_string(current->lane) + " at " + name + " (line " + std::to_string(line) +
         "), others at " + c.name + " (line " + std::to_string(c.line) + ")");
  if (bytes) memcpy(c.slots[current->lane], mine, bytes);
  c.arrived |= 1u << current->lane;
  if (c.arrived != mask) {
    c.waiting.push_back(current);
    wait_at(name, line);
  } else {
    if (combine) combine(c);
    for (Thread* thread : std::exchange(c.waiting, {})) wake(thread);
  }
  return c;
}

void leave(Collective& c) {
  c.left |= 1u << current->lane;
  if (c.left == c.mask) c.mask = 0;  // free
}

}  // namespace river::emulation
