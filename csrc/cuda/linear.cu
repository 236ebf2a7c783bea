// linear and linear_w4: out[t][n] = round(W[n] . x[t] + bias[n]) for T = 1..8 rows. The weight streams as
// device/stream.cuh describes.
#include "device/stream.cuh"

namespace river::cuda {
namespace {

using namespace device;

template <class T>
struct LinearEpilogue : PlainEpilogue {
  const T* bias;  // [out] or null
  T* out;         // [T, out]
  int rows, out_features;

  RIVER_DEVICE void finish(int strip, const StripTotals& totals, const Asked&, State&) const {
    const int output_row = output_row_of_thread(), t = row_of_thread(), n = strip * kTileRows + output_row;
    if (output_row >= kTileRows || t >= rows || n >= out_features) return;
    const float sum = totals(output_row, t) + (bias ? to_float(bias[n]) : 0.f);
    out[int64_t(t) * out_features + n] = from_float<T>(sum);
  }
};

StreamShape shape_of(const LinearArgs& a) { return {a.out_features, a.in_features}; }

}  // namespace

WorkspaceSize linear_workspace(const LinearArgs& a) {
  const StreamShape shape = shape_of(a);
  return {.partials = shape.partials(), .counters = shape.strips, .scratch = 0};
}

void launch_linear(const LinearArgs& a, const Workspace& workspace, Stream stream) {
  with_16bit_dtype(a.dtype, [&]<class T>() {
    const auto run = [&](const char* name, const auto& weight) {
      const StreamLaunch launch{
          .name = name, .shape = shape_of(a), .rows = a.rows, .workspace = workspace, .stream = stream};
      const LinearEpilogue<T> epilogue{.bias = static_cast<const T*>(a.bias),
                                       .out = static_cast<T*>(a.out),
                                       .rows = a.rows,
                                       .out_features = a.out_features};
      launch_stream<T>(launch, weight, PlainInput<T>{static_cast<const T*>(a.x)}, epilogue);
    };
    const MatrixRows<T> dense{
        .weight = static_cast<const T*>(a.weight), .rows = a.out_features, .columns = a.in_features};
    if (a.packed) run("linear_w4", PackedTiles{.tiles = static_cast<const uint8_t*>(a.weight)});
    else run("linear", dense);
  });
}

}  // namespace river::cuda
