// Threads that stay together for an op of many short parts. Torch's parallel_for takes a microsecond or two to start
// its threads and to wait for them, as long as a part of a small layer. A team is started by it once, and its helpers
// look for work until the op is over.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <utility>

#include "../river.h"

namespace river::cpu {

class Team {
 public:
  // Calls f(parallel) on one thread, while the others of `threads` wait for what it runs by that Parallel. Threads that
  // are a team already go on as they are.
  template <class F>
  static void run(const Parallel& threads, const F& f) {
    if (threads.count <= 1 || threads.run == lead) return f(threads);
    Team team(threads.count);
    std::exception_ptr failure;  // torch's threads would not say what it was
    threads(threads.count, 1, [&](int64_t, int64_t) {
      // Who comes first leads: nobody waits for a leader who comes later.
      if (team.led_.exchange(true)) return team.help();
      try {
        f(Parallel{.count = threads.count, .run = lead, .state = &team});
      } catch (...) {
        failure = std::current_exception();
      }
      team.closed_.store(true, std::memory_order_release);
    });
    if (failure) std::rethrow_exception(failure);
  }

 private:
  // What threads take parts of. A late helper takes none of a job that is over: its number is in the same word.
  struct alignas(8) Progress {
    uint32_t job = 0;
    uint16_t parts = 0, taken = 0;
  };

  struct Job {
    int64_t n;
    Parallel::Body body;
    void* context;
  };

  explicit Team(int threads) : threads_(std::min(threads, UINT16_MAX)) {}

  static void lead(void* team, int64_t n, int64_t grain, Parallel::Body body, void* context) {
    static_cast<Team*>(team)->share({.n = n, .body = body, .context = context}, grain);
  }

  void share(const Job& job, int64_t grain) {
    const int64_t parts = std::min<int64_t>(threads_, ceil_div(job.n, std::max<int64_t>(grain, 1)));
    if (parts <= 1) {
      if (job.n > 0) job.body(0, job.n, job.context);
      return;
    }
    job_ = job;
    done_.store(0, std::memory_order_relaxed);
    progress_.store({.job = progress_.load(std::memory_order_relaxed).job + 1, .parts = uint16_t(parts)},
                    std::memory_order_release);
    while (take_part()) {}
    wait_until([&] { return done_.load(std::memory_order_acquire) == parts; });
    if (failed_.load(std::memory_order_relaxed)) {
      failed_ = false;
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
  }

  void help() {
    while (!closed_.load(std::memory_order_acquire))
      wait_until([&] { return take_part() || closed_.load(std::memory_order_acquire); });
  }

  // Does a part of the present job, if one is left. Until it is done, the leader begins no other.
  bool take_part() {
    Progress now = progress_.load(std::memory_order_acquire);
    do {
      if (now.taken == now.parts) return false;
    } while (!progress_.compare_exchange_weak(now, {now.job, now.parts, uint16_t(now.taken + 1)},
                                              std::memory_order_acq_rel, std::memory_order_acquire));
    try {
      job_.body(job_.n * now.taken / now.parts, job_.n * (now.taken + 1) / now.parts, job_.context);
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
    done_.fetch_add(1, std::memory_order_acq_rel);
    return true;
  }

  // Most waits are short. Where threads are more than cores, another one may have to run first.
  template <class F>
  static void wait_until(F there) {
    for (int tries = 0; !there(); tries++) {
      if (tries > 4096) std::this_thread::yield();
      else pause();
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  const int threads_;
  std::atomic<bool> led_ = false, closed_ = false;
  std::exception_ptr error_;  // the first of a job
  std::atomic<bool> failed_ = false;
  alignas(64) std::atomic<Progress> progress_{};
  Job job_{};                                  // in the same line of the cache: who takes a part has it already
  alignas(64) std::atomic<int64_t> done_ = 0;  // parts of the present job
};

}  // namespace river::cpu
