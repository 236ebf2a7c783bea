// The ops on a GPU: device, stream, and one workspace per stream.
#include <algorithm>
#include <map>
#include <utility>

#include "dispatch.h"

#if RIVER_WITH_CUDA

// In libtorch_cuda: null under a torch without CUDA, which then has no CUDA tensors either.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace river::ops {
namespace {

// A growing piece of device memory, zero at first. CUDA graphs that were captured may hold its earlier addresses, so
// that nothing is ever given back; as each piece is at least twice the one before, all earlier ones together take less
// than the last one. It does not come from torch's allocator, whose pools belong to graphs.
class Piece {
 public:
  bool fits(int64_t bytes) const { return bytes <= bytes_; }

  void grow(int64_t bytes, cuda::Stream stream) {
    bytes = std::max({bytes, 2 * bytes_, int64_t(1) << 14});
    data_ = cuda::allocate(bytes, stream);
    bytes_ = bytes;
  }

  void* data() const { return data_; }

 private:
  int64_t bytes_ = 0;
  void* data_ = nullptr;
};

struct StreamMemory {
  std::mutex mutex;  // held while an op launches
  Piece partials, counters, scratch;
};

// The map is never freed: at the end of the process the GPU may be gone before it.
StreamMemory& memory_of(int gpu, cuda::Stream stream) {
  static auto& all = *new std::map<std::pair<int, cuda::Stream>, StreamMemory>;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  return all[{gpu, stream}];
}

cuda::Stream current_stream(const Check& check) {
  check.require(aoti_torch_get_current_cuda_stream, "this torch cannot name its current CUDA stream ",
                "(aoti_torch_get_current_cuda_stream is missing), expected a CUDA build of torch >= 2.11");
  void* stream = nullptr;
  check.require(aoti_torch_get_current_cuda_stream(check.gpu(), &stream) == 0, "cuda:", check.gpu(),
                " has no current stream");
  return static_cast<cuda::Stream>(stream);
}

}  // namespace

Gpu::Gpu(const Check& check) : check_(check), guard_(check.gpu()), stream_(current_stream(check)) {
  const cuda::Image& image = cuda::image();
  check.require(image.code != 0, "cuda:", check.gpu(), " is sm_", image.device,
                ", but the CUDA kernels were compiled for " RIVER_CUDA_ARCHS " only");
}

cuda::Workspace Gpu::workspace(const cuda::WorkspaceSize& size) {
  StreamMemory& memory = memory_of(check_.gpu(), stream_);
  lock_ = std::unique_lock<std::mutex>(memory.mutex);
  const auto reserve = [&](Piece& piece, int64_t bytes) {
    if (piece.fits(bytes)) return;
    check_.require(!cuda::is_capturing(stream_), "its workspace would have to grow while the stream is capturing a ",
                   "CUDA graph: run the op once on this stream before capturing it");
    piece.grow(bytes, stream_);
  };
  reserve(memory.partials, size.partials * int64_t(sizeof(float)));
  reserve(memory.counters, size.counters * int64_t(sizeof(uint32_t)));
  reserve(memory.scratch, size.scratch);
  return {.partials = static_cast<float*>(memory.partials.data()),
          .counters = static_cast<uint32_t*>(memory.counters.data()),
          .scratch = memory.scratch.data(),
          .blocks = cuda::sm_count(),
          .overlap = cuda::overlap_setting,
          .variants = cuda::variants};
}

}  // namespace river::ops
#endif  // RIVER_WITH_CUDA
