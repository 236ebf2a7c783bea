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

// Torch's threads, as many as torch.set_num_threads allows the caller
inline cpu::Parallel callers_threads() {
  return {.count = int(torch::stable::get_num_threads()),
          .run =
              [](void*, int64_t n, int64_t grain, cpu::Parallel::Body body, void* context) {
                torch::stable::parallel_for(0, n, grain,
                                            [&](int64_t begin, int64_t end) { body(begin, end, context); });
              },
          .state = nullptr};
}

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

// Calls on_cpu(parallel), or on_cuda(gpu) on the GPU of the op's tensors. on_cuda takes its argument as `auto&`: then a
// build without CUDA kernels refers to none.
template <class Cpu, class Cuda>
void launch(const Check& check, Cpu on_cpu, Cuda on_cuda) {
  if constexpr (RIVER_WITH_CUDA) {
    if (check.on_cuda()) {
      Gpu gpu(check);
      on_cuda(gpu);
      return;
    }
  }
  on_cpu(callers_threads());
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
