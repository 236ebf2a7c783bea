// RIVER_BOTH marks functions that kernels on a GPU and code on the host share.
#pragma once

#ifdef __CUDACC__
#define RIVER_BOTH __host__ __device__
#else
#define RIVER_BOTH
#endif
