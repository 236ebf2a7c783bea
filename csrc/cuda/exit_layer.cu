// exit_layer: the W4 twin of a decoder block for T = 1..8 rows: the same kernels (device/layer.cuh) over packed tiles.
#include "device/layer.cuh"

namespace river::cuda {

using namespace device;

WorkspaceSize exit_layer_workspace(const ExitLayerArgs& args) {
  return layer_workspace(args, PackedWeights{args}.channels());
}

void launch_exit_layer(const ExitLayerArgs& args, const Workspace& workspace, Stream stream) {
  with_16bit_dtype(args.dtype, [&]<class T>() { launch_layer<T>(args, PackedWeights{args}, workspace, stream); });
  launch_state_similarity(similarity_of(args), workspace, stream);
}

}  // namespace river::cuda
