// Launches on a CPU that are recorded once and run again by one call, as a CUDA graph runs kernels. What they read and
// write lies at the same places every time; each holds on to its tensors.
#pragma once

#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "team.h"

namespace river::cpu {

class Graph {
 public:
  using Launch = std::function<void(const Parallel&)>;

  // The one to which this thread's launches are added instead of running; null: they run.
  static Graph*& recording() {
    thread_local Graph* graph = nullptr;
    return graph;
  }

  // Calls run(), whose launches become those of the graph.
  template <class F>
  auto record(F run) {
    struct End {
      ~End() { recording() = nullptr; }
    };
    if (recording()) throw std::logic_error("this thread is capturing a graph already");
    recording() = this;
    const End end;
    return run();
  }

  void add(Launch launch) { launches_.push_back(std::move(launch)); }
  size_t size() const { return launches_.size(); }

  // Those from `begin` to `end` - 1, in order, by threads that stay together until the last one is done
  void replay(size_t begin, size_t end, const Parallel& threads) const {
    if (begin > end || end > size()) throw std::out_of_range("a graph has no such launches");
    if (begin == end) return;
    Team::run(threads, [&](const Parallel& parallel) {
      for (size_t i = begin; i < end; i++) launches_[i](parallel);
    });
  }

 private:
  std::vector<Launch> launches_;
};

}  // namespace river::cpu
