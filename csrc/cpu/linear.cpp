// Linears on a CPU: x[T, in] @ W[out, in]^T for dense and packed weights, strips of 16 output rows in parallel.
#include "linear.h"

namespace river::cpu {

Activations::Activations(const Input& input, bool packed, const Parallel& parallel) {
  const Vectors& x = input.x;
  const int rows = x.rows.count();
  const int64_t padded = round_up(x.cols, kTileCols);
  lines_ = scratch<Line>(rows * padded * sizeof(float) / sizeof(Line));
  sums_ = scratch<float>(rows * padded / kTileCols);
  operand_ = {.rows = rows, .cols = int(x.cols), .padded = int(padded), .lines = lines_.get(), .sums = sums_.get()};
  for_rows(rows, x.bytes(), parallel, [&](int t) {
    if (!input.norm) return kernels().prepare(x.dtype, x.row(t), packed, t, operand_);
    const auto y = scratch<char>(x.bytes());
    kernels().rms_norm(x.dtype, x.row(t), input.norm, input.eps, int(x.cols), y.get());
    kernels().prepare(x.dtype, y.get(), packed, t, operand_);
  });
}

void linear_into(const Weight& weight, const Input& input, const LinearOut& to, const Parallel& parallel) {
  const DType dtype = weight.dtype;
  const auto bias = floats(dtype, to.bias, weight.rows);
  run_linears(input, parallel, linear({weight}, [&](int t, int64_t first, int count, const RowSums(&sums)[1]) {
                const int64_t place = to.rows.index[t] * weight.rows + first;
                kernels().add_sums(dtype, sums[0], count, bias ? &bias[first] : nullptr, to.multiplier,
                                   to.addend ? at(to.addend, dtype, place) : nullptr, at(to.out, dtype, place));
              }));
}

void launch_linear(const LinearArgs& a, const Parallel& parallel) {
  const Rows rows = Rows::all(a.rows);
  const Input x = {.x = {.dtype = a.dtype, .data = a.x, .cols = a.in_features, .rows = rows}};
  const Weight weight{
      .dtype = a.dtype, .packed = a.packed, .data = a.weight, .rows = a.out_features, .cols = a.in_features};
  linear_into(weight, x, {.bias = a.bias, .multiplier = 1, .addend = nullptr, .out = a.out, .rows = rows}, parallel);
}

}  // namespace river::cpu
