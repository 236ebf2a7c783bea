// A fiber: a function with a stack of its own that gives up control and is resumed later, on one CPU thread.
#pragma once

#include <cstddef>

namespace river::emulation {

class Fiber {
 public:
  Fiber(void (*entry)(void*), void* argument);
  ~Fiber();
  Fiber(const Fiber&) = delete;

  void resume();          // runs it until it suspends or its entry returns
  static void suspend();  // inside a fiber: returns when it is resumed
  bool finished() const { return finished_; }

 private:
  static void main();

  void (*entry_)(void*);
  void* argument_;
  char* stack_;              // above a guard page
  void* context_ = nullptr;  // where it goes on
  void* sanitizer_ = nullptr;
  bool finished_ = false;
};

}  // namespace river::emulation
