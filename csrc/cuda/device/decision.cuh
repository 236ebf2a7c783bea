// The format of a layer's weights, decided on the device: dense, of the decoder block, or packed, of the exit layer
// (ExitDecision in river.h). The layer's first kernel, which reads the hidden rows for its norm anyway, also measures
// their similarity to the rows before and decides; every block does so in the same order, so all come to the same end.
// The layer's other kernels read what the first one wrote.
//
// A Decision has
//   guess()            by the copying warp, before the kernels ahead have ended: whether the weights will be packed;
//   decide(input, x)   by the readers, once they have ended: not 0 if the weights are packed;
//   load(input, x)     then: loads x, or what decide() has left to do of it.
#pragma once

#include "../../step_rules.h"
#include "activations.cuh"
#include "similarity.cuh"

namespace river::device {

// Of the kernels after the first
struct WrittenDecision {
  const int32_t* exited;  // [layers]
  int index;              // of the layer

  // The layer's own entry may not be written yet. It is zero between steps, and a token that has left stays outside.
  RIVER_DEVICE bool guess() const { return load_hint(exited + index) || (index > 0 && load_hint(exited + index - 1)); }

  template <class Input, class Activations>
  RIVER_DEVICE int decide(const Input&, const Activations&) const {
    return load_written(exited + index);  // on its way while the activations come
  }
  template <class Input, class Activations>
  RIVER_DEVICE void load(const Input& input, const Activations& x) const {
    input.load(x);
  }
};

// Of the first kernel
template <class T>
struct MeasuredDecision {
  ExitDecision d;
  Places places;

  RIVER_DEVICE bool guess() const { return d.index > 0 ? load_hint(d.exited + d.index - 1) : load_hint(d.limit) <= 0; }

  // Measures the rows, which x holds then as they came.
  template <class Activations>
  RIVER_DEVICE int decide(const NormalisedInput<T>& input, const Activations& x) const {
    RIVER_SHARED(float, bars, [kMaxRows]);
    const int limit = load_written(d.limit), left = d.index > 0 ? load_written(d.exited + d.index - 1) : 0;
    load_bars(bars, x.rows);
    bool all_agree = false;
    if (asks_rows(d.index, left)) all_agree = all_rows_agree(input, x, bars);
    else input.measure(x);
    const bool exits = runs_as_exit_layer(d.index, left, limit, all_agree);
    if (blockIdx.x == 0 && threadIdx.x == 0) d.exited[d.index] = exits;
    return exits;
  }
  template <class Activations>
  RIVER_DEVICE void load(const NormalisedInput<T>& input, const Activations& x) const {
    input.normalise(x);
  }

 private:
  // A row exits above its bar. They are asked for together with the other flags: one after the other, each where it is
  // needed, they would be four trips to L2.
  RIVER_DEVICE void load_bars(float (&bars)[kMaxRows], int rows) const {
    const int t = threadIdx.x;
    if (t >= rows) return;
    const int min_layers = load_written(d.min_layers + t);
    const float threshold = load_written(d.thresholds + t);
    const bool active = place_in_cache(places, t).active();
    bars[t] = exit_bar(active, threshold, d.index, min_layers);
  }

  // After a decoder block: the similarities of its input and its output, which are measured as input.measure(x) would.
  template <class Activations>
  RIVER_DEVICE bool all_rows_agree(const NormalisedInput<T>& input, const Activations& x,
                                   const float (&bars)[kMaxRows]) const {
    RIVER_SHARED(float, similarities, [kMaxRows]);
    measure_rows(
        static_cast<const T*>(d.previous), input.hidden, x.rows, x.in_features, similarities, x.squares,
        [] { barrier_sync(kReaderBarrier, kReaderThreads); },
        [&](int row, int column, const float (&chunk)[kChunk]) { x.keep(row, column, chunk); });
    bool all = true;
    for (int row = 0; row < x.rows; row++) all = all && row_agrees(similarities[row], bars[row]);
    if (blockIdx.x == 0 && int(threadIdx.x) < x.rows && place_in_cache(places, threadIdx.x).active())
      d.similarities[int64_t(d.index - 1) * x.rows + threadIdx.x] = similarities[threadIdx.x];
    return all;
  }
};

}  // namespace river::device
