// pack_w4, unpack_w4, dequantize_w4: between the canonical form of a W4 weight, its packed tiles, and a dense weight.
// The layout of a tile is described in river_ext/quant/w4.py.
//
// A warp has a tile. A lane has the 16 columns from 16 t on of output rows g and g + 8 of it (g = lane / 4, t = lane %
// 4): its 16 packed bytes lie together, and so do its 16 dense values of each output row, so that it moves whole
// vectors.
#include <algorithm>

#include "device/launch.h"
#include "device/types.cuh"

namespace river::cuda {
namespace {

using namespace device;

constexpr int kThreads = 128;
constexpr int kLaneColumns = 16;

struct TileShape {
  int out_features, in_features, column_tiles, group_tiles, groups;
  int64_t tiles;

  explicit TileShape(const W4Args& a)
      : out_features(a.out_features), in_features(a.in_features), column_tiles(int(ceil_div(a.in_features, kTileCols))),
        group_tiles(a.group_tiles), groups(int(ceil_div(column_tiles, a.group_tiles))),
        tiles(ceil_div(a.out_features, kTileRows) * column_tiles) {}

  // Where the (scale, zero) of an output row and tile column k lies in the canonical form
  RIVER_DEVICE int64_t group_index(int row, int k) const { return int64_t(row) * groups + k / group_tiles; }
};

// Calls f(tile, its first output row, its tile column) for the tiles of this warp.
template <class F>
RIVER_DEVICE void for_tiles(const TileShape& shape, F f) {
  constexpr int kWarps = kThreads / kWarp;
  for (int64_t tile = blockIdx.x * kWarps + warp_id(); tile < shape.tiles; tile += gridDim.x * kWarps) {
    const int64_t strip = tile / shape.column_tiles;
    f(tile, int(strip) * kTileRows, int(tile - strip * shape.column_tiles));
  }
}

// Which part of a row-major weight [out, in] is a lane's. `half` chooses between output rows g (0) and g + 8 (1).
struct LanePlace {
  int row, column;  // of the first value of output row g
  bool vectors;     // rows are aligned, so that the 16 columns are wholly inside or outside
  TileShape shape;

  RIVER_DEVICE LanePlace(const TileShape& shape, int first_row, int k, const void* weight)
      : row(first_row + lane_id() / 4), column(k * kTileCols + kLaneColumns * (lane_id() % 4)),
        vectors(shape.in_features % kLaneColumns == 0 && reinterpret_cast<uintptr_t>(weight) % 16 == 0), shape(shape) {}

  // How many of the 16 columns lie inside
  RIVER_DEVICE int count(int half) const {
    if (row + 8 * half >= shape.out_features) return 0;
    return max(0, min(kLaneColumns, shape.in_features - column));
  }
  RIVER_DEVICE int64_t offset(int half) const { return int64_t(row + 8 * half) * shape.in_features + column; }
};

// ---- the 16 values of a lane in one output row, a byte each --------------------------------------

// Four values, the first in the lowest byte, to and from their places in a word; those of row g + 8 are 8 bits up.
RIVER_DEVICE uint32_t spread(uint32_t bytes) {
  return (bytes & 0xfu) | (bytes & 0xf00u) << 8 | (bytes & 0xf0000u) >> 12 | (bytes & 0xf000000u) >> 4;
}
RIVER_DEVICE uint32_t gather(uint32_t word) {
  return (word & 0xfu) | (word & 0xf0000u) >> 8 | (word & 0xf0u) << 12 | (word & 0xf00000u) << 4;
}

RIVER_DEVICE uint4 gather_half(const uint4& words, int half) {
  const int shift = 8 * half;
  return make_uint4(gather(words.x >> shift), gather(words.y >> shift), gather(words.z >> shift),
                    gather(words.w >> shift));
}

// Zeros outside of the weight
RIVER_DEVICE uint4 load_bytes(const uint8_t* q, const LanePlace& place, int half) {
  const uint8_t* from = q + place.offset(half);
  const int count = place.count(half);
  if (place.vectors) return count > 0 ? *reinterpret_cast<const uint4*>(from) : uint4{};
  uint32_t bytes[4] = {};
#pragma unroll
  for (int i = 0; i < kLaneColumns; i++)
    if (i < count) bytes[i / 4] |= uint32_t(from[i]) << (8 * (i % 4));
  return make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
}

RIVER_DEVICE void store_bytes(uint8_t* q, const LanePlace& place, int half, const uint4& values) {
  uint8_t* to = q + place.offset(half);
  const int count = place.count(half);
  if (place.vectors) {
    if (count > 0) *reinterpret_cast<uint4*>(to) = values;
    return;
  }
  const uint32_t bytes[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int i = 0; i < kLaneColumns; i++)
    if (i < count) to[i] = uint8_t(bytes[i / 4] >> (8 * (i % 4)));
}

template <class T>
RIVER_DEVICE void store_dense(T* dense, const LanePlace& place, int half, const float (&values)[kLaneColumns]) {
  T* to = dense + place.offset(half);
  const int count = place.count(half);
  if (place.vectors) {
    if (count > 0) store16(to, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneColumns; i++)
    if (i < count) to[i] = from_float<T>(values[i]);
}

// ---- kernels ------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    pack_w4_kernel(const uint8_t* q,                             // [out, in]
                   const uint16_t* scale, const uint16_t* zero,  // fp16 [out, groups]
                   TileShape shape,
                   uint8_t* packed) {  // [out / 16, in / 64, 576]
  dependency_wait();
  for_tiles(shape, [&](int64_t tile, int first_row, int k) {
    const LanePlace place(shape, first_row, k, q);
    const uint4 low = load_bytes(q, place, 0), high = load_bytes(q, place, 1);
    const auto word = [](uint32_t a, uint32_t b) { return spread(a) | spread(b) << 8; };
    uint8_t* to = packed + tile * kTileBytes;
    reinterpret_cast<uint4*>(to)[lane_id()] =
        make_uint4(word(low.x, high.x), word(low.y, high.y), word(low.z, high.z), word(low.w, high.w));
    if (lane_id() >= kTileRows) return;
    const int row = first_row + lane_id();
    uint32_t metadata = 0;
    if (row < shape.out_features) {
      const int64_t group = shape.group_index(row, k);
      metadata = scale[group] | uint32_t(zero[group]) << 16;
    }
    reinterpret_cast<uint32_t*>(to + kTileMetadata)[lane_id()] = metadata;
  });
}

__global__ void __launch_bounds__(kThreads) unpack_w4_kernel(const uint8_t* packed,  // [out / 16, in / 64, 576]
                                                             TileShape shape,
                                                             uint8_t* q,                         // [out, in]
                                                             uint16_t* scale, uint16_t* zero) {  // fp16 [out, groups]
  dependency_wait();
  for_tiles(shape, [&](int64_t tile, int first_row, int k) {
    const LanePlace place(shape, first_row, k, q);
    const uint8_t* from = packed + tile * kTileBytes;
    const uint4 words = reinterpret_cast<const uint4*>(from)[lane_id()];
#pragma unroll
    for (int half = 0; half < 2; half++) store_bytes(q, place, half, gather_half(words, half));
    const int row = first_row + lane_id();
    if (lane_id() >= kTileRows || row >= shape.out_features || k % shape.group_tiles != 0) return;
    const uint32_t metadata = reinterpret_cast<const uint32_t*>(from + kTileMetadata)[lane_id()];
    const int64_t group = shape.group_index(row, k);
    scale[group] = uint16_t(metadata);
    zero[group] = uint16_t(metadata >> 16);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_w4_kernel(const uint8_t* packed,  // [out / 16, in / 64, 576]
                                                                 TileShape shape,
                                                                 T* dense) {  // [out, in]
  dependency_wait();
  for_tiles(shape, [&](int64_t tile, int first_row, int k) {
    const LanePlace place(shape, first_row, k, dense);
    const uint8_t* from = packed + tile * kTileBytes;
    const uint4 words = reinterpret_cast<const uint4*>(from)[lane_id()];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t metadata = reinterpret_cast<const uint32_t*>(from + kTileMetadata)[lane_id() / 4 + 8 * half];
      const auto [scale, zero] = to_float2<fp16>(metadata);
      const uint4 levels = gather_half(words, half);
      const uint32_t bytes[4] = {levels.x, levels.y, levels.z, levels.w};
      float values[kLaneColumns];
#pragma unroll
      for (int i = 0; i < kLaneColumns; i++) {
        const auto level = float(bytes[i / 4] >> (8 * (i % 4)) & 15u);
        values[i] = (level - zero) * scale;
      }
      store_dense(dense, place, half, values);
    }
  });
}

template <class... Parameters, class... Arguments>
void launch_tiles(const char* name, void (*kernel)(Parameters...), const TileShape& shape, Stream stream,
                  Arguments... arguments) {
  constexpr int kWarps = kThreads / kWarp, kBlocksPerSm = 8;
  const auto room = int64_t(kBlocksPerSm) * device_facts().sm_count;
  const auto blocks = unsigned(std::min(ceil_div(shape.tiles, kWarps), room));
  launch(kernel, blocks, kThreads, 0, stream, {.name = name, .pdl = true}, arguments...);
}

}  // namespace

void launch_pack_w4(const W4Args& args, Stream stream) {
  const TileShape shape(args);
  launch_tiles("pack_w4", pack_w4_kernel, shape, stream, args.q, args.scale, args.zero, shape, args.packed);
}

void launch_unpack_w4(const W4Args& args, Stream stream) {
  const TileShape shape(args);
  launch_tiles("unpack_w4", unpack_w4_kernel, shape, stream, args.packed, shape, args.q, args.scale, args.zero);
}

void launch_dequantize_w4(const W4Args& args, Stream stream) {
  const TileShape shape(args);
  with_dtype(args.dtype, [&]<class T>() {
    launch_tiles("dequantize_w4", dequantize_w4_kernel<T>, shape, stream, args.packed, shape,
                 static_cast<T*>(args.dense));
  });
}

}  // namespace river::cuda
