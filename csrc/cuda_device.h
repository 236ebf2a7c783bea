// What the ops ask of the CUDA runtime beside launching kernels. No CUDA header here: it also builds without a toolkit.
#pragma once

#include "river.h"

namespace river::cuda {

// The machine code that the current device runs. Architectures as numbers: 80, 86, 90, ...
struct Image {
  int device;  // of the device itself
  int code;    // that the machine code is for; 0: this build has nothing that the device can run
  int ptx;     // of the PTX that it was made from
};

const Image& image();
int sm_count();  // of the current device
bool is_capturing(Stream stream);
void clear(void* memory, int64_t bytes, Stream stream);  // zeros, in the stream's order
bool is_pinned(const void* memory);  // host memory that kernels can write, at this very address

// One setting of the process, for measurements; kPrefetch at first
Overlap overlap();
void set_overlap(Overlap value);

}  // namespace river::cuda
