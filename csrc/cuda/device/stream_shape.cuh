// How a weight [out_features, in_features] is cut into work. A strip is 16 output rows, a tile 64 columns of it, a
// split a range of tiles. The cut depends on the weight's shape alone, never on T or on the grid, so that neither
// changes a bit. Blocks are dealt (strip, split) units: block b works on split b % splits, and on every n-th strip, n
// being the number of blocks per split. A block keeps to one split so that its activations stay in shared memory.
#pragma once

#include "arch.cuh"
#include "types.cuh"

namespace river::device {

constexpr int kSplitColumns = 4096;  // activations of one block: 8 rows x 4096 x 2 B = 64 KB

struct StreamShape {
  int out_features, in_features;
  int strips, tiles;        // of out_features; of in_features
  int splits, split_tiles;  // how many splits there are, and how many tiles each has; the last one may have fewer

  static constexpr int kDesignBlocks = 132;  // what the cut is good for; any grid is right

  __host__ __device__ StreamShape(int out_features, int in_features)
      : out_features(out_features), in_features(in_features), strips((out_features + kTileRows - 1) / kTileRows),
        tiles((in_features + kTileCols - 1) / kTileCols), splits((in_features + kSplitColumns - 1) / kSplitColumns) {
    // 192 units on 132 blocks keep 73 % busy: split K until the last wave is full enough, ranges of 512 columns at
    // least
    auto busy = [&](int s) {
      const int units = strips * s, waves = (units + kDesignBlocks - 1) / kDesignBlocks;
      return 100 * units >= 85 * waves * kDesignBlocks;
    };
    while (!busy(splits) && 2 * splits * 8 <= tiles) splits *= 2;
    split_tiles = (tiles + splits - 1) / splits;
    splits = (tiles + split_tiles - 1) / split_tiles;
  }

  // fp32 sums that the blocks of split strips hand to each other: [strips, splits, 16, 8]
  int64_t partials() const { return splits > 1 ? int64_t(strips) * splits * kTileRows * kMaxRows : 0; }
};

// The work of this block. Any grid of at least `splits` blocks is right; some blocks may have no strip.
struct BlockWork {
  int split, first_strip, strip_step, strips;  // strips first_strip, first_strip + strip_step, ...: so many
  int first_tile, tiles;                       // of the split

  RIVER_DEVICE BlockWork(const StreamShape& shape) {
    split = blockIdx.x % shape.splits;
    first_strip = blockIdx.x / shape.splits;
    strip_step = gridDim.x / shape.splits;  // blocks per split
    first_tile = split * shape.split_tiles;
    tiles = min(shape.split_tiles, shape.tiles - first_tile);
    strips = max(0, (shape.strips - first_strip + strip_step - 1) / strip_step);
  }
  RIVER_DEVICE bool idle(const StreamShape& shape) const { return first_strip >= min(strip_step, shape.strips); }
  RIVER_DEVICE int strip(int n) const { return first_strip + n * strip_step; }
};

}  // namespace river::device
