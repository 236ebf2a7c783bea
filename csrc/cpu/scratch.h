// Scratch memory of the CPU kernels. A small layer takes a dozen blocks of some KB, a size for which malloc searches and
// merges at each call: a tenth of such a layer's time. So a thread keeps the blocks that it has used for its next op.
#pragma once

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

namespace river::cpu {

// What one thread keeps: blocks of 2^c bytes, where c is at most kLargest. Larger ones go back to the system.
class KeptBlocks {
 public:
  ~KeptBlocks() {
    for (Block*& first : free_)
      while (first) std::free(pop(first));
  }

  // At least so many bytes, aligned to 64
  void* take(int64_t bytes) {
    const int c = class_of(bytes);
    if (c <= kLargest && free_[c]) return pop(free_[c]);
    void* block = std::aligned_alloc(64, c <= kLargest ? size_t(1) << c : (size_t(bytes) + 63) / 64 * 64);
    if (!block) throw std::bad_alloc();
    return block;
  }

  // Takes back a block of so many bytes, whichever thread took it
  void give(void* block, int64_t bytes) {
    const int c = class_of(bytes);
    if (c > kLargest) return std::free(block);
    free_[c] = new (block) Block{free_[c]};
  }

 private:
  struct Block {
    Block* next;
  };
  static constexpr int kSmallest = 6, kLargest = 20;

  static int class_of(int64_t bytes) {
    const int c = std::bit_width(uint64_t(bytes > 0 ? bytes - 1 : 0));
    return c < kSmallest ? kSmallest : c;
  }

  static void* pop(Block*& first) {
    Block* block = first;
    first = block->next;
    return block;
  }

  Block* free_[kLargest + 1] = {};  // lists of blocks, by c
};

inline thread_local KeptBlocks kept_blocks;

struct GiveBack {
  int64_t bytes = 0;
  void operator()(void* block) const { kept_blocks.give(block, bytes); }
};

template <class T>
using Scratch = std::unique_ptr<T[], GiveBack>;

// Room for n elements, not initialised
template <class T>
Scratch<T> scratch(int64_t n) {
  static_assert(std::is_trivially_default_constructible_v<T> && alignof(T) <= 64);
  const int64_t bytes = n * int64_t(sizeof(T));
  return Scratch<T>(static_cast<T*>(kept_blocks.take(bytes)), GiveBack{bytes});
}

}  // namespace river::cpu
