// exit_layer: the W4 twin of a decoder block for T = 1..8 rows, the same phases (device/block.cuh) over packed tiles.
#include "device/block.cuh"

namespace river::cuda {
namespace {

using namespace device;

int inner_of(const ExitLayerArgs& a) { return a.gate_up_tiles * kTileRows / 2; }

template <class T>
struct PackedWeights {
  using Format = W4Format<T>;
  const ExitLayerArgs& a;

  int inner() const { return inner_of(a); }
  PackedTiles qkv(const QkvOrder&) const { return {a.qkv_proj}; }
  PackedTiles o() const { return {a.o_proj}; }
  PackedTiles gate_up() const { return {a.gate_up_proj}; }
  PackedTiles down() const { return {a.down_proj}; }
};

}  // namespace

WorkspaceSize exit_layer_workspace(const ExitLayerArgs& args) { return layer_workspace(args, inner_of(args)); }

void launch_exit_layer(const ExitLayerArgs& args, const Workspace& workspace, Stream stream) {
  with_16bit_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch_layer<T>(args, PackedWeights<T>{args}, workspace, stream);
  });
}

}  // namespace river::cuda
