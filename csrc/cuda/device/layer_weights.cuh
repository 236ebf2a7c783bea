// The weights of one layer as launch_layer (block.cuh) takes them: in the checkpoint's tensors, or in packed tiles.
#pragma once

#include "block.cuh"

namespace river::device {

template <class T>
struct DenseWeights {
  const DecoderBlockArgs& a;

  static const T* as(const void* p) { return static_cast<const T*>(p); }
  int inner() const { return a.intermediate_size; }
  QkvRows<T> qkv(const QkvOrder& order) const {
    return {as(a.q_proj), as(a.k_proj), as(a.v_proj), order, a.hidden_size};
  }
  MatrixRows<T> o() const { return {as(a.o_proj), a.hidden_size, a.num_heads * a.head_dim}; }
  GateUpRows<T> gate_up() const { return {as(a.gate_proj), as(a.up_proj), inner(), a.hidden_size}; }
  MatrixRows<T> down() const { return {as(a.down_proj), a.hidden_size, inner()}; }
  DensePath first_path() const { return {}; }
  DensePath path() const { return {}; }
};

struct PackedWeights {
  const ExitLayerArgs& a;

  int inner() const { return a.gate_up_tiles * kTileRows / 2; }
  PackedTiles qkv(const QkvOrder&) const { return {a.qkv_proj}; }
  PackedTiles o() const { return {a.o_proj}; }
  PackedTiles gate_up() const { return {a.gate_up_proj}; }
  PackedTiles down() const { return {a.down_proj}; }
  PackedPath first_path() const { return {}; }
  PackedPath path() const { return {}; }
};

}  // namespace river::device
