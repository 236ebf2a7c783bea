// lm_head and lm_head_w4: final norm and head for T = 1..8 rows, with the token chosen in the epilogue. A key orders
// logits and breaks ties to the lowest id, so that the largest key over all blocks, whatever their order, is the token.
#include "../sampling.h"
#include "device/stream.cuh"

namespace river::cuda {
namespace {

using namespace device;

// Above every other key: one logit that is NaN or infinite, and the row has no token
constexpr uint64_t kFailedKey = ~0ull;

template <class T>
struct LmHeadEpilogue : PlainEpilogue {
  struct State {
    uint64_t best, second;  // the largest keys that this thread has seen
    // of its row
    float temperature;
    uint64_t seed;
    int position;
  };

  LmHeadArgs a;
  // [8] each, of the type that atomicMax takes; zero before and after a launch, as the counter [1] is
  unsigned long long *keys, *second_keys;
  uint32_t* counter;

  RIVER_DEVICE State begin() const {
    const int t = row_of_thread();
    if (!a.temperature || t >= a.rows) return {};
    return {.best = 0,
            .second = 0,
            .temperature = a.temperature[t],
            .seed = uint64_t(a.seeds[t]),
            .position = load_written(a.positions + t)};
  }

  RIVER_DEVICE void finish(int strip, const StripTotals& totals, const Asked&, State& state) const {
    const int output_row = output_row_of_thread(), t = row_of_thread(), n = strip * kTileRows + output_row;
    if (output_row >= kTileRows || t >= a.rows || n >= a.vocab_size) return;
    const float logit = totals(output_row, t) / a.logits_scaling;
    if (a.logits) a.logits[int64_t(t) * a.vocab_size + n] = logit;
    const uint64_t key = is_finite(logit) ? token_key(score(logit, n, state), n) : kFailedKey;
    offer(key, state);
  }

  RIVER_DEVICE void end(State& state) const {
    for (int lanes = kMaxRows; lanes < kWarp; lanes *= 2) {  // lanes of a warp hold four output rows for each t
      const uint64_t other = shuffle_xor(state.best, lanes), other_second = shuffle_xor(state.second, lanes);
      offer(other, state);
      state.second = larger(state.second, other_second);
    }
    if (lane_id() < kMaxRows && state.best) {
      // Of this key and the largest so far the smaller one is a second key; whoever comes later sees the larger one.
      const uint64_t before = atomicMax(keys + lane_id(), state.best);
      atomicMax(second_keys + lane_id(), larger(state.second, smaller(before, state.best)));
    }
    if (!readers_arrive_last(counter, gridDim.x) || threadIdx.x >= kMaxRows) return;
    const uint64_t key = atomicExch(keys + threadIdx.x, 0ull), second = atomicExch(second_keys + threadIdx.x, 0ull);
    if (int(threadIdx.x) >= a.rows) return;
    const bool failed = key == kFailedKey;
    a.tokens[threadIdx.x] = failed ? kNoToken : token_of(key);
    const float other = second ? value_of(second) : float_of(0xff800000u);
    a.margins[threadIdx.x] = failed ? 0.f : margin_of(value_of(key), other);
  }

 private:
  static RIVER_DEVICE uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }
  static RIVER_DEVICE uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

  static RIVER_DEVICE void offer(uint64_t key, State& state) {
    state.second = larger(state.second, smaller(state.best, key));
    state.best = larger(state.best, key);
  }

  static RIVER_DEVICE float score(float logit, int n, const State& state) {
    if (!(state.temperature > 0)) return logit;
    return logit / fmaxf(state.temperature, kMinTemperature) + gumbel(state.seed, state.position, n);
  }
};

}  // namespace

WorkspaceSize lm_head_workspace(const LmHeadArgs& a) {
  const StreamShape shape(a.vocab_size, a.hidden_size);
  return {.partials = shape.partials(),
          .counters = shape.strips + 1 + 4 * kMaxRows + 1,  // strips, counter, keys (8-byte aligned)
          .scratch = 0};
}

void launch_lm_head(const LmHeadArgs& a, const Workspace& workspace, Stream stream) {
  with_16bit_dtype(a.dtype, [&]<class T>() {
    const StreamShape shape(a.vocab_size, a.hidden_size);
    const NormalisedInput<T> input{
        .hidden = static_cast<const T*>(a.hidden), .norm = static_cast<const T*>(a.norm), .eps = a.rms_norm_eps};
    auto* const keys = reinterpret_cast<unsigned long long*>(workspace.counters + round_up(shape.strips + 1, 2));
    const LmHeadEpilogue<T> epilogue{
        .a = a, .keys = keys, .second_keys = keys + kMaxRows, .counter = workspace.counters + shape.strips};
    const auto run = [&](const char* name, const auto& weight) {
      const StreamLaunch launch{.name = name, .shape = shape, .rows = a.rows, .workspace = workspace, .stream = stream};
      launch_stream<T>(launch, weight, input, epilogue);
    };
    const MatrixRows<T> dense{
        .weight = static_cast<const T*>(a.weight), .rows = a.vocab_size, .columns = a.hidden_size};
    if (a.packed) run("lm_head_w4", PackedTiles{.tiles = static_cast<const uint8_t*>(a.weight)});
    else run("lm_head", dense);
  });
}

}  // namespace river::cuda
