// linear and linear_w4: one weight by itself.
#include "dispatch.h"

namespace river::ops {
namespace {

void fill_x(Check& check, const Tensor& x, LinearArgs& args) {
  args.dtype = check.model_dtype("x", x.scalar_type());
  args.rows = check.many_rows("x", x, 2);
  args.in_features = check.vector_size("in_features", x.size(1));
  args.x = check.vectors("x", x, x.scalar_type(), {args.rows, args.in_features});
}

// What follows the check of the weight.
Tensor run(Check& check, const Tensor& x, const OptionalTensor& bias, LinearArgs& args) {
  args.bias = check.optional("bias", bias, x.scalar_type(), {args.out_features});
  const Tensor out = check.output({args.rows, args.out_features}, x.scalar_type());
  args.out = mutable_data(out);
  launch(check, args, any_values, cpu::launch_linear,
         [&](auto& gpu) { cuda::launch_linear(args, gpu.workspace(cuda::linear_workspace(args)), gpu.stream()); });
  return out;
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  Check check("linear", "x", x);
  LinearArgs args{};
  args.packed = false;
  fill_x(check, x, args);
  args.weight = check.vectors("weight", weight, x.scalar_type(), {kAny, args.in_features});
  args.out_features = check.size("out_features of weight", weight.size(0));
  return run(check, x, bias, args);
}

RIVER_OP(linear, "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", TORCH_BOX(&linear))

Tensor linear_w4(const Tensor& x, const Tensor& weight, int64_t out_features, const OptionalTensor& bias) {
  Check check("linear_w4", "x", x);
  LinearArgs args{};
  args.packed = true;
  fill_x(check, x, args);
  args.out_features = check.size("out_features", out_features);
  args.weight = check.tiles("weight", weight, strips_of(out_features), args.in_features);
  return run(check, x, bias, args);
}

RIVER_OP(linear_w4, "(Tensor x, Tensor weight, int out_features, Tensor? bias=None) -> Tensor", TORCH_BOX(&linear_w4))

}  // namespace
}  // namespace river::ops
