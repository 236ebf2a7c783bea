// linear and linear_w4: out[t][n] = round(W[n] . x[t] + bias[n]) for T = 1..8 rows. The weight streams as
// device/weight_stream.cuh describes.
#include "device/activations.cuh"
#include "../river.h"

namespace river::cuda {
namespace {

using namespace device;

template <class T, class Source>
struct LinearPhase : PlainPhase {
  Source weight;
  const T *x, *bias;  // [T, in], [out] or null
  T* out;             // [T, out]
  int rows, out_features;

  RIVER_DEVICE const Source& source() const { return weight; }
  RIVER_DEVICE void load(StreamInput<T>& input) const { load_rows(input, x); }
  RIVER_DEVICE void finish(int strip, const StripTotals& totals, const Asked&, State&) const {
    const int row = threadIdx.x / kMaxRows, t = threadIdx.x % kMaxRows, n = strip * kTileRows + row;
    if (row >= kTileRows || t >= rows || n >= out_features) return;
    const float sum = totals(row, t) + (bias ? to_float(bias[n]) : 0.f);
    out[int64_t(t) * out_features + n] = from_float<T>(sum);
  }
};

}  // namespace

WorkspaceSize linear_workspace(const LinearArgs& a) {
  const StreamShape shape(a.out_features, a.in_features);
  return {partials_of(shape), shape.strips, 0};
}

void launch_linear(const LinearArgs& a, const Workspace& workspace, Stream stream) {
  with_16bit_dtype(a.dtype, [&]<class T>() {
    const StreamShape shape(a.out_features, a.in_features);
    auto run = [&](auto path, auto source, const char* name) {
      const LinearPhase<T, decltype(source)> phase{
          {},     source,        static_cast<const T*>(a.x), static_cast<const T*>(a.bias), static_cast<T*>(a.out),
          a.rows, a.out_features};
      launch_stream<T>(phase, path, shape, a.rows, workspace, stream, name);
    };
    if (a.packed) run(PackedPath{}, PackedTiles{static_cast<const uint8_t*>(a.weight)}, "linear_w4");
    else run(DensePath{}, MatrixRows<T>{static_cast<const T*>(a.weight), a.out_features, a.in_features}, "linear");
  });
}

}  // namespace river::cuda
