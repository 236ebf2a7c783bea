// decoder_block: one backbone layer for T = 1..8 rows, by the checkpoint's own tensors: the kernels of
// device/layer.cuh, then the similarity.
#include "device/layer.cuh"

namespace river::cuda {

using namespace device;

WorkspaceSize decoder_block_workspace(const DecoderBlockArgs& args) {
  return layer_workspace(args, args.intermediate_size);
}

void launch_decoder_block(const DecoderBlockArgs& args, const Workspace& workspace, Stream stream) {
  with_16bit_dtype(args.dtype, [&]<class T>() { launch_layer<T>(args, DenseWeights<T>{args}, workspace, stream); });
  launch_state_similarity(similarity_of(args), workspace, stream);
}

}  // namespace river::cuda
