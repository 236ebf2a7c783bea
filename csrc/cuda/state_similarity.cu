// state_similarity: the cosine of the rows of two [T, hidden] tensors. A block has a row, and each of its kParts warps
// a part of it: the same sums in the same order as where a layer's kernel decides by them (device/similarity.cuh).
#include "device/launch.h"
#include "device/similarity.cuh"

namespace river::cuda {
namespace {

using namespace device;

constexpr int kThreads = kParts * kWarp;

template <class T>
__global__ void __launch_bounds__(kThreads) state_similarity_kernel(const T* x, const T* y,  // [T, hidden]
                                                                    int hidden_size,
                                                                    float* out) {  // [T]
  RIVER_SHARED(float, similarity, [kMaxRows]);
  RIVER_SHARED(RowSquares, squares, [1]);
  dependency_trigger();
  dependency_wait();
  const int64_t place = int64_t(blockIdx.x) * hidden_size;
  measure_rows(x + place, y + place, 1, hidden_size, similarity, squares[0], [] { __syncthreads(); }, KeepNothing{});
  if (threadIdx.x == 0) out[blockIdx.x] = similarity[0];
}

}  // namespace

void launch_state_similarity(const StateSimilarityArgs& a, const Workspace& workspace, Stream stream) {
  const LaunchOptions options{.name = "state_similarity", .pdl = workspace.overlap != Overlap::kNone};
  with_dtype(a.dtype, [&]<class T>() {
    launch(state_similarity_kernel<T>, a.rows, kThreads, 0, stream, options, static_cast<const T*>(a.x),
           static_cast<const T*>(a.y), a.hidden_size, a.out);
  });
}

}  // namespace river::cuda
