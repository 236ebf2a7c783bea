// Every PTX instruction that the kernels use, one function each; no other file holds PTX. Under RIVER_EMULATION the
// same functions come from emulation/arch.h and run on a CPU.
//
// Weights travel through a ring of stages in shared memory. One warp fills a stage, the others read it:
//   filling, all 32 lanes:  empty.wait(parity); full.arrive_expect(bytes);
//                           full.copy(to, from, size, hint) any number of times, `bytes` in all;
//                           full.arrive_copies();
//   reading:                full.wait(parity); ... ; one lane: empty.arrive();
// StageBarrier<true> moves data by the bulk copy engine (sm_90), StageBarrier<false> by cp.async of 16 bytes per lane.
#pragma once

#include <cstdint>

#ifdef RIVER_EMULATION
#include "emulation/arch.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define RIVER_DEVICE __device__ __forceinline__

// Shared memory, in a form that emulation can give to a block of fibers: RIVER_SHARED(float, sums, [4][32]).
#define RIVER_SHARED(type, name, extents) __shared__ __align__(16) type name extents
#define RIVER_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define RIVER_SM90 1
#else
#define RIVER_SM90 0
#endif

namespace river::device {

RIVER_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// clang-format off: it would scatter the operands of inline PTX

// ---- tensor cores -----------------------------------------------------------------------------

// d[16 x 8] += a[16 x 16] * b[16 x 8], T x T -> fp32. With g = lane / 4, t = lane % 4 (16-bit pairs, low half first):
//   a0: row g, columns 2t, 2t+1;  a1: row g+8;  a2: row g, columns 2t+8, 2t+9;  a3: row g+8
//   b0: rows 2t, 2t+1 of column g;  b1: rows 2t+8, 2t+9        d0, d1: row g, columns 2t, 2t+1;  d2, d3: row g+8
template <class T>
RIVER_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define RIVER_MMA(T, name)                                                                                   \
  template <>                                                                                                \
  RIVER_DEVICE void mma_m16n8k16<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {         \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 "                                       \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                    \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                 \
  }
RIVER_MMA(__nv_bfloat16, "bf16")
RIVER_MMA(__half, "f16")
#undef RIVER_MMA

// ---- dependent launches (nothing on older chips, where launches are plain) -----------------------

// Lets the next kernel of the stream start, once a thread of every block has come here or every block has ended; it
// still waits for this kernel's end before it touches its results.
RIVER_DEVICE void dependency_trigger() {
#if RIVER_SM90
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns once all earlier kernels of the stream are complete and their writes visible.
RIVER_DEVICE void dependency_wait() {
#if RIVER_SM90
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- global memory ----------------------------------------------------------------------------

RIVER_DEVICE void prefetch_to_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// What kernels ahead, or other blocks of this one, wrote: from L2, as this SM's L1 may hold what was there before. It
// stays on its side of dependency_wait().
template <class T>
RIVER_DEVICE T load_written(const T* p) {
  if constexpr (sizeof(T) == 2) {  // CUDA's own of these types may be moved across the wait: it is no volatile asm
    const unsigned short bits = __ldcg(reinterpret_cast<const unsigned short*>(p));
    return reinterpret_cast<const T&>(bits);
  } else {
    return __ldcg(p);
  }
}

// What a kernel ahead may be writing at this moment: good for hints alone
RIVER_DEVICE int32_t load_hint(const int32_t* p) {
  int32_t v;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Before a counter says that this thread's writes are there, and after it said so of others'. Lighter than
// __threadfence(), which also orders everything among all threads.
RIVER_DEVICE void gpu_fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// For the host, which polls memory that both see
RIVER_DEVICE void store_release_system(uint32_t* p, uint32_t v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// ---- parts of a warp ----------------------------------------------------------------------------

// True for one lane of a whole warp. Where it guards bulk copies the compiler knows that one lane issues them; under
// lane_id() == 0 it puts a loop over the active lanes around each.
RIVER_DEVICE bool elect_one() {
#if RIVER_SM90
  uint32_t elected;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(elected)::"memory");
  return elected;
#else
  return threadIdx.x % 32 == 0;
#endif
}

// ---- parts of a block ---------------------------------------------------------------------------

// __syncthreads() for `threads` threads of the block (whole warps); id 1..15, 0 is __syncthreads itself.
RIVER_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// 0, 1, 2, ... from a counter in shared memory: every call gets its own
RIVER_DEVICE unsigned next_number(unsigned* counter) { return atomicAdd(counter, 1u); }

// ---- mbarriers and copies ---------------------------------------------------------------------

RIVER_DEVICE void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// Between mbarrier_init and the __syncthreads that lets others use the barriers
RIVER_DEVICE void mbarrier_init_fence() {
#if RIVER_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

RIVER_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(shared_address(barrier)) : "memory");
}

RIVER_DEVICE bool mbarrier_test(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
#if RIVER_SM90
#define RIVER_TEST "mbarrier.try_wait.parity.shared.b64"
#else
#define RIVER_TEST "mbarrier.test_wait.parity.shared.b64"
#endif
  asm volatile("{.reg .pred p; " RIVER_TEST " p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
#undef RIVER_TEST
  return done;
}

RIVER_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!mbarrier_test(barrier, parity)) {}
}

using CopyHint = uint64_t;  // how L2 shall treat what a copy reads

// Weights are read once per step: they must not push the activations and the cache out of L2.
RIVER_DEVICE CopyHint evict_first() {
  CopyHint hint;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(hint));
  return hint;
}

RIVER_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
#if RIVER_SM90
  asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;}"
               ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#endif
}

RIVER_DEVICE void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier, CopyHint hint) {
#if RIVER_SM90
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1], %2, [%3], %4;"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(hint) : "memory");
#endif
}

// Asks L2 for a piece of memory, any number of bytes in multiples of 16
RIVER_DEVICE void bulk_prefetch_to_l2(const void* p, uint32_t bytes) {
#if RIVER_SM90
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#endif
}
RIVER_DEVICE void bulk_prefetch_to_l2(const void* p, uint32_t bytes, CopyHint hint) {
#if RIVER_SM90
  asm volatile("cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %2;"
               ::"l"(p), "r"(bytes), "l"(hint) : "memory");
#endif
}

RIVER_DEVICE void async_copy16(void* to, const void* from, CopyHint hint) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
               ::"r"(shared_address(to)), "l"(from), "l"(hint) : "memory");
}

// One arrival at the barrier once this thread's earlier async_copy16 are complete
RIVER_DEVICE void async_copies_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// clang-format on

}  // namespace river::device
#endif  // RIVER_EMULATION

namespace river::device {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

RIVER_DEVICE int lane_id() { return threadIdx.x % kWarp; }
RIVER_DEVICE int warp_id() { return threadIdx.x / kWarp; }

template <class T>
RIVER_DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(kAllLanes, value, lanes);
}
template <class T>
RIVER_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
// Bit i: what lane i says. All lanes get it.
RIVER_DEVICE uint32_t ballot(bool value) { return __ballot_sync(kAllLanes, value); }

// Lies in shared memory. Whoever waits for the n-th use of a stage (from 0) waits with parity n % 2. In code for chips
// without bulk copies, StageBarrier<true> does what <false> does.
template <bool kWantBulk>
struct StageBarrier {
  static constexpr bool kBulk = kWantBulk && RIVER_SM90;

  uint64_t state;

  // By one thread, before mbarrier_init_fence and __syncthreads: as the barrier of a stage that copies fill ...
  RIVER_DEVICE void init_full() { mbarrier_init(&state, kBulk ? 1 : kWarp); }
  // ... or that `readers` arrivals empty. A first wait for "empty" passes with parity 1.
  RIVER_DEVICE void init_empty(int readers) { mbarrier_init(&state, readers); }

  RIVER_DEVICE void arrive() { mbarrier_arrive(&state); }
  RIVER_DEVICE void wait(uint32_t parity) { mbarrier_wait(&state, parity); }

  // Starts a stage. No lane may still wait for "empty" when the first one fills: two uses later its parity is back.
  RIVER_DEVICE void arrive_expect(uint32_t bytes) {
    __syncwarp();
    if constexpr (kBulk) {
      if (elect_one()) mbarrier_arrive_expect(&state, bytes);
    }
  }

  // By a whole warp with the same arguments; addresses and bytes are multiples of 16.
  RIVER_DEVICE void copy(void* to, const void* from, uint32_t bytes, CopyHint hint) {
    if constexpr (kBulk) {
      if (elect_one()) bulk_copy(to, from, bytes, &state, hint);
    } else {
      for (uint32_t i = 16 * lane_id(); i < bytes; i += 16 * kWarp)
        async_copy16(static_cast<char*>(to) + i, static_cast<const char*>(from) + i, hint);
    }
  }

  // Copies kRows pieces of `bytes`: piece r from the address that lane r holds, to `to` + r * stride.
  template <int kRows>
  RIVER_DEVICE void copy_rows(unsigned char* to, int stride, const void* from, uint32_t bytes, CopyHint hint) {
    const void* row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++)
      row[r] = reinterpret_cast<const void*>(shuffle(reinterpret_cast<uint64_t>(from), r));
    if constexpr (kBulk) {
      if (!elect_one()) return;
#pragma unroll
      for (int r = 0; r < kRows; r++) bulk_copy(to + r * stride, row[r], bytes, &state, hint);
    } else {
#pragma unroll
      for (int r = 0; r < kRows; r++) copy(to + r * stride, row[r], bytes, hint);
    }
  }

  RIVER_DEVICE void arrive_copies() {
    if constexpr (!kBulk) async_copies_arrive(&state);
  }
};

// What the lanes of a warp have, combined in a fixed order: every lane gets the same bits.
template <class T, class Combine>
RIVER_DEVICE T over_warp(T value, Combine combine) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = combine(value, shuffle_xor(value, lanes));
  return value;
}

RIVER_DEVICE float warp_max(float x) {
  return over_warp(x, [](float a, float b) { return fmaxf(a, b); });
}
RIVER_DEVICE float warp_sum(float x) {
  return over_warp(x, [](float a, float b) { return a + b; });
}

// True for the last of `count` blocks that call this; the counter wraps to 0 for the next launch. All threads call it.
// What a block wrote before is then visible to the last one, through load_written.
RIVER_DEVICE bool block_arrives_last(unsigned* counter, unsigned count) {
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    gpu_fence();  // after the barrier: it releases what all threads wrote
    last = atomicInc(counter, count - 1) == count - 1;
    gpu_fence();
  }
  return __syncthreads_or(last);
}

}  // namespace river::device
