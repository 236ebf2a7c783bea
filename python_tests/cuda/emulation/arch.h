// device/arch.cuh under emulation: a CPU twin of every PTX wrapper. Those stay declarations of what an instruction
// does; that the wrapper's own PTX is right only a GPU can show.
#pragma once

#include <utility>

#include "cuda.h"

#define RIVER_DEVICE inline
#define RIVER_SM90 1

// Both name memory of the running block; each place in the source is its own variable.
#define RIVER_SHARED(type, name, extents) \
  static const char name##_site = 0;      \
  using name##_type = type extents;       \
  name##_type& name =                     \
      *reinterpret_cast<name##_type*>(::river::emulation::shared_memory(&name##_site, sizeof(name##_type)))
#define RIVER_DYNAMIC_SHARED(name) unsigned char* name = ::river::emulation::dynamic_shared_memory()

namespace river::device {

template <class T>
inline float mma_value(uint16_t bits) {
  if constexpr (std::is_same_v<T, __half>) return __half2float({bits});
  else return __bfloat162float({bits});
}

// The whole warp's m16n8k16: a slot holds a lane's a[4], b[2], d[4], and is replaced by its new d[4].
template <class T>
void combine_mma(emulation::Collective& c) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4;
    uint32_t words[10];
    memcpy(words, c.slots[lane], sizeof(words));
    for (int i = 0; i < 4; i++)
      for (int half = 0; half < 2; half++)
        a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = mma_value<T>(words[i] >> (16 * half));
    for (int i = 0; i < 2; i++)
      for (int half = 0; half < 2; half++) b[2 * t + 8 * i + half][g] = mma_value<T>(words[4 + i] >> (16 * half));
    for (int i = 0; i < 4; i++) d[g + 8 * (i / 2)][2 * t + i % 2] = std::bit_cast<float>(words[6 + i]);
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) memcpy(c.slots[lane] + 4 * i, &d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2], 4);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  uint32_t mine[10] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  memcpy(mine + 6, d, sizeof(d));
  auto& c = emulation::join(0xffffffffu, "mma_m16n8k16", line, mine, sizeof(mine), combine_mma<T>);
  memcpy(d, c.slots[emulation::current->lane], sizeof(d));
  emulation::leave(c);
}

inline void dependency_trigger() {}  // dependents start as early as possible in any case
inline void dependency_wait() { emulation::wait_for_dependency(); }

inline void prefetch_to_l2(const void*) {}
template <class T>
T load_written(const T* p) {
  emulation::note_load(p, sizeof(T));
  return *p;
}
inline int32_t load_hint(const int32_t* p) { return *p; }
inline void store_release_system(uint32_t* p, uint32_t v) { *p = v; }
inline void gpu_fence() {}

inline bool elect_one() { return threadIdx.x % 32 == 0; }

inline void barrier_sync(int id, int threads, int line = __builtin_LINE()) {
  emulation::sync_block(id, threads, "barrier_sync", line, false);
}

inline unsigned next_number(unsigned* counter) { return (*counter)++; }

inline void mbarrier_init(uint64_t* barrier, int count) { emulation::mbarrier_init(barrier, count); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* barrier) { emulation::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) { emulation::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) { emulation::mbarrier_wait(barrier, parity); }

using CopyHint = uint64_t;
inline CopyHint evict_first() { return 0; }

inline void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier, CopyHint) {
  emulation::start_copy({{to, from, bytes}}, barrier, bytes);
}
inline void bulk_prefetch_to_l2(const void* p, uint32_t bytes, CopyHint = {}) { emulation::check_prefetch(p, bytes); }
inline void async_copy16(void* to, const void* from, CopyHint) {
  emulation::current->async_copies.push_back({to, from, 16});
}
inline void async_copies_arrive(uint64_t* barrier) {
  emulation::start_copy(std::exchange(emulation::current->async_copies, {}), barrier, 0);
}

}  // namespace river::device
