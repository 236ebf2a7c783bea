// What the files of the emulator share with each other; kernels and tests see runtime.h alone.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "runtime.h"

namespace river::emulation {

constexpr unsigned char kPoison = 0xff;  // NaN in every float type, -1 in integers

std::string text(uint3 index);
[[noreturn]] void fail_launch(const Launch& launch, const std::string& what);

uint64_t draw(Grid& grid, uint64_t below);  // the next random number of the launch

// Puts blocks or threads in the schedule's order.
template <class T>
void arrange(Grid& grid, std::vector<T>& items) {
  if (schedule().order == Choice::kLast) std::reverse(items.begin(), items.end());
  if (schedule().order == Choice::kRandom)
    for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[draw(grid, i)]);
}

// scheduler.cpp
void wait_at(const char* name, int line);  // suspends the running thread until somebody wakes it
void wake(Thread* thread);
void advance(Grid& grid, size_t max_resident);  // with at most so many blocks at a time, until nothing can go on
void complete(Grid& grid);                      // to its end, as all kernels ahead of it have ended

// copies.cpp
bool land_one(Grid& grid);  // lets one copy land that somebody waits for; false: there is none

// memory.cpp
void check_shared_memory(const Block& block);  // of a block that returned: its bounds, and how much it used
void watch_signals();                          // so that a wild access is reported with its place

}  // namespace river::emulation
