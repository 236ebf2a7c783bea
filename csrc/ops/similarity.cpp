// state_similarity: the cosine of a layer's input and output.
#include "dispatch.h"

namespace river::ops {
namespace {

Tensor state_similarity(const Tensor& x, const Tensor& y) {
  Check check("state_similarity", "x", x);
  const ScalarType type = x.scalar_type();
  StateSimilarityArgs args{};
  args.dtype = check.model_dtype("x", type);
  args.rows = check.many_rows("x", x, 2);
  args.hidden_size = check.hidden_size(x, 16);
  args.x = check.vectors("x", x, type, {args.rows, args.hidden_size});
  args.y = check.vectors("y", y, type, {args.rows, args.hidden_size});
  const Tensor out = check.output({args.rows}, ScalarType::Float);
  args.out = mutable_data<float>(out);
  launch(check, args, any_values, cpu::launch_state_similarity,
         [&](auto& gpu) { cuda::launch_state_similarity(args, gpu.workspace({}), gpu.stream()); });
  return out;
}

RIVER_OP(state_similarity, "(Tensor x, Tensor y) -> Tensor", TORCH_BOX(&state_similarity))

}  // namespace
}  // namespace river::ops
