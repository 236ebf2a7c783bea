// The threads of whoever calls an op on a CPU.
#include "check.h"  // before any header of torch

#include <torch/csrc/stable/ops.h>

namespace river::cpu {

Parallel callers_threads() {
  return {.count = int(torch::stable::get_num_threads()),
          .run =
              [](void*, int64_t n, int64_t grain, Parallel::Body body, void* context) {
                torch::stable::parallel_for(0, n, grain,
                                            [&](int64_t begin, int64_t end) { body(begin, end, context); });
              },
          .state = nullptr};
}

}  // namespace river::cpu
