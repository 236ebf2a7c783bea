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
    uint64_t best;  // the largest key that this thread has seen
    // of its row
    float temperature;
    uint64_t seed;
    int position;
  };

  LmHeadArgs a;
  unsigned long long* keys;  // [8], of the type that atomicMax takes; zero before and after a launch
  uint32_t* counter;         // [1], the same

  RIVER_DEVICE State begin() const {
    const int t = row_of_thread();
    if (!a.temperature || t >= a.rows) return {};
    return {.best = 0,
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
    state.best = key > state.best ? key : state.best;
  }

  RIVER_DEVICE void end(State& state) const {
    uint64_t& best = state.best;
    for (int lanes = kMaxRows; lanes < kWarp; lanes *= 2) {  // lanes of a warp hold four output rows for each t
      const uint64_t other = shuffle_xor(best, lanes);
      best = other > best ? other : best;
    }
    if (lane_id() < kMaxRows && best) atomicMax(keys + lane_id(), best);
    if (!readers_arrive_last(counter, gridDim.x) || threadIdx.x >= kMaxRows) return;
    const uint64_t key = atomicExch(keys + threadIdx.x, 0ull);
    if (int(threadIdx.x) >= a.rows) return;
    a.tokens[threadIdx.x] = key == kFailedKey ? kNoToken : token_of(key);
  }

 private:
  static RIVER_DEVICE float score(float logit, int n, const State& state) {
    if (!(state.temperature > 0)) return logit;
    return logit / fmaxf(state.temperature, kMinTemperature) + gumbel(state.seed, state.position, n);
  }
};

}  // namespace

WorkspaceSize lm_head_workspace(const LmHeadArgs& a) {
  const StreamShape shape(a.vocab_size, a.hidden_size);
  return {.partials = shape.partials(),
          .counters = shape.strips + 1 + 2 * kMaxRows + 1,  // strips, counter, keys (8-byte aligned)
          .scratch = 0};
}

void launch_lm_head(const LmHeadArgs& a, const Workspace& workspace, Stream stream) {
  with_16bit_dtype(a.dtype, [&]<class T>() {
    const StreamShape shape(a.vocab_size, a.hidden_size);
    const NormalisedInput<T> input{
        .hidden = static_cast<const T*>(a.hidden), .norm = static_cast<const T*>(a.norm), .eps = a.rms_norm_eps};
    const LmHeadEpilogue<T> epilogue{
        .a = a,
        .keys = reinterpret_cast<unsigned long long*>(workspace.counters + round_up(shape.strips + 1, 2)),
        .counter = workspace.counters + shape.strips};
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
