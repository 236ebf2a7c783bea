// The path of a layer, decided on the device: decoder block or exit layer (ExitDecision in river.h). The layer's first
// kernel, which reads the hidden vector for its norm anyway, also computes the cosine that decides; every block does so
// in the same order, so all come to the same end. The layer's other kernels read what the first one wrote down.
#pragma once

#include "activations.cuh"

namespace river::device {

RIVER_DEVICE uint32_t load_flag(const int32_t* p) { return load_relaxed(reinterpret_cast<const uint32_t*>(p)); }

// Of the kernels after the first
struct DecidedPath {
  static constexpr bool kDense = true, kPacked = true;
  const int32_t* exited;  // [layers]
  int index;

  // The layer's own entry may not be written yet. It is zero between steps, and a token that has left stays outside.
  RIVER_DEVICE bool guess() const { return load_flag(exited + index) || (index > 0 && load_flag(exited + index - 1)); }
  template <class T>
  RIVER_DEVICE uint32_t decide(StreamInput<T>&) const { return load_flag(exited + index); }
};

// Of the first kernel
template <class T>
struct DecidingPath {
  static constexpr bool kDense = true, kPacked = true;
  ExitDecision d;
  const T* hidden;  // [T, hidden]
  Places places;
  int rows, hidden_size;

  RIVER_DEVICE bool guess() const { return d.index > 0 ? load_flag(d.exited + d.index - 1) : d.limit[0] <= 0; }

  RIVER_DEVICE uint32_t decide(StreamInput<T>& input) const {
    bool exits = d.index >= d.limit[0];
    if (d.index > 0) {
      input.measured = !load_flag(d.exited + d.index - 1);  // the layer before was a decoder block
      exits = !input.measured || all_rows_exit(input) || exits;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) d.exited[d.index] = exits;
    return exits;
  }

 private:
  RIVER_DEVICE bool all_rows_exit(StreamInput<T>& input) const {
    RIVER_SHARED(float, similarities, [kMaxRows]);
    measure_rows(
        static_cast<const T*>(d.previous), hidden, rows, hidden_size, similarities, input.squares,
        [] { barrier_sync(kReaderBarrier, kReaderThreads); },
        [&](int row, int column, const float(&values)[kStrip]) { input.keep(row, column, values); });
    bool all = true;
    for (int row = 0; row < rows; row++) {
      if (slot_in_cache(places, row) < 0) continue;
      all = all && similarities[row] > d.thresholds[row] && d.index >= d.min_layers[row];
      if (blockIdx.x == 0 && threadIdx.x == 0) d.similarities[int64_t(d.index - 1) * rows + row] = similarities[row];
    }
    return all;
  }
};

}  // namespace river::device
