// dual_layer: one depth of the network, each row through the decoder block or the exit layer, as the device decides for
// it: the kernels of both in one (device/decided_stream.cuh), so that a whole step can be captured once and never asks
// the host.
#include "device/decided_stream.cuh"
#include "device/layer.cuh"

namespace river::cuda {
namespace {

using namespace device;

template <class T>
struct DualWeights {
  DenseWeights<T> dense;
  PackedWeights packed;
  const ExitDecision& decision;

  template <class Rows, class Decision>
  static DecidedWeight<Rows, Decision> both(const Rows& dense, const PackedTiles& packed, const Decision& decision) {
    return {.dense = dense, .packed = packed, .decision = decision};
  }
  ExitedRows exited() const { return {.exited = decision.exited, .places = places_of(dense.a)}; }
  MeasuredDecision<T> measured() const { return {.d = decision, .exited = exited()}; }
  WrittenDecision written() const { return {.exited = exited(), .index = decision.index}; }

  int channels() const { return dense.channels(); }
  auto qkv() const { return both(dense.qkv(), packed.qkv(), measured()); }
  auto o() const { return both(dense.o(), packed.o(), written()); }
  auto gate_up() const { return both(dense.gate_up(), packed.gate_up(), written()); }
  auto down() const { return both(dense.down(), packed.down(), written()); }
};

}  // namespace

WorkspaceSize dual_layer_workspace(const DualLayerArgs& args) { return decoder_block_workspace(args.block); }

void launch_dual_layer(const DualLayerArgs& args, const Workspace& workspace, Stream stream) {
  with_16bit_dtype(args.block.dtype, [&]<class T>() {
    const DualWeights<T> weights{.dense = {args.block}, .packed = {args.exit_layer}, .decision = args.decision};
    launch_layer<T>(args.block, weights, workspace, stream);
  });
}

}  // namespace river::cuda
