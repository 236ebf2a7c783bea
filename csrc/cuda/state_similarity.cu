// Cosine of the rows of two [T, hidden] tensors, one block per row: device/similarity.cuh.
#include "device/launch.h"
#include "device/row_sums.cuh"

namespace river::cuda {

using namespace river::device;

namespace {

constexpr int kThreads = kParts * kWarp;

template <class T>
__global__ void __launch_bounds__(kThreads)
    state_similarity_kernel(const T* x, const T* y, int hidden_size, float* out) {
  RIVER_SHARED(float, similarity, [kMaxRows]);
  RIVER_SHARED(RowSquares, squares, [1]);
  dependency_trigger();
  dependency_wait();
  const int64_t place = int64_t(blockIdx.x) * hidden_size;
  measure_rows(x + place, y + place, 1, hidden_size, similarity, squares[0], [] { __syncthreads(); }, KeepNothing{});
  if (threadIdx.x == 0) out[blockIdx.x] = similarity[0];
}

}  // namespace

void launch_state_similarity(const StateSimilarityArgs& args, const Workspace& workspace, Stream stream) {
  with_dtype(args.dtype, [&]<class T>() {
    launch(state_similarity_kernel<T>, args.rows, kThreads, 0, stream,
           {"state_similarity", workspace.overlap != Overlap::kNone}, static_cast<const T*>(args.x),
           static_cast<const T*>(args.y), args.hidden_size, args.out);
  });
}

}  // namespace river::cuda
