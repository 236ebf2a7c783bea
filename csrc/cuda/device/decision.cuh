// The path of each row through a layer, decided on the device: by the dense weights of the decoder block, or the packed
// ones of the exit layer (ExitDecision in river.h). The layer's first kernel, which reads the hidden rows for its norm
// anyway, also measures their similarity to the rows before and decides; every block does so in the same order, so all
// come to the same end. The layer's other kernels read what the first one wrote.
//
// Lane t of a warp speaks for row t. A Decision has
//   guess(rows) -> RowPath
//       by the copying warp, before the kernels ahead have ended: what may come;
//   decide(input, x) -> RowPath
//       by the readers, once they have ended;
//   load(input, x)
//       then: loads x, or what decide() has left to do of it.
#pragma once

#include "../../step_rules.h"
#include "activations.cuh"
#include "similarity.cuh"

namespace river::device {

// The path of one row. No lane speaks for a row past the last one, which so is not active.
struct RowPath {
  bool active, packed;
};

// The paths of all active rows, bit t for row t
struct RowPaths {
  uint32_t dense, packed;

  // By a whole warp, each lane with its own row
  RIVER_DEVICE explicit RowPaths(const RowPath& row)
      : dense(ballot(row.active && !row.packed)), packed(ballot(row.active && row.packed)) {}
};

// What was written of the layers so far
struct ExitedRows {
  const int32_t* exited;  // [layers, T]
  Places places;

  RIVER_DEVICE RowPath guess(int index, int rows) const {
    const int t = lane_id();
    if (t >= rows || load_hint(places.slots + t) < 0) return {};
    // The layer's own entries may not be written yet. They are zero between steps, and a row that has left stays
    // outside.
    const int32_t* own = exited + index * rows + t;
    return {.active = true, .packed = load_hint(own) || (index > 0 && load_hint(own - rows))};
  }

  // Without a branch, so that these loads and those that follow are under way together
  RIVER_DEVICE RowPath read(int index, int rows) const {
    const int t = min(lane_id(), rows - 1);
    const bool packed = index >= 0 && load_written(exited + index * rows + t);
    return {.active = place_in_cache(places, t).active() && lane_id() < rows, .packed = packed};
  }
};

// Of the kernels after the first
struct WrittenDecision {
  ExitedRows exited;
  int index;  // of the layer

  RIVER_DEVICE RowPath guess(int rows) const { return exited.guess(index, rows); }

  template <class Input, class Activations>
  RIVER_DEVICE RowPath decide(const Input&, const Activations& x) const {
    return exited.read(index, x.rows);  // on its way while the activations come
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
  ExitedRows exited;

  RIVER_DEVICE RowPath guess(int rows) const {
    if (d.index > 0) return exited.guess(d.index - 1, rows);
    const int t = lane_id();
    if (t >= rows || load_hint(exited.places.slots + t) < 0) return {};
    return {.active = true, .packed = load_hint(d.limit + t) <= 0};
  }

  // Measures the rows, which x holds then as they came.
  template <class Activations>
  RIVER_DEVICE RowPath decide(const NormalisedInput<T>& input, const Activations& x) const {
    RIVER_SHARED(float, similarities, [kMaxRows]);
    const int t = min(lane_id(), x.rows - 1);
    const RowPath before = exited.read(d.index - 1, x.rows);
    const float bar = load_bar(t);
    const bool measures = d.index > 0 && RowPaths(before).dense;  // a similarity is of a decoder block
    if (measures) measure_similarities(input, x, similarities);
    else input.measure(x);
    const bool agrees = before.active && row_agrees(before.packed, measures ? similarities[t] : 0.f, bar);
    const bool all_agree = !ballot(before.active && !agrees);
    const bool exits = before.active && row_exits(before.packed, agrees, d.together, all_agree);
    if (blockIdx.x == 0 && int(threadIdx.x) < x.rows) {
      d.exited[d.index * x.rows + t] = exits;
      if (measures && before.active && !before.packed) d.similarities[(d.index - 1) * x.rows + t] = similarities[t];
    }
    return {.active = before.active, .packed = exits};
  }
  template <class Activations>
  RIVER_DEVICE void load(const NormalisedInput<T>& input, const Activations& x) const {
    input.normalise(x);
  }

 private:
  // Asked for together with the other flags: where it is needed, it would be a trip to L2 more.
  RIVER_DEVICE float load_bar(int t) const {
    const int min_layers = load_written(d.min_layers + t), limit = load_written(d.limit + t);
    return exit_bar(load_written(d.thresholds + t), d.index, min_layers, limit);
  }

  // After a decoder block: the similarities of its input and its output, which are measured as input.measure(x) would.
  template <class Activations>
  RIVER_DEVICE void measure_similarities(const NormalisedInput<T>& input, const Activations& x,
                                         float (&similarities)[kMaxRows]) const {
    measure_rows(
        static_cast<const T*>(d.previous), input.hidden, x.rows, x.in_features, similarities, x.squares,
        [] { barrier_sync(kReaderBarrier, kReaderThreads); },
        [&](int row, int column, const float (&chunk)[kChunk]) { x.keep(row, column, chunk); });
  }
};

}  // namespace river::device
