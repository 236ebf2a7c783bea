// dual_layer: one depth of the network by the path that the device decides on (device/exit_path.cuh): the kernels of
// decoder_block and exit_layer in one, so that a whole step can be captured once and never asks the host.
#include "device/decision.cuh"
#include "device/layer_weights.cuh"

namespace river::cuda {
namespace {

using namespace device;

template <class T>
struct DualWeights {
  DenseWeights<T> dense;
  PackedWeights packed;
  const ExitDecision& decision;

  template <class Rows>
  static DualWeight<Rows> both(const Rows& rows, const PackedTiles& tiles) {
    return {rows, tiles};
  }

  int inner() const { return dense.inner(); }
  auto qkv(const QkvOrder& order) const { return both(dense.qkv(order), packed.qkv(order)); }
  auto o() const { return both(dense.o(), packed.o()); }
  auto gate_up() const { return both(dense.gate_up(), packed.gate_up()); }
  auto down() const { return both(dense.down(), packed.down()); }
  DecidingPath<T> first_path() const {
    const BlockArgs& a = dense.a;
    return {decision,
            static_cast<const T*>(a.hidden),
            {a.slots, a.positions, a.num_slots, a.max_len},
            a.rows,
            a.hidden_size};
  }
  DecidedPath path() const { return {decision.exited, decision.index}; }
};

}  // namespace

WorkspaceSize dual_layer_workspace(const DualLayerArgs& args) { return decoder_block_workspace(args.block); }

void launch_dual_layer(const DualLayerArgs& args, const Workspace& workspace, Stream stream) {
  with_16bit_dtype(args.block.dtype, [&]<class T>() {
    const DualWeights<T> weights{{args.block}, {args.exit_layer}, args.decision};
    launch_layer<T>(args.block, weights, workspace, stream);
  });
}

}  // namespace river::cuda
