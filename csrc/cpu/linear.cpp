// Linears on a CPU: x[T, in] @ W[out, in]^T for dense and packed weights, strips of 16 output rows in parallel.
#include "linear.h"

#include <cstring>

namespace river::cpu {

Activations::Activations(int rows, int64_t cols) {
  const int64_t padded = round_up(cols, kTileCols);
  values_ = scratch<float>(rows * padded);
  sums_ = scratch<float>(rows * padded / kTileCols);
  operand_ = {.rows = rows, .cols = int(cols), .padded = int(padded), .values = values_.get(), .sums = sums_.get()};
}

Activations::Activations(const Vectors& x, bool packed) : Activations(x.rows.count, x.cols) {
  for (int t = 0; t < x.rows.count; t++) kernels().prepare(x.dtype, x.row(t), packed, t, operand_);
}

Activations::Activations(const Vectors& x, const RmsNorm& norm, bool packed) : Activations(x.rows.count, x.cols) {
  auto y = scratch<char>(x.cols * size_of(x.dtype));
  for (int t = 0; t < x.rows.count; t++) {
    kernels().rms_norm(x.dtype, x.row(t), norm.weight, norm.eps, int(x.cols), y.get());
    kernels().prepare(x.dtype, y.get(), packed, t, operand_);
  }
}

std::unique_ptr<float[]> project(const Weight& weight, const Activations& x, const Parallel& parallel) {
  auto y = scratch<float>(x.rows() * weight.rows);
  for_strips(weight, x, parallel, [&](int64_t first, int count, const StripOut& out) {
    for (int t = 0; t < x.rows(); t++) memcpy(&y[t * weight.rows + first], out[t], count * sizeof(float));
  });
  return y;
}

void linear_into(const Weight& weight, const Activations& x, const LinearOut& to, const Parallel& parallel) {
  const DType dtype = weight.dtype;
  const auto bias = floats(dtype, to.bias, weight.rows);
  for_strips(weight, x, parallel, [&](int64_t first, int count, const StripOut& y) {
    for (int t = 0; t < x.rows(); t++) {
      const int64_t place = to.rows.index[t] * weight.rows + first;
      float sum[kTileRows] = {};
      if (to.addend) kernels().to_float(dtype, at(to.addend, dtype, place), sum, count);
      for (int i = 0; i < count; i++) sum[i] += y[t][i] + (bias ? bias[first + i] : 0.f);
      kernels().from_float(dtype, sum, at(to.out, dtype, place), count);
    }
  });
}

void launch_linear(const LinearArgs& a, const Parallel& parallel) {
  const Rows rows = Rows::all(a.rows);
  const Activations x({.dtype = a.dtype, .data = a.x, .cols = a.in_features, .rows = rows}, a.packed);
  const Weight weight{
      .dtype = a.dtype, .packed = a.packed, .data = a.weight, .rows = a.out_features, .cols = a.in_features};
  linear_into(weight, x, {.bias = a.bias, .addend = nullptr, .out = a.out, .rows = rows}, parallel);
}

}  // namespace river::cpu
