// One instruction set's table of primitives. Compiled once per set with -DRIVER_ISA=<name> and its -m flags; what the
// headers here define lies in anonymous namespaces, so that each set has its own.
// No STL here: an inline library function compiled for one set must not be linked into another's path.
#include "kernels.h"

#include "attention.h"
#include "dense_strip.h"
#include "lines.h"
#include "similarity.h"
#include "vectors.h"
#include "w4_strip.h"

#define RIVER_JOIN_(a, b) a##b
#define RIVER_JOIN(a, b) RIVER_JOIN_(a, b)
#define RIVER_TEXT_(a) #a
#define RIVER_TEXT(a) RIVER_TEXT_(a)

namespace river::cpu {
extern const Kernels RIVER_JOIN(kernels_, RIVER_ISA);
const Kernels RIVER_JOIN(kernels_, RIVER_ISA) = {
    .name = RIVER_TEXT(RIVER_ISA),
    .rms_norm = rms_norm,
    .prepare = prepare,
    .dense_strip = dense_strip,
    .w4_strip = w4_strip,
    .swiglu = swiglu,
    .swiglu_pairs = swiglu_pairs,
    .add_sums = add_sums,
    .rotate = rotate,
    .pack_query = pack_query,
    .attend = attend,
    .absorb = absorb,
    .average = average,
    .similarity = similarity,
    .to_float = to_float,
    .from_float = from_float,
};
}  // namespace river::cpu
