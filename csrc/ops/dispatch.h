// How torch finds an op, and how the op reaches its kernels: on the caller's threads, or on the current stream of its
// tensors' GPU.
#pragma once

#include <mutex>
#include <string>

#include "../cuda/runtime.h"
#include "check.h"  // before any header of torch

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

namespace river::ops {

// A GPU while an op launches its kernels there. Defined in workspace.cpp, where there are CUDA kernels.
class Gpu {
 public:
  explicit Gpu(const Check& check);

  cuda::Stream stream() const { return stream_; }

  // The stream's workspace, at least this large. No other thread gets it before this Gpu ends: the kernels of one op
  // stay together on the stream.
  cuda::Workspace workspace(const cuda::WorkspaceSize& size);

 private:
  const Check& check_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_;
  std::unique_lock<std::mutex> lock_;
};

// Values that any tensor may hold
inline constexpr auto any_values = [](const Requirements&, const auto&) {};

// Calls on_cuda(gpu) on the GPU of the op's tensors, or check_values(requirements, args) and on_cpu(args, parallel),
// which a graph that is being captured does when it is replayed. Values are checked on a CPU alone, as the host would
// have to wait for a GPU's; check_values may put copies of what it checks into the args. on_cuda takes its argument as
// `auto&`: then a build without CUDA kernels refers to none.
template <class Args, class Values, class Cuda>
void launch(const Check& check, const Args& args, Values check_values,
            void (*on_cpu)(const Args&, const cpu::Parallel&), Cuda on_cuda) {
  if constexpr (RIVER_WITH_CUDA) {
    if (check.on_cuda()) {
      Gpu gpu(check);
      on_cuda(gpu);
      return;
    }
  }
  const auto run = [op = check.op(), args, check_values, on_cpu](const cpu::Parallel& parallel) {
    Requirements requirements(op);
    Args own = args;
    check_values(requirements, own);
    on_cpu(own, parallel);
  };
  if (cpu::Graph* graph = cpu::Graph::recording()) graph->add([run, held = check.held()](const auto& p) { run(p); });
  else run(cpu::callers_threads());
}

#if RIVER_WITH_CUDA
#define RIVER_ON_CUDA(...) __VA_ARGS__
#else
#define RIVER_ON_CUDA(...)
#endif

// Registers torch.ops.river.`name` by its schema without the name, and `kernel`, which serves both devices:
// TORCH_BOX(&f) of a function of few parameters in the schema's order, or boxed<&f> of one that reads them by name.
#define RIVER_OP(name, schema, kernel)                                                      \
  STABLE_TORCH_LIBRARY_FRAGMENT(river, m) { m.def((std::string(#name) + schema).c_str()); } \
  STABLE_TORCH_LIBRARY_IMPL(river, CPU, m) { m.impl(#name, kernel); }                       \
  RIVER_ON_CUDA(STABLE_TORCH_LIBRARY_IMPL(river, CUDA, m) { m.impl(#name, kernel); })

}  // namespace river::ops
