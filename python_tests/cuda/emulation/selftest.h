// Launchers of the emulator's own tests; false: no such test. out: 256 floats, scratch: kScratch floats.
#pragma once

#include "river.h"

namespace river::emulation {

constexpr int kScratch = 1024;

bool launch_planted(const char* name, bool broken, float* out, float* scratch);
bool launch_ring(const char* bug, bool bulk, float* out, float* scratch);
void launch_mma(DType dtype, const void* a, const void* b, float* d);  // [16, 16], [16, 8], [16, 8]

}  // namespace river::emulation
