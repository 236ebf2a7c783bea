// state_similarity on a CPU.
#include "linear.h"

namespace river::cpu {

void launch_state_similarity(const StateSimilarityArgs& a, const Parallel& parallel) {
  for_rows(a.rows, 2 * a.hidden_size * size_of(a.dtype), parallel, [&](int row) {
    const int64_t place = int64_t(row) * a.hidden_size;
    a.out[row] = kernels().similarity(a.dtype, at(a.x, a.dtype, place), at(a.y, a.dtype, place), a.hidden_size);
  });
}

}  // namespace river::cpu
