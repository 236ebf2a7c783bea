// decoder_block: one backbone layer for T = 1..8 rows, five streaming or attending kernels (device/block.cuh) and the
// similarity. Weights are the checkpoint's own tensors.
#include "device/block.cuh"

namespace river::cuda {
namespace {

using namespace device;

template <class T>
struct DenseWeights {
  using Format = DenseFormat<T>;
  const DecoderBlockArgs& a;

  static const T* as(const void* p) { return static_cast<const T*>(p); }
  int inner() const { return a.intermediate_size; }
  QkvRows<T> qkv(const QkvOrder& order) const {
    return {as(a.q_proj), as(a.k_proj), as(a.v_proj), order, a.hidden_size};
  }
  MatrixRows<T> o() const { return {as(a.o_proj), a.hidden_size, a.num_heads * a.head_dim}; }
  GateUpRows<T> gate_up() const { return {as(a.gate_proj), as(a.up_proj), inner(), a.hidden_size}; }
  MatrixRows<T> down() const { return {as(a.down_proj), a.hidden_size, inner()}; }
};

}  // namespace

WorkspaceSize decoder_block_workspace(const DecoderBlockArgs& args) {
  return layer_workspace(args, args.intermediate_size);
}

void launch_decoder_block(const DecoderBlockArgs& args, const Workspace& workspace, Stream stream) {
  with_16bit_dtype(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch_layer<T>(args, DenseWeights<T>{args}, workspace, stream);
  });
}

}  // namespace river::cuda
