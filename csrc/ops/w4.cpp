// pack_w4, unpack_w4 and dequantize_w4: the W4 format.
#include <algorithm>
#include <tuple>
#include <utility>

#include "dispatch.h"

namespace river::ops {
namespace {

// On a CPU: levels are 0 to 15, scales and zeros finite.
void check_levels(const Requirements& check, const W4Args& a) {
  const int64_t columns = a.in_features, groups = ceil_div(column_tiles_of(columns), a.group_tiles);
  for (int64_t i = 0; i < a.out_features * columns; i++)
    check.require(a.q[i] <= 15, "q[", i / columns, ", ", i % columns, "] is ", int(a.q[i]), ", expected 0 to 15");
  for (const auto& [name, bits] : {std::pair("scale", a.scale), std::pair("zero", a.zero)})
    for (int64_t i = 0; i < a.out_features * groups; i++)
      check.require((bits[i] & 0x7c00) != 0x7c00, name, "[", i / groups, ", ", i % groups, "] is not finite");
}

Tensor pack_w4(const Tensor& q, const Tensor& scale, const Tensor& zero) {
  Check check("pack_w4", "q", q);
  check.tensor("q", q, ScalarType::Byte, {kAny, kAny});
  W4Args args{};
  args.out_features = check.size("out_features of q", q.size(0));
  args.in_features = check.size("in_features of q", q.size(1));
  check.tensor("scale", scale, ScalarType::Half, {args.out_features, kAny});
  const int64_t groups = scale.size(1), tiles = column_tiles_of(args.in_features);
  check.require(groups >= 1 && groups <= tiles, "scale has ", groups, " groups for ", args.in_features,
                " columns, expected 1 to ", tiles, " (groups of at least ", kTileCols, " columns)");
  args.group_tiles = int(ceil_div(tiles, groups));
  check.require(ceil_div(tiles, args.group_tiles) == groups, "scale has ", groups, " groups for ", args.in_features,
                " columns, expected a number that groups of a multiple of ", kTileCols, " give");
  check.tensor("zero", zero, ScalarType::Half, {args.out_features, groups});
  args.q = const_cast<uint8_t*>(data<uint8_t>(q));
  args.scale = const_cast<uint16_t*>(data<uint16_t>(scale));
  args.zero = const_cast<uint16_t*>(data<uint16_t>(zero));
  const Tensor packed = check.output({strips_of(args.out_features), tiles, kTileBytes}, ScalarType::Byte);
  args.packed = mutable_data<uint8_t>(packed);
  launch(check, args, check_levels, cpu::launch_pack_w4, [&](auto& gpu) { cuda::launch_pack_w4(args, gpu.stream()); });
  return packed;
}

RIVER_OP(pack_w4, "(Tensor q, Tensor scale, Tensor zero) -> Tensor", TORCH_BOX(&pack_w4))

// What unpack_w4 and dequantize_w4 read.
W4Args packed_args(Check& check, const Tensor& packed, int64_t out_features, int64_t in_features) {
  W4Args args{};
  args.out_features = check.size("out_features", out_features);
  args.in_features = check.size("in_features", in_features);
  args.packed = const_cast<uint8_t*>(check.tiles("packed", packed, strips_of(out_features), in_features));
  return args;
}

std::tuple<Tensor, Tensor, Tensor> unpack_w4(const Tensor& packed, int64_t out_features, int64_t in_features,
                                             int64_t group_size) {
  Check check("unpack_w4", "packed", packed);
  W4Args args = packed_args(check, packed, out_features, in_features);
  check.require(group_size >= kTileCols && group_size % kTileCols == 0, "group_size is ", group_size,
                ", expected a multiple of ", kTileCols);
  group_size = std::min(group_size, round_up(in_features, kTileCols));
  args.group_tiles = int(group_size / kTileCols);
  const int64_t groups = ceil_div(in_features, group_size);
  const Tensor q = check.output({out_features, in_features}, ScalarType::Byte);
  const Tensor scale = check.output({out_features, groups}, ScalarType::Half);
  const Tensor zero = check.output({out_features, groups}, ScalarType::Half);
  args.q = mutable_data<uint8_t>(q);
  args.scale = mutable_data<uint16_t>(scale);
  args.zero = mutable_data<uint16_t>(zero);
  launch(check, args, any_values, cpu::launch_unpack_w4,
         [&](auto& gpu) { cuda::launch_unpack_w4(args, gpu.stream()); });
  return {q, scale, zero};
}

RIVER_OP(unpack_w4, "(Tensor packed, int out_features, int in_features, int group_size=64) -> (Tensor, Tensor, Tensor)",
         TORCH_BOX(&unpack_w4))

Tensor dequantize_w4(const Tensor& packed, int64_t out_features, int64_t in_features, ScalarType dtype) {
  Check check("dequantize_w4", "packed", packed);
  W4Args args = packed_args(check, packed, out_features, in_features);
  args.group_tiles = 1;
  args.dtype = check.dense_dtype("dtype", dtype);
  const Tensor dense = check.output({out_features, in_features}, dtype);
  args.dense = mutable_data(dense);
  launch(check, args, any_values, cpu::launch_dequantize_w4,
         [&](auto& gpu) { cuda::launch_dequantize_w4(args, gpu.stream()); });
  return dense;
}

RIVER_OP(dequantize_w4, "(Tensor packed, int out_features, int in_features, ScalarType dtype) -> Tensor",
         TORCH_BOX(&dequantize_w4))

}  // namespace
}  // namespace river::ops
