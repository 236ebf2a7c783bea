// The ceiling of every kernel that streams weights: bytes read through the same ring, and next to nothing done with
// them. For measurements (bench/gpu/ring.py), not part of a model.
#pragma once

#include "../river.h"

namespace river {

struct ReadRingArgs {
  int64_t bytes;        // a multiple of 16
  int stage_bytes;      // of the ring, a multiple of 16
  int copy_bytes;       // a stage is copied in pieces of this size, a multiple of 16
  int stages;           // 1 to 24
  int blocks_per_sm;    // 1 or 2
  const uint8_t* data;  // [bytes], 16-byte aligned
  uint32_t* checksums;  // [blocks of the workspace * blocks_per_sm]; entry b: exclusive or of the words that block b
                        // touches, the first 4096 bytes of the stages b, b + blocks, ... of the data
};

namespace cuda {

void launch_read_ring(const ReadRingArgs& args, const Workspace& workspace, Stream stream);

}  // namespace cuda
}  // namespace river
