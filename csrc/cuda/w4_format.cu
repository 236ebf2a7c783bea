// The W4 tile format on the GPU: pack, unpack, dequantise. The layout is described in river_ext/w4.py. One warp per
// tile; a lane owns the 16 columns at 16 t of the rows g and g + 8 (g = lane / 4, t = lane % 4), so a lane's 16 packed
// bytes and its 2 x 16 dense values are contiguous.
#include "device/launch.h"
#include "device/types.cuh"

namespace river::cuda {

using namespace river::device;

namespace {

constexpr int kThreads = 128;
constexpr int kLaneColumns = 16;
constexpr int kMetadata = 512;  // byte offset of the (scale, zero) pairs

struct TileShape {
  int out_features, in_features, column_tiles, group_tiles, groups;
  int64_t tiles;

  explicit TileShape(const W4Args& a)
      : out_features(a.out_features), in_features(a.in_features),
        column_tiles(static_cast<int>(ceil_div(a.in_features, kTileCols))), group_tiles(a.group_tiles),
        groups(static_cast<int>(ceil_div(column_tiles, a.group_tiles))),
        tiles(ceil_div(a.out_features, kTileRows) * column_tiles) {}
};

// Calls f(tile, its first row, its index along K), warp by warp
template <class F>
RIVER_DEVICE void for_tiles(const TileShape& shape, F f) {
  constexpr int kWarps = kThreads / kWarp;
  for (int64_t tile = blockIdx.x * kWarps + warp_id(); tile < shape.tiles; tile += gridDim.x * kWarps) {
    const int64_t n = tile / shape.column_tiles;
    f(tile, static_cast<int>(n) * kTileRows, static_cast<int>(tile - n * shape.column_tiles));
  }
}

// How much of a lane's 16 columns lies inside the weight, for the rows g and g + 8.
struct LanePlace {
  int row, column;  // of the first value
  bool vectors;     // rows are aligned, so that the 16 columns are wholly inside or outside
  TileShape shape;

  RIVER_DEVICE LanePlace(const TileShape& shape, int first_row, int k, int base_alignment)
      : row(first_row + lane_id() / 4), column(k * kTileCols + kLaneColumns * (lane_id() % 4)),
        vectors(shape.in_features % kLaneColumns == 0 && base_alignment % 16 == 0), shape(shape) {}

  RIVER_DEVICE int count(int half) const {  // of row g + 8 * half
    if (row + 8 * half >= shape.out_features) return 0;
    return max(0, min(kLaneColumns, shape.in_features - column));
  }
  RIVER_DEVICE int64_t offset(int half) const {
    return static_cast<int64_t>(row + 8 * half) * shape.in_features + column;
  }
};

template <class T>
RIVER_DEVICE int alignment(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16);
}

// Where a row's (scale, zero) of tile column k lies in the canonical form
RIVER_DEVICE int64_t group_index(const TileShape& shape, int row, int k) {
  return static_cast<int64_t>(row) * shape.groups + k / shape.group_tiles;
}

// Four values, a byte each (the first lowest), to and from their places in a word: see w4.py. Row g + 8 is 8 bits up.
RIVER_DEVICE uint32_t spread(uint32_t bytes) {
  return (bytes & 0xfu) | (bytes & 0xf00u) << 8 | (bytes & 0xf0000u) >> 12 | (bytes & 0xf000000u) >> 4;
}
RIVER_DEVICE uint32_t gather(uint32_t word) {
  return (word & 0xfu) | (word & 0xf0000u) >> 8 | (word & 0xf0u) << 12 | (word & 0xf00000u) << 4;
}

__global__ void __launch_bounds__(kThreads)
    pack_w4_kernel(const uint8_t* q, const uint16_t* scale, const uint16_t* zero, TileShape shape, uint8_t* packed) {
  dependency_wait();
  for_tiles(shape, [&](int64_t tile, int first_row, int k) {
    const LanePlace place(shape, first_row, k, alignment(q));
    uint32_t words[4] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint8_t* from = q + place.offset(half);
      const int count = place.count(half);
      uint32_t bytes[4] = {};
      if (place.vectors) {
        if (count > 0) {
          const uint4 v = *reinterpret_cast<const uint4*>(from);
          bytes[0] = v.x, bytes[1] = v.y, bytes[2] = v.z, bytes[3] = v.w;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kLaneColumns; i++)
          if (i < count) bytes[i / 4] |= static_cast<uint32_t>(from[i]) << (8 * (i % 4));
      }
#pragma unroll
      for (int j = 0; j < 4; j++) words[j] |= spread(bytes[j]) << (8 * half);
    }
    uint8_t* to = packed + tile * kTileBytes;
    reinterpret_cast<uint4*>(to)[lane_id()] = make_uint4(words[0], words[1], words[2], words[3]);
    if (lane_id() < kTileRows) {
      const int row = first_row + lane_id();
      uint32_t pair = 0;
      if (row < shape.out_features) {
        const int64_t group = group_index(shape, row, k);
        pair = scale[group] | static_cast<uint32_t>(zero[group]) << 16;
      }
      reinterpret_cast<uint32_t*>(to + kMetadata)[lane_id()] = pair;
    }
  });
}

__global__ void __launch_bounds__(kThreads)
    unpack_w4_kernel(const uint8_t* packed, TileShape shape, uint8_t* q, uint16_t* scale, uint16_t* zero) {
  dependency_wait();
  for_tiles(shape, [&](int64_t tile, int first_row, int k) {
    const LanePlace place(shape, first_row, k, alignment(q));
    const uint8_t* from = packed + tile * kTileBytes;
    const uint4 words = reinterpret_cast<const uint4*>(from)[lane_id()];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int shift = 8 * half;
      const uint32_t bytes[4] = {gather(words.x >> shift), gather(words.y >> shift), gather(words.z >> shift),
                                 gather(words.w >> shift)};
      uint8_t* to = q + place.offset(half);
      const int count = place.count(half);
      if (place.vectors) {
        if (count > 0) *reinterpret_cast<uint4*>(to) = make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
      } else {
#pragma unroll
        for (int i = 0; i < kLaneColumns; i++)
          if (i < count) to[i] = static_cast<uint8_t>(bytes[i / 4] >> (8 * (i % 4)));
      }
    }
    const int row = first_row + lane_id();
    if (lane_id() < kTileRows && row < shape.out_features && k % shape.group_tiles == 0) {
      const uint32_t pair = reinterpret_cast<const uint32_t*>(from + kMetadata)[lane_id()];
      const int64_t group = group_index(shape, row, k);
      scale[group] = static_cast<uint16_t>(pair);
      zero[group] = static_cast<uint16_t>(pair >> 16);
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads) dequantize_w4_kernel(const uint8_t* packed, TileShape shape, T* dense) {
  dependency_wait();
  for_tiles(shape, [&](int64_t tile, int first_row, int k) {
    const LanePlace place(shape, first_row, k, alignment(dense));
    const uint8_t* from = packed + tile * kTileBytes;
    const uint4 words = reinterpret_cast<const uint4*>(from)[lane_id()];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t pair = reinterpret_cast<const uint32_t*>(from + kMetadata)[lane_id() / 4 + 8 * half];
      const float2 metadata = to_float2<fp16>(pair);  // scale, zero
      const int shift = 8 * half;
      const uint32_t bytes[4] = {gather(words.x >> shift), gather(words.y >> shift), gather(words.z >> shift),
                                 gather(words.w >> shift)};
      float values[kLaneColumns];
#pragma unroll
      for (int i = 0; i < kLaneColumns; i++) {
        const auto level = static_cast<float>(bytes[i / 4] >> (8 * (i % 4)) & 15u);
        values[i] = (level - metadata.y) * metadata.x;
      }
      T* to = dense + place.offset(half);
      const int count = place.count(half);
      if (place.vectors) {
        if (count > 0) store16(to, values);
      } else {
#pragma unroll
        for (int i = 0; i < kLaneColumns; i++)
          if (i < count) to[i] = from_float<T>(values[i]);
      }
    }
  });
}

template <class... Parameters, class... Arguments>
void launch_tiles(const char* name, void (*kernel)(Parameters...), const TileShape& shape, Stream stream,
                  Arguments... arguments) {
  constexpr int kWarps = kThreads / kWarp, kBlocksPerSm = 8;
  const int64_t wanted = ceil_div(shape.tiles, kWarps), room = int64_t{kBlocksPerSm} * device_facts().sm_count;
  launch(kernel, static_cast<unsigned>(wanted < room ? wanted : room), kThreads, 0, stream, {.name = name, .pdl = true},
         arguments...);
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
