// What the ops ask of the CUDA runtime beside launching kernels. The emulated GPU has no ops, and does without.
#ifndef RIVER_EMULATION

#include "runtime.h"
#include "device/arch.cuh"
#include "device/launch.h"

namespace river::cuda {
namespace {

void check(cudaError_t error, const char* question) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it: the next call is not to blame
  throw std::runtime_error(std::string("CUDA, ") + question + ": " + cudaGetErrorString(error));
}

// It is never launched: the driver is asked what it would run. All kernels are compiled for the same architectures.
__global__ void image_kernel() { device::dependency_wait(); }

Image find_image(int) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, image_kernel);
  Image image{.device = device::device_facts().arch, .code = 0, .ptx = 0};
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:  // a driver older than the PTX
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      cudaGetLastError();  // clears it
      return image;
    default: check(error, "which code the device runs");
  }
  image.code = attributes.binaryVersion;
  image.ptx = attributes.ptxVersion;
  return image;
}

}  // namespace

const Image& image() { return device::of_current_device(find_image); }
int sm_count() { return device::device_facts().sm_count; }

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "whether the stream is being captured");
  return status != cudaStreamCaptureStatusNone;
}

void* allocate(int64_t bytes, Stream stream) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "memory for the workspace");
  check(cudaMemsetAsync(memory, 0, bytes, stream), "clearing the workspace");
  return memory;
}

bool is_pinned(const void* memory) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, memory) != cudaSuccess) {
    cudaGetLastError();  // clears it
    return false;
  }
  return attributes.type == cudaMemoryTypeHost && attributes.devicePointer == memory;
}

}  // namespace river::cuda
#endif  // RIVER_EMULATION
