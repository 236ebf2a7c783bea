// The weights of one layer as launch_layer (layer.cuh) takes them: the checkpoint's tensors, or packed tiles. A strip
// holds its output rows in the packed orders of row_order.h; dense weights stay in checkpoint order, so their sources
// look up each row.
#pragma once

#include "../../row_order.h"
#include "formats.cuh"

namespace river::device {

template <class T>
struct QkvRows {
  const T *q, *k, *v;  // [heads * head_dim, columns], [kv_heads * head_dim, columns] x 2
  QkvOrder order;
  int columns;
  RIVER_DEVICE const T* row(int strip, int r) const {
    const QkvRow at = order.row(strip, r);
    if (at.head < 0) return nullptr;
    const T* matrix = at.kind == kQuery ? q : at.kind == kKey ? k : v;
    return matrix + (int64_t(at.head) * order.head_dim + at.dim) * columns;
  }
};

template <class T>
struct GateUpRows {
  const T *gate, *up;  // [channels, columns]
  int channels, columns;
  RIVER_DEVICE const T* row(int strip, int r) const {
    const GateUpRow at = gate_up_row(strip, r);
    return at.channel < channels ? (at.up ? up : gate) + int64_t(at.channel) * columns : nullptr;
  }
};

template <class T>
struct DenseWeights {
  const DecoderBlockArgs& a;

  static const T* as(const void* p) { return static_cast<const T*>(p); }
  int channels() const { return a.intermediate_size; }
  QkvRows<T> qkv() const {
    return {.q = as(a.q_proj), .k = as(a.k_proj), .v = as(a.v_proj), .order = QkvOrder(a), .columns = a.hidden_size};
  }
  MatrixRows<T> o() const {
    return {.weight = as(a.o_proj), .rows = a.hidden_size, .columns = a.num_heads * a.head_dim};
  }
  GateUpRows<T> gate_up() const {
    return {.gate = as(a.gate_proj), .up = as(a.up_proj), .channels = channels(), .columns = a.hidden_size};
  }
  MatrixRows<T> down() const { return {.weight = as(a.down_proj), .rows = a.hidden_size, .columns = channels()}; }
};

struct PackedWeights {
  const ExitLayerArgs& a;

  int channels() const { return int(gate_up_channels(a.gate_up_strips)); }
  PackedTiles qkv() const { return {a.qkv_proj}; }
  PackedTiles o() const { return {a.o_proj}; }
  PackedTiles gate_up() const { return {a.gate_up_proj}; }
  PackedTiles down() const { return {a.down_proj}; }
};

}  // namespace river::device
