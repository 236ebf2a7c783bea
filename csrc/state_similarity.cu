// Cosine of the rows of two [T, hidden] tensors, one block per row. Two passes over the vectors: their largest
// magnitudes, which decide the scaling, then one (dot, a, b) triple per strip, added in order.
#include "device/launch.h"
#include "device/similarity.cuh"

namespace river::cuda {

using namespace river::device;

namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
state_similarity_kernel(const T* x, const T* y, int hidden_size, float* out) {
  RIVER_SHARED(uint32_t, largest, [2]);  // of x, y
  RIVER_DYNAMIC_SHARED(shared);
  auto* triples = reinterpret_cast<float*>(shared);  // [3, strips]
  const int strips = hidden_size / kStrip;
  x += static_cast<int64_t>(blockIdx.x) * hidden_size;
  y += static_cast<int64_t>(blockIdx.x) * hidden_size;

  if (threadIdx.x < 2) largest[threadIdx.x] = 0;
  __syncthreads();
  dependency_wait();
  uint32_t max_x = 0, max_y = 0;
  for (int s = threadIdx.x; s < strips; s += kThreads) {
    float u[kStrip], v[kStrip];
    load16(x + s * kStrip, u);
    load16(y + s * kStrip, v);
#pragma unroll
    for (int i = 0; i < kStrip; i++) {
      max_x = max(max_x, magnitude_bits(u[i]));
      max_y = max(max_y, magnitude_bits(v[i]));
    }
  }
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    max_x = max(max_x, shuffle_xor(max_x, lanes));
    max_y = max(max_y, shuffle_xor(max_y, lanes));
  }
  if (lane_id() == 0) {
    atomicMax(&largest[0], max_x);
    atomicMax(&largest[1], max_y);
  }
  __syncthreads();

  const Scaling sx = safe_scaling(largest[0]), sy = safe_scaling(largest[1]);
  if (!sx.usable || !sy.usable) {  // the same for the whole block
    if (threadIdx.x == 0) out[blockIdx.x] = 0;
    return;
  }
  for (int s = threadIdx.x; s < strips; s += kThreads) {
    float u[kStrip], v[kStrip];
    load16(x + s * kStrip, u);
    load16(y + s * kStrip, v);
#pragma unroll
    for (int i = 0; i < kStrip; i++) {
      u[i] = u[i] * sx.first * sx.second;
      v[i] = v[i] * sy.first * sy.second;
    }
    const Triple t = strip_triple(u, v);
    triples[s] = t.dot, triples[strips + s] = t.a, triples[2 * strips + s] = t.b;
  }
  __syncthreads();

  RIVER_SHARED(float, sums, [3]);
  if (threadIdx.x < 3) {
    float sum = 0;
    for (int s = 0; s < strips; s++) sum = __fadd_rn(sum, triples[threadIdx.x * strips + s]);
    sums[threadIdx.x] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = cosine({sums[0], sums[1], sums[2]});
}

}  // namespace

void launch_state_similarity(const StateSimilarityArgs& args, Stream stream) {
  const size_t shared_bytes = 3 * sizeof(float) * (args.hidden_size / kStrip);
  with_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(state_similarity_kernel<T>, args.rows, kThreads, shared_bytes, stream,
           {.name = "state_similarity", .pdl = true}, static_cast<const T*>(args.x), static_cast<const T*>(args.y),
           args.hidden_size, args.out);
  });
}

}  // namespace river::cuda
