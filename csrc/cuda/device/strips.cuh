// What the warps of a streaming block do with its strips: the copying warp sends them through the ring, the readers
// multiply them. A stage holds Format::kStageTiles tiles of one strip, dealt to the readers in turn: reader w takes
// tiles w, w + 8, ... of each stage and keeps its own fp32 sums of the strip.
#pragma once

#include "activations.cuh"
#include "formats.cuh"
#include "ring.cuh"

namespace river::device {

// Where the copying warp stands: the stage that it fills next, and the part of the weight that it takes
struct CopyPlace {
  Cursor cursor;
  int strip, tile = 0;  // tile: of the block's split
  RIVER_DEVICE CopyPlace(int stages, const BlockWork& work) : cursor(stages), strip(work.first_strip) {}
  RIVER_DEVICE void next_strip(const BlockWork& work) { tile = 0, strip += work.strip_step; }
};

constexpr int kAll = 1 << 30;

// The copying warp: fills at most `limit` stages in `memory`, to the end of the strip; returns how many. Weights never
// change, so it waits for the readers only.
template <class Format, bool kBulk, class Source>
RIVER_DEVICE int copy_strip(Ring<kBulk>& ring, CopyPlace& place, int limit, unsigned char* memory, const Source& weight,
                            const StreamShape& shape, const BlockWork& work) {
  const CopyHint hint = evict_first();
  const auto start = Format::start(weight, shape, place.strip);
  int copied = 0;
  for (; copied < limit && place.tile < work.tiles; copied++, place.cursor.next()) {
    const int stage = place.cursor.stage, count = min(Format::kStageTiles, work.tiles - place.tile);
    ring.wait_until_empty(place.cursor);
    Format::copy(ring.full[stage], memory + stage * Format::kStageBytes, start, shape, work.first_tile + place.tile,
                 count, hint);
    place.tile += count;
  }
  return copied;
}

// The copying warp: fills at most `limit` stages; returns how many.
template <class Format, bool kBulk, class Source>
RIVER_DEVICE int copy_weights(Ring<kBulk>& ring, CopyPlace& place, int limit, unsigned char* memory,
                              const Source& weight, const StreamShape& shape, const BlockWork& work) {
  int copied = 0;
  while (copied < limit && place.strip < shape.strips) {
    copied += copy_strip<Format>(ring, place, limit - copied, memory, weight, shape, work);
    if (place.tile == work.tiles) place.next_strip(work);
  }
  return copied;
}

// The copying warp: asks L2 for at most `count` stages behind those copied so far. With its ring full, it would
// otherwise leave the memory idle until the kernels ahead have ended.
template <class Format, class Source>
RIVER_DEVICE void prefetch_weights(CopyPlace place, int count, const Source& weight, const StreamShape& shape,
                                   const BlockWork& work) {
  const CopyHint hint = evict_first();
  for (; count > 0 && place.strip < shape.strips; place.tile = 0, place.strip += work.strip_step) {
    const auto start = Format::start(weight, shape, place.strip);
    for (; count > 0 && place.tile < work.tiles; count--, place.tile += Format::kStageTiles)
      Format::prefetch(start, shape, work.first_tile + place.tile, min(Format::kStageTiles, work.tiles - place.tile),
                       hint);
  }
}

// One reader: its sums over the next strip of the block. sum[0] and sum[1] are output row g of x rows 2t and 2t + 1,
// sum[2] and sum[3] output row g + 8.
template <class Format, bool kBulk, class Activations>
RIVER_DEVICE void multiply_strip(float (&sum)[4], Ring<kBulk>& ring, Cursor& cursor, const unsigned char* memory,
                                 const Activations& x, const StreamShape& shape, const BlockWork& work) {
  for (int first = 0; first < work.tiles; first += Format::kStageTiles, cursor.next()) {
    const unsigned char* stage = memory + cursor.stage * Format::kStageBytes;
    const int count = min(Format::kStageTiles, work.tiles - first);
    ring.wait_until_full(cursor);
    const auto multiply = [&](int index) {
      const int tile = first + index, t = lane_id() % 4;
      uint32_t values[8];
      x.fragment(tile, values);
      const int columns = shape.in_features - (work.first_tile + tile) * kTileCols;
      Format::multiply(sum, stage, index, columns, values, x.tile_sum(tile, 2 * t), x.tile_sum(tile, 2 * t + 1));
    };
    int index = warp_id();
    for (; index + kReaders < count; index += 2 * kReaders) {  // two chains of mma at a time hide each other's latency
      multiply(index);
      multiply(index + kReaders);
    }
    if (index < count) multiply(index);
    ring.release(cursor);
  }
}

}  // namespace river::device
