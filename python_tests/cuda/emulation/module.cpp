// river_emulation: the CUDA launchers on the emulated GPU, for the tests. run() queues any number of them (op_calls.h)
// and returns when all have run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "op_calls.h"
#include "runtime.h"
#include "selftest.h"

namespace py = pybind11;
namespace cuda = river::cuda;
using namespace river::emulation;

namespace {

// Memory of a launch, poisoned, with a guard behind it (under AddressSanitizer the end is exact).
class Memory {
 public:
  Memory(const char* name, size_t bytes, int value) : name_(name), bytes_(bytes) {
    if (posix_memalign(&memory_, 256, bytes + guard_) != 0) throw std::bad_alloc();
    memset(memory_, value, bytes);
    memset(bytes_of() + bytes, 0xff, guard_);
  }
  ~Memory() { free(memory_); }
  Memory(const Memory&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

  void check(bool zero) const {
    for (size_t i = 0; i < guard_; i++)
      if (bytes_of()[bytes_ + i] != 0xff) throw Failure(std::string("emulation: a kernel wrote past ") + name_);
    for (size_t i = 0; zero && i < bytes_; i++)
      if (bytes_of()[i] != 0) throw Failure(std::string("emulation: ") + name_ + " are not left zero");
  }

 private:
  unsigned char* bytes_of() const { return static_cast<unsigned char*>(memory_); }
  const char* name_;
  size_t bytes_, guard_ = sanitized() ? 0 : 256;
  void* memory_ = nullptr;
};

template <class F>
void run(F launch) {
  try {
    launch();
    synchronize();
  } catch (...) {
    reset();
    throw;
  }
}

// Queues the calls, as a stream would, and runs them all, in one workspace.
void run_calls(const std::vector<Call>& calls) {
  cuda::WorkspaceSize size{};
  for (const Call& call : calls) {
    size.partials = std::max(size.partials, call.size.partials);
    size.counters = std::max(size.counters, call.size.counters);
    size.scratch = std::max(size.scratch, call.size.scratch);
  }
  const Memory partials("the partial sums", size.partials * sizeof(float), 0xff);
  const Memory counters("the counters", size.counters * sizeof(uint32_t), 0);
  const Memory scratch("the scratch memory", size.scratch, 0xff);
  const cuda::Workspace workspace{.partials = partials.as<float>(),
                                  .counters = counters.as<uint32_t>(),
                                  .scratch = scratch.as<void>(),
                                  .blocks = device().sm_count,
                                  .overlap = device().overlap,
                                  .variants = cuda::variants};
  forget_copies();
  run([&] {
    for (const Call& call : calls) call.launch(workspace);
  });
  partials.check(false);
  counters.check(true);
  scratch.check(false);
}

Choice choice_of(const std::string& name) {
  if (name == "first") return Choice::kFirst;
  if (name == "last") return Choice::kLast;
  if (name == "random") return Choice::kRandom;
  throw py::value_error("no such choice: " + name + " (first, last, random)");
}

cuda::Overlap overlap_of(const std::string& name) {
  if (name == "none") return cuda::Overlap::kNone;
  if (name == "launch") return cuda::Overlap::kLaunch;
  if (name == "prefetch") return cuda::Overlap::kPrefetch;
  throw py::value_error("no such overlap: " + name + " (none, launch, prefetch)");
}

template <class... A>
void selftest(bool (*launch)(A...), A... arguments) {
  run([&] {
    if (!launch(arguments...)) throw py::value_error("no such test");
  });
}

}  // namespace

PYBIND11_MODULE(river_emulation, m) {
  m.def(
      "set_schedule",
      [](const std::string& order, const std::string& copies, bool early_dependents, uint64_t seed) {
        schedule() = {
            .order = choice_of(order), .copies = choice_of(copies), .early_dependents = early_dependents, .seed = seed};
      },
      py::kw_only(), py::arg("order"), py::arg("copies"), py::arg("early_dependents"), py::arg("seed"));
  m.def(
      "set_device",
      [](int sm_count, int arch, const std::string& overlap, int shared_memory) {
        device() = {.sm_count = sm_count, .arch = arch, .overlap = overlap_of(overlap), .shared_memory = shared_memory};
      },
      py::kw_only(), py::arg("sm_count"), py::arg("arch"), py::arg("overlap"), py::arg("shared_memory") = 0);
  m.def("set_variant", cuda::set_variant, py::arg("name"), py::arg("value"));

  m.def(
      "watch",
      [](const std::vector<std::pair<uintptr_t, size_t>>& pieces) {
        watched().clear();
        for (const auto& [begin, bytes] : pieces)
          watched().push_back({.begin = reinterpret_cast<void*>(begin), .bytes = bytes});
      },
      "Counts what kernels load from these pieces of memory, (address, bytes) each, in place of those before");
  m.def(
      "loaded",
      [] {
        std::vector<uint64_t> bytes;
        for (const Watched& w : watched()) bytes.push_back(w.loaded);
        return bytes;
      },
      "Bytes loaded from each piece that is watched");

  m.def(
      "run",
      [](const std::vector<std::pair<std::string, py::dict>>& ops) {
        std::vector<Call> calls;
        for (const auto& [name, fields] : ops) calls.push_back(make_call(name, py::kwargs(fields)));
        run_calls(calls);
      },
      "Queues ops, (name, fields of its Args) each, and runs them all");

  m.def(
      "copied_bytes",
      [](uintptr_t address, size_t bytes) { return copied_bytes(reinterpret_cast<const void*>(address), bytes); },
      "How many bytes of this memory the last run has copied to shared memory");

  m.def("planted", [](const std::string& name, bool broken, uintptr_t out, uintptr_t scratch) {
    selftest(launch_planted, name.c_str(), broken, reinterpret_cast<float*>(out), reinterpret_cast<float*>(scratch));
  });
  m.def("ring", [](const std::string& bug, bool bulk, uintptr_t out, uintptr_t scratch) {
    selftest(launch_ring, bug.c_str(), bulk, reinterpret_cast<float*>(out), reinterpret_cast<float*>(scratch));
  });
  m.def("mma", [](const std::string& dtype, uintptr_t a, uintptr_t b, uintptr_t d) {
    const auto *pa = reinterpret_cast<void*>(a), *pb = reinterpret_cast<void*>(b);
    run([&] { launch_mma(dtype_of(dtype), pa, pb, reinterpret_cast<float*>(d)); });
  });
}
