// What the ops ask of the CUDA runtime beside launching kernels. No CUDA header here: it also builds without a toolkit.
#pragma once

#include "../river.h"

namespace river::cuda {

// The machine code that the current device runs, by architectures: 80, 86, 90, ...
struct Image {
  int device;  // architecture of the device itself
  int code;    // that the machine code is for; 0: this build has nothing that the device can run
  int ptx;     // of the PTX that the code was made from
};

const Image& image();
int sm_count();  // of the current device
bool is_capturing(Stream stream);
void* allocate(int64_t bytes, Stream stream);  // memory that is never given back, zeroed in the stream's order
bool is_pinned(const void* memory);            // host memory that kernels can write, at this very address

// What the ops of this thread ask of their kernels. Not kPrefetch by default: an eager op's weight may come from the
// kernel right ahead, which has not written it yet.
inline thread_local Overlap overlap_setting = Overlap::kLaunch;

}  // namespace river::cuda
