// How every kernel is launched: one function, never <<<>>>. It carries the launch attributes, turns errors into one
// sentence with the kernel's name, and has a twin under RIVER_EMULATION that runs the same call on a CPU.
#pragma once

#include <cstddef>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef RIVER_EMULATION
#include "emulation/launch.h"
#else

#include <cuda_runtime.h>

namespace river::device {

struct LaunchOptions {
  const char* name;  // for error messages
  bool pdl = false;  // may start before the kernels ahead of it end; it must execute dependency_wait()
};

inline void check(cudaError_t error, const char* name, const std::string& details = "") {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it: the next launch is not to blame
  throw std::runtime_error(std::string("kernel ") + name + ": " + cudaGetErrorString(error) + details);
}

// What find(device) says of the current device; it is asked once for each device.
template <class Facts>
const Facts& of_current_device(Facts (*find)(int device)) {
  constexpr int kMaxDevices = 64;
  static Facts facts[kMaxDevices];
  static std::once_flag known[kMaxDevices];
  int device = 0;
  check(cudaGetDevice(&device), "device facts");
  if (device >= kMaxDevices) throw std::runtime_error("device facts: too many devices");
  std::call_once(known[device], [&] { facts[device] = find(device); });
  return facts[device];
}

struct DeviceFacts {
  int sm_count;
  int shared_memory_per_block;  // bytes, the opt-in limit
  int arch;                     // 80, 86, 89, 90, ...
};

inline const DeviceFacts& device_facts() {
  return of_current_device<DeviceFacts>([](int device) -> DeviceFacts {
    const auto ask = [&](cudaDeviceAttr attribute) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, attribute, device), "device facts");
      return value;
    };
    return {ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
            10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor)};
  });
}

inline std::string sizes_of(dim3 grid, dim3 block, size_t shared_bytes) {
  const auto text = [](dim3 d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
  };
  return " (grid " + text(grid) + ", block " + text(block) + ", " + std::to_string(shared_bytes) +
         " bytes of shared memory)";
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const LaunchOptions& options, Arguments&&... arguments) {
  const auto attempt = [&](cudaError_t error) {
    if (error != cudaSuccess) check(error, options.name, sizes_of(grid, block, shared_bytes));
  };
  cudaFuncAttributes facts{};
  attempt(cudaFuncGetAttributes(&facts, kernel));
  // Both belong to the function, not to this launch: always the same values, whatever other threads launch.
  const int dynamic_limit = device_facts().shared_memory_per_block - int(facts.sharedSizeBytes);
  attempt(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_limit));
  // Two consecutive kernels share an SM only if the carve-out leaves room for both.
  attempt(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  cudaLaunchAttribute early_start{};
  early_start.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early_start.val.programmaticStreamSerializationAllowed = 1;
  const bool early = options.pdl && facts.ptxVersion >= 90;  // code made from older PTX does not wait, on any device
  const cudaLaunchConfig_t config{.gridDim = grid,
                                  .blockDim = block,
                                  .dynamicSmemBytes = shared_bytes,
                                  .stream = stream,
                                  .attrs = &early_start,
                                  .numAttrs = early ? 1u : 0u};
  attempt(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

}  // namespace river::device
#endif  // RIVER_EMULATION
