// device/launch.h under emulation: the same call queues the kernel for the emulated GPU.
#pragma once

#include <string>
#include <tuple>

#include "arch.h"

namespace river::device {

struct LaunchOptions {
  const char* name;
  bool pdl = false;
};

struct DeviceFacts {
  int sm_count, shared_memory_per_block, arch;
};

inline DeviceFacts device_facts() {
  const emulation::Device& device = emulation::device();
  return {device.sm_count, device.shared_memory_per_block(), device.arch};
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, CUstream_st*,
            const LaunchOptions& options, Arguments&&... arguments) {
  std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
  emulation::enqueue({.name = options.name,
                      .grid = grid,
                      .block = block,
                      .shared_bytes = shared_bytes,
                      .pdl = options.pdl,
                      .body = [kernel, copies] { std::apply(kernel, copies); }});
}

}  // namespace river::device
