// The path of a layer, decided on the device: decoder block or exit layer (ExitDecision in river.h). The layer's first
// kernel, which reads the hidden vector for its norm anyway, also computes the cosine that decides; every block does so
// in the same order, so all come to the same end. The layer's other kernels read what the first one wrote down.
#pragma once

#include "activations.cuh"
#include "similarity.cuh"

namespace river::device {

// Of the kernels after the first
struct DecidedPath {
  static constexpr bool kDense = true, kPacked = true;
  const int32_t* exited;  // [layers]
  int index;

  // The layer's own entry may not be written yet. It is zero between steps, and a token that has left stays outside.
  RIVER_DEVICE bool guess() const { return load_hint(exited + index) || (index > 0 && load_hint(exited + index - 1)); }
  template <class T>
  RIVER_DEVICE uint32_t decide(StreamInput<T>&) const {
    return load_written(exited + index);
  }
};

// Of the first kernel
template <class T>
struct DecidingPath {
  static constexpr bool kDense = true, kPacked = true;
  ExitDecision d;
  const T* hidden;  // [T, hidden]
  Places places;
  int rows, hidden_size;

  RIVER_DEVICE bool guess() const { return d.index > 0 ? load_hint(d.exited + d.index - 1) : load_hint(d.limit) <= 0; }

  RIVER_DEVICE uint32_t decide(StreamInput<T>& input) const {
    RIVER_SHARED(float, bars, [kMaxRows]);  // a row exits above its bar
    const int limit = load_written(d.limit), left = d.index > 0 ? load_written(d.exited + d.index - 1) : 1;
    load_bars(bars);
    bool exits = d.index >= limit || (d.index > 0 && left);
    input.measured = !left;  // the layer before was a decoder block
    if (input.measured) exits = all_rows_exit(input, bars) || exits;
    if (blockIdx.x == 0 && threadIdx.x == 0) d.exited[d.index] = exits;
    return exits;
  }

 private:
  // Asked for together with the other flags: one after the other, each where it is needed, they would be four trips to L2.
  RIVER_DEVICE void load_bars(float (&bars)[kMaxRows]) const {
    const int t = threadIdx.x;
    if (t >= rows) return;
    const int min_layers = load_written(d.min_layers + t);
    const float threshold = load_written(d.thresholds + t);
    const bool active = place_in_cache(places, t).active();
    bars[t] = !active ? -INFINITY : d.index < min_layers ? INFINITY : threshold;
  }

  RIVER_DEVICE bool all_rows_exit(StreamInput<T>& input, const float (&bars)[kMaxRows]) const {
    RIVER_SHARED(float, similarities, [kMaxRows]);
    measure_rows(
        static_cast<const T*>(d.previous), hidden, rows, hidden_size, similarities, input.squares,
        [] { barrier_sync(kReaderBarrier, kReaderThreads); },
        [&](int row, int column, const float (&values)[kChunk]) { input.keep(row, column, values); });
    bool all = true;
    for (int row = 0; row < rows; row++) all = all && similarities[row] > bars[row];
    if (blockIdx.x == 0 && int(threadIdx.x) < rows && place_in_cache(places, threadIdx.x).active())
      d.similarities[int64_t(d.index - 1) * rows + threadIdx.x] = similarities[threadIdx.x];
    return all;
  }
};

}  // namespace river::device
