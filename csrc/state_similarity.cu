// Cosine of the rows of two [T, hidden] tensors, one warp per row: device/similarity.cuh.
#include "device/launch.h"
#include "device/similarity.cuh"

namespace river::cuda {

using namespace river::device;

namespace {

template <class T>
__global__ void __launch_bounds__(kWarp) state_similarity_kernel(const T* x, const T* y, int hidden_size, float* out) {
  dependency_trigger();
  dependency_wait();
  const int64_t row = int64_t(blockIdx.x) * hidden_size;
  const float similarity = warp_cosine(x + row, y + row, hidden_size);
  if (lane_id() == 0) out[blockIdx.x] = similarity;
}

}  // namespace

void launch_state_similarity(const StateSimilarityArgs& args, const Workspace& workspace, Stream stream) {
  with_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(state_similarity_kernel<T>, args.rows, kWarp, 0, stream,
           {"state_similarity", workspace.overlap != Overlap::kNone}, static_cast<const T*>(args.x),
           static_cast<const T*>(args.y), args.hidden_size, args.out);
  });
}

}  // namespace river::cuda
