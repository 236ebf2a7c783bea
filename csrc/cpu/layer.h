// A layer that each row takes its own way.
#pragma once

#include "linear.h"

namespace river::cpu {

// block_rows through the decoder block, exit_rows through the exit layer: together they are the active rows.
void run_both_ways(const DualLayerArgs& args, const Rows& block_rows, const Rows& exit_rows, const Parallel& parallel);

}  // namespace river::cpu
