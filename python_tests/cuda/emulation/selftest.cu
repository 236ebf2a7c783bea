// The emulator's own tests: small kernels, each right, and with one planted bug that must be noticed (by an error, or
// by results that differ between schedules). All write `out`, [kBlocks * kThreads] unless noted, expected: i at i.
#include <cstring>

#include "cuda/device/launch.h"
#include "cuda/device/types.cuh"
#include "selftest.h"

namespace river::emulation {

using namespace river::device;

namespace {

constexpr int kBlocks = 4, kThreads = 64, kStages = 2, kRounds = 5;

RIVER_DEVICE int global_index() { return blockIdx.x * kThreads + threadIdx.x; }

template <bool kBroken>
__global__ void block_order(float* out) {  // broken: reads what the block before wrote
  const int i = global_index();
  out[i] = kBroken && i >= kThreads ? out[i - kThreads] + kThreads : i;
}

template <bool kBroken>
__global__ void missing_syncthreads(float* out) {
  RIVER_SHARED(float, values, [kThreads]);
  values[threadIdx.x ^ 33] = blockIdx.x * kThreads + (threadIdx.x ^ 33);
  if (!kBroken) __syncthreads();
  out[global_index()] = values[threadIdx.x];
}

template <bool kBroken>
__global__ void shared_overrun(float* out) {
  RIVER_DYNAMIC_SHARED(bytes);
  auto* values = reinterpret_cast<float*>(bytes);
  values[threadIdx.x + kBroken] = global_index();
  __syncthreads();
  out[global_index()] = kBroken ? global_index() : values[threadIdx.x];
}

template <bool kBroken>
__global__ void global_overrun(float* out) {
  out[global_index()] = global_index();
  if (kBroken && global_index() == kBlocks * kThreads - 1) out[kBlocks * kThreads] = 1;
}

template <bool kBroken>
__global__ void uninitialised_shared(float* out) {
  RIVER_SHARED(float, bias, [1]);
  if (!kBroken && threadIdx.x == 0) bias[0] = 0;
  __syncthreads();
  out[global_index()] = global_index() + bias[0];
}

template <bool kBroken>
__global__ void divergent_shuffle(float* out) {
  float value = global_index() ^ 1;
  if (!kBroken || lane_id() < 16) value = shuffle_xor(value, 1);
  out[global_index()] = value;
}

template <bool kBroken>
__global__ void shuffle_mask(float* out) {
  float value = global_index() ^ 1;
  if (lane_id() < 16) value = __shfl_xor_sync(kBroken ? 0xffff0000u : 0x0000ffffu, value, 1);
  else value = global_index();
  out[global_index()] = value;
}

template <bool kBroken>
__global__ void divergent_barrier(float* out) {
  if (kBroken && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[global_index()] = global_index();
}

template <bool kBroken>
__global__ void return_before_barrier(float* out) {
  out[global_index()] = global_index();
  if (kBroken && threadIdx.x >= 32) return;
  __syncthreads();
}

template <bool kBroken>
__global__ void endless_wait(float* out) {  // broken: one arrival too few
  RIVER_SHARED(StageBarrier<true>, barrier, [1]);
  if (threadIdx.x == 0) barrier[0].init_empty(kThreads);
  __syncthreads();
  if (!kBroken || threadIdx.x != 0) barrier[0].arrive();
  barrier[0].wait(0);
  out[global_index()] = global_index();
}

__global__ void double_the_input(const float* in, float* doubled) {
  dependency_trigger();
  dependency_wait();
  doubled[global_index()] = 2 * in[global_index()];
}

template <bool kBroken>
__global__ void missing_dependency_wait(const float* doubled, float* out) {
  if (!kBroken) dependency_wait();
  const float value = doubled[global_index()];
  if (kBroken) dependency_wait();  // too late
  out[global_index()] = value / 2;
}

// Broken: believes that a kernel two launches back is surely done.
template <bool kBroken>
__global__ void early_read_of_older_kernel(const float* doubled, float* out) {
  dependency_trigger();
  float value = kBroken ? doubled[global_index()] : 0;
  dependency_wait();
  if (!kBroken) value = doubled[global_index()];
  out[global_index()] = value / 2;
}

__global__ void do_nothing() {
  dependency_trigger();
  dependency_wait();
}

template <bool kBroken>
__global__ void no_dependency_wait(float* out) {
  if (!kBroken) dependency_wait();
  out[global_index()] = global_index();
}

// Broken: the block with the highest index adds the partial sums, done or not.
template <bool kBroken>
__global__ void last_arriver(float* out, float* partial, unsigned* counter) {
  partial[global_index()] = 1;
  const bool last = block_arrives_last(counter, kBlocks);
  if (kBroken ? blockIdx.x != kBlocks - 1 : !last) return;
  float sum = 0;
  for (int block = 0; block < kBlocks; block++) sum += load_written(partial + block * kThreads + threadIdx.x);
  for (int block = 0; block < kBlocks; block++)
    out[block * kThreads + threadIdx.x] = block * kThreads + threadIdx.x + sum - kBlocks;
}

enum class Ring { kRight, kNoFullWait, kNoEmptyWait, kNoExpect };

// A warp streams `weights` [blocks, rounds, 32] through a ring, the other one adds up the rounds.
template <bool kBulk, Ring kBug>
__global__ void ring(const float* weights, float* out) {
  RIVER_SHARED(StageBarrier<kBulk>, full, [kStages]);
  RIVER_SHARED(StageBarrier<kBulk>, empty, [kStages]);
  RIVER_DYNAMIC_SHARED(stages);
  constexpr int kBytes = 32 * sizeof(float);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; s++) full[s].init_full(), empty[s].init_empty(1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warp_id() == 0) {
    const CopyHint hint = evict_first();
    for (int i = 0; i < kRounds; i++) {
      const int s = i % kStages, use = i / kStages;
      if (kBug != Ring::kNoEmptyWait) empty[s].wait((use + 1) % 2);
      if (kBug == Ring::kNoExpect) full[s].arrive_expect(0);
      else full[s].arrive_expect(kBytes);
      full[s].copy(stages + s * kBytes, weights + (blockIdx.x * kRounds + i) * 32, kBytes, hint);
      full[s].arrive_copies();
    }
  } else {
    float sum = 0;
    for (int i = 0; i < kRounds; i++) {
      const int s = i % kStages, use = i / kStages;
      if (kBug != Ring::kNoFullWait) full[s].wait(use % 2);
      sum += reinterpret_cast<const float*>(stages + s * kBytes)[lane_id()];
      __syncwarp();
      if (lane_id() == 0) empty[s].arrive();
    }
    out[blockIdx.x * kThreads + lane_id()] = blockIdx.x * kThreads + lane_id() + (sum - kRounds * (kRounds + 1) / 2);
    out[blockIdx.x * kThreads + 32 + lane_id()] = blockIdx.x * kThreads + 32 + lane_id();
  }
  for (int s = 0; s < kStages; s++)  // no copy may outlive the block
    if (kBug != Ring::kRight) full[s].wait((kRounds - 1 - s) / kStages % 2);
}

// d [16, 8] = a [16, 16] * b [16, 8], fragments by the table in device/arch.cuh
template <class T>
__global__ void mma(const T* a, const T* b, float* d) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  uint32_t fa[4], fb[2];
  float fd[4] = {};
  for (int i = 0; i < 4; i++) {
    const T* p = a + (g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2);
    fa[i] = pair(p[0], p[1]);
  }
  for (int i = 0; i < 2; i++) {
    const T* p = b + (2 * t + 8 * i) * 8 + g;
    fb[i] = pair(p[0], p[8]);
  }
  mma_m16n8k16<T>(fd, fa, fb);
  for (int i = 0; i < 4; i++) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = fd[i];
}

template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), const char* name, Arguments... arguments) {
  launch(kernel, kBlocks, kThreads, kThreads * sizeof(float), nullptr, {.name = name}, arguments...);
}

template <bool kBroken>
bool run_planted(const char* name, float* out, float* scratch) {
  const auto is = [&](const char* other) { return strcmp(name, other) == 0; };
  const LaunchOptions pdl{.name = name, .pdl = true};
  for (int i = 0; i < kScratch; i++) scratch[i] = -1;
  auto* counter = reinterpret_cast<uint32_t*>(scratch);
  counter[0] = 0;
  if (is("block_order")) run(block_order<kBroken>, name, out);
  else if (is("missing_syncthreads")) run(missing_syncthreads<kBroken>, name, out);
  else if (is("shared_overrun")) run(shared_overrun<kBroken>, name, out);
  else if (is("global_overrun")) run(global_overrun<kBroken>, name, out);
  else if (is("uninitialised_shared")) run(uninitialised_shared<kBroken>, name, out);
  else if (is("divergent_shuffle")) run(divergent_shuffle<kBroken>, name, out);
  else if (is("shuffle_mask")) run(shuffle_mask<kBroken>, name, out);
  else if (is("divergent_barrier")) run(divergent_barrier<kBroken>, name, out);
  else if (is("return_before_barrier")) run(return_before_barrier<kBroken>, name, out);
  else if (is("last_arriver")) run(last_arriver<kBroken>, name, out, scratch + 1, counter);
  else if (is("endless_wait")) run(endless_wait<kBroken>, name, out);
  else if (is("no_dependency_wait")) launch(no_dependency_wait<kBroken>, kBlocks, kThreads, 0, nullptr, pdl, out);
  else if (is("missing_dependency_wait")) {
    for (int i = 0; i < kBlocks * kThreads; i++) out[i] = i;
    launch(double_the_input, kBlocks, kThreads, 0, nullptr, pdl, out, scratch);
    launch(missing_dependency_wait<kBroken>, kBlocks, kThreads, 0, nullptr, pdl, scratch, out);
  } else if (is("early_read_of_older_kernel")) {
    for (int i = 0; i < kBlocks * kThreads; i++) out[i] = i;
    launch(double_the_input, kBlocks, kThreads, 0, nullptr, pdl, out, scratch);
    launch(do_nothing, kBlocks, kThreads, 0, nullptr, pdl);
    launch(early_read_of_older_kernel<kBroken>, kBlocks, kThreads, 0, nullptr, pdl, scratch, out);
  } else {
    return false;
  }
  return true;
}

template <bool kBulk>
bool run_ring(const char* bug, float* out, float* scratch) {
  for (int i = 0; i < kBlocks * kRounds * 32; i++) scratch[i] = i / 32 % kRounds + 1;
  const auto is = [&](const char* other) { return strcmp(bug, other) == 0; };
  if (is("")) run(ring<kBulk, Ring::kRight>, "ring", scratch, out);
  else if (is("no full wait")) run(ring<kBulk, Ring::kNoFullWait>, "ring", scratch, out);
  else if (is("no empty wait")) run(ring<kBulk, Ring::kNoEmptyWait>, "ring", scratch, out);
  else if (is("no expect")) run(ring<kBulk, Ring::kNoExpect>, "ring", scratch, out);
  else return false;
  return true;
}

}  // namespace

bool launch_planted(const char* name, bool broken, float* out, float* scratch) {
  return broken ? run_planted<true>(name, out, scratch) : run_planted<false>(name, out, scratch);
}

bool launch_ring(const char* bug, bool bulk, float* out, float* scratch) {
  return bulk ? run_ring<true>(bug, out, scratch) : run_ring<false>(bug, out, scratch);
}

void launch_mma(DType dtype, const void* a, const void* b, float* d) {
  with_16bit_dtype(dtype, [&]<class T>() {
    launch(mma<T>, 1, 32, 0, nullptr, {.name = "mma"}, static_cast<const T*>(a), static_cast<const T*>(b), d);
  });
}

}  // namespace river::emulation
