// read_ring: reads `bytes` through the ring of device/ring.cuh, by one copying warp and eight readers as every
// streaming kernel. Stage i of the data belongs to block i mod grid. A reader touches 16 bytes per lane of each stage,
// so what is measured is the copies and their barriers: the most that a kernel on this ring can reach.
#include "read_ring.h"

#include <algorithm>

#include "device/ring.cuh"

namespace river::cuda {
namespace {

using namespace device;

// Budget: 288 threads, 112 registers
template <bool kBulk>
__global__ void __launch_bounds__(kStreamThreads, 2)
    read_ring_kernel(ReadRingArgs args,  // data [bytes]; checksums [grid]
                     bool prefetch) {    // copies before the kernels ahead have ended
  RIVER_DYNAMIC_SHARED(memory);
  RIVER_SHARED(Ring<kBulk>, ring, [1]);
  RIVER_SHARED(uint32_t, sums, [kReaders]);
  dependency_trigger();
  ring[0].init(args.stages);
  __syncthreads();
  Cursor cursor(args.stages);
  const int64_t first = int64_t(blockIdx.x) * args.stage_bytes, step = int64_t(gridDim.x) * args.stage_bytes;
  auto bytes_at = [&](int64_t start) { return int(min(int64_t(args.stage_bytes), args.bytes - start)); };
  if (warp_id() == kReaders) {
    if (!prefetch) dependency_wait();
    const CopyHint hint = evict_first();
    for (int64_t start = first; start < args.bytes; start += step, cursor.next()) {
      auto& full = ring[0].full[cursor.stage];
      unsigned char* stage = memory + cursor.stage * args.stage_bytes;
      const int bytes = bytes_at(start);
      ring[0].wait_until_empty(cursor);
      full.arrive_expect(bytes);
      for (int i = 0; i < bytes; i += args.copy_bytes)
        full.copy(stage + i, args.data + start + i, min(args.copy_bytes, bytes - i), hint);
      full.arrive_copies();
    }
    if (prefetch) dependency_wait();
    return;
  }
  dependency_wait();
  uint32_t sum = 0;
  for (int64_t start = first; start < args.bytes; start += step, cursor.next()) {
    const int mine = 16 * threadIdx.x;
    ring[0].wait_until_full(cursor);
    if (mine < bytes_at(start)) {
      const uint4 word = *reinterpret_cast<const uint4*>(memory + cursor.stage * args.stage_bytes + mine);
      sum ^= word.x ^ word.y ^ word.z ^ word.w;
    }
    ring[0].release(cursor);
  }
  sum = over_warp(sum, [](uint32_t a, uint32_t b) { return a ^ b; });
  if (lane_id() == 0) sums[warp_id()] = sum;
  barrier_sync(kReaderBarrier, kReaderThreads);
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kReaders; warp++) sum ^= sums[warp];
  args.checksums[blockIdx.x] = sum;
}

void require(bool ok, const char* name, int64_t value, const std::string& accepted) {
  if (!ok)
    throw std::runtime_error("read_ring: " + std::string(name) + " is " + std::to_string(value) + ", expected " +
                             accepted);
}

}  // namespace

void launch_read_ring(const ReadRingArgs& a, const Workspace& workspace, Stream stream) {
  auto multiple_of_16 = [](const char* name, int64_t value) {
    require(value > 0 && value % 16 == 0, name, value, "a positive multiple of 16");
  };
  multiple_of_16("bytes", a.bytes);
  multiple_of_16("stage_bytes", a.stage_bytes);
  multiple_of_16("copy_bytes", a.copy_bytes);
  require(a.stages >= 1 && a.stages <= kMaxStages, "stages", a.stages, "1 to " + std::to_string(kMaxStages));
  require(a.blocks_per_sm == 1 || a.blocks_per_sm == 2, "blocks_per_sm", a.blocks_per_sm, "1 or 2");
  const int fixed = sizeof(Ring<true>) + 1024;  // the system takes 1 KB per block
  const int limit = device_facts().shared_memory_per_block;
  const int room = (a.blocks_per_sm == 2 ? std::min(kBlockBytes, limit) : limit) - fixed;
  const int64_t ring_bytes = int64_t(a.stages) * a.stage_bytes;
  require(ring_bytes <= room, "stages * stage_bytes", ring_bytes, "at most " + std::to_string(room));
  const bool bulk = workspace.overlap != Overlap::kNone && device_facts().arch >= 90;
  const LaunchOptions options{.name = "read_ring", .pdl = bulk};
  const bool prefetch = workspace.overlap == Overlap::kPrefetch && bulk;
  auto run = [&](auto kernel) {
    launch(kernel, workspace.blocks * a.blocks_per_sm, kStreamThreads, ring_bytes, stream, options, a, prefetch);
  };
  if (bulk) run(read_ring_kernel<true>);
  else run(read_ring_kernel<false>);
}

}  // namespace river::cuda
