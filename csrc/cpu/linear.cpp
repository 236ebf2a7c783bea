// Linears on a CPU: x[T, in] @ W[out, in]^T for dense and packed weights, strips of 16 output rows in parallel.
#include "linear.h"

#include <cstring>

namespace river::cpu {

Activations::Activations(int rows, int64_t cols) {
  const int64_t padded = round_up(cols, kTileCols);
  lines_ = scratch<Line>(rows * padded * sizeof(float) / sizeof(Line));
  sums_ = scratch<float>(rows * padded / kTileCols);
  operand_ = {.rows = rows, .cols = int(cols), .padded = int(padded), .lines = lines_.get(), .sums = sums_.get()};
}

Activations::Activations(const Vectors& x, bool packed, const Parallel& parallel)
    : Activations(x.rows.count(), x.cols) {
  for_rows(rows(), x.bytes(), parallel, [&](int t) { kernels().prepare(x.dtype, x.row(t), packed, t, operand_); });
}

Activations::Activations(const Vectors& x, const RmsNorm& norm, bool packed, const Parallel& parallel)
    : Activations(x.rows.count(), x.cols) {
  for_rows(rows(), x.bytes(), parallel, [&](int t) {
    const auto y = scratch<char>(x.bytes());
    kernels().rms_norm(x.dtype, x.row(t), norm.weight, norm.eps, int(x.cols), y.get());
    kernels().prepare(x.dtype, y.get(), packed, t, operand_);
  });
}

std::unique_ptr<float[]> project(const Weight& weight, const Activations& x, const Parallel& parallel) {
  auto y = scratch<float>(x.rows() * weight.rows);
  for_strips({weight}, x, parallel, [&](int t, int64_t first, int count, const RowSums(&sums)[1]) {
    float* to = &y[t * weight.rows + first];
    for (int i = 0; i < count; i += kTileRows)
      memcpy(to + i, sums[0].of_strip(i / kTileRows), std::min(kTileRows, count - i) * sizeof(float));
  });
  return y;
}

void linear_into(const Weight& weight, const Activations& x, const LinearOut& to, const Parallel& parallel) {
  const DType dtype = weight.dtype;
  const auto bias = floats(dtype, to.bias, weight.rows);
  for_strips({weight}, x, parallel, [&](int t, int64_t first, int count, const RowSums(&sums)[1]) {
    const int64_t place = to.rows.index[t] * weight.rows + first;
    kernels().add_sums(dtype, sums[0], count, bias ? &bias[first] : nullptr, to.multiplier,
                       to.addend ? at(to.addend, dtype, place) : nullptr, at(to.out, dtype, place));
  });
}

void launch_linear(const LinearArgs& a, const Parallel& parallel) {
  const Rows rows = Rows::all(a.rows);
  const Activations x({.dtype = a.dtype, .data = a.x, .cols = a.in_features, .rows = rows}, a.packed, parallel);
  const Weight weight{
      .dtype = a.dtype, .packed = a.packed, .data = a.weight, .rows = a.out_features, .cols = a.in_features};
  linear_into(weight, x, {.bias = a.bias, .multiplier = 1, .addend = nullptr, .out = a.out, .rows = rows}, parallel);
}

}  // namespace river::cpu
