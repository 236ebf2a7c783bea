// One instruction set's table of primitives. Compiled once per set with -DRIVER_ISA=<name> and its -m flags.
// No STL here: an inline library function compiled for one set must not be linked into another's path.
#include "kernels.h"

#include <math.h>

#include "linear.h"
#include "simd.h"

namespace {

void rms_norm(DType dtype, const void* x, const void* weight, float eps, int n, void* y) {
  Sum squares;
  for_lanes(dtype, x, n, [&](int64_t, f32x16 v) { squares.add(v, v); });
  const float inverse = 1.f / sqrtf(reduce(squares.all()) / (float)n + eps);
  for_lanes(dtype, x, n, [&](int64_t i, f32x16 v) {
    const f32x16 w = i + 16 <= n ? load_as_float(dtype, weight, i) : load_tail(dtype, weight, i, n);
    store_lanes(dtype, y, i, n, v * inverse * w);
  });
}

void swiglu(const float* gate, const float* up, float* out) {
  const f32x16 g = load<f32x16>(gate), e = vexp((f32x16)((u32x16)g | 0x80000000u));  // of -|g|: no overflow
  store(out, g * (g >= 0.f ? splat(1) : e) / (1.f + e) * load<f32x16>(up));
}

// 16 values of a head from index i, zero past head_dim. bf16 comes piece by piece: GCC would take a whole vector through
// memory.
template <DType D>
inline Values load_head(const void* head, int i, int head_dim) {
  if (i + 16 > head_dim) return load_tail(D, head, i, head_dim);
  if constexpr (D != DType::kBFloat16 || kPieces == 1) return load_as_float(D, head, i);
  using Half = uint16_t __attribute__((vector_size(kPieceBytes / 2)));
  Values v;
  RIVER_UNROLL for (int j = 0; j < kPieces; j++) {
    const auto half = load<Half>((const uint16_t*)head + i + 16 / kPieces * j);
    v.piece[j] = (Piece)(__builtin_convertvector(half, WordPiece) << 16);
  }
  return v;
}

constexpr int kHeads = 4;                // query heads at a time, and
constexpr int kBeside = kSums / kHeads;  // positions (scores) or vectors of 16 values beside them

// weight[g][p] = query head g . k of position p
template <DType D>
void score(const float* query, int group, int head_dim, const char* k, const int32_t* positions, int count,
           float (&weight)[river::kMaxGroup][river::cpu::kSplit]) {
  const int padded = (int)river::round_up(head_dim, 16);
  for (int p0 = 0; p0 < count; p0 += kBeside) {
    const char* head[kBeside];
    for (int p = 0; p < kBeside; p++)  // past the end: the last one again
      head[p] = k + positions[p0 + p < count ? p0 + p : count - 1] * (int64_t)head_dim * river::size_of(D);
    for (int g0 = 0; g0 < group; g0 += kHeads) {
      const float* q[kHeads];
      for (int g = 0; g < kHeads; g++) q[g] = query + (g0 + g < group ? g0 + g : group - 1) * padded;
      Sum sums[kSums];
      for (int i = 0; i < padded; i += 16) RIVER_UNROLL for (int p = 0; p < kBeside; p++) {
          const Values key = load_head<D>(head[p], i, head_dim);
          RIVER_UNROLL for (int g = 0; g < kHeads; g++) sums[p * kHeads + g].add(key, load<f32x16>(q[g] + i));
        }
      float dot[kSums];
      reduce_each(sums, dot);
      for (int p = 0; p < kBeside && p0 + p < count; p++)
        for (int g = 0; g < kHeads && g0 + g < group; g++) weight[g0 + g][p0 + p] = dot[p * kHeads + g];
    }
  }
}

// out[g].value = the sum over the positions p of weight[g][p] * v
template <DType D>
void weigh(const float (&weight)[river::kMaxGroup][river::cpu::kSplit], int group, int head_dim, const char* v,
           const int32_t* positions, int count, river::cpu::AttentionState* out, int64_t stride) {
  const int padded = (int)river::round_up(head_dim, 16);
  for (int i0 = 0; i0 < padded; i0 += 16 * kBeside)
    for (int g0 = 0; g0 < group; g0 += kHeads) {
      const float* w[kHeads];
      for (int g = 0; g < kHeads; g++) w[g] = weight[g0 + g < group ? g0 + g : group - 1];
      Sum sums[kSums];
      for (int p = 0; p < count; p++) {
        const char* head = v + positions[p] * (int64_t)head_dim * river::size_of(D);
        RIVER_UNROLL for (int j = 0; j < kBeside; j++) {
          if (i0 + 16 * j >= padded) continue;
          const Values value = load_head<D>(head, i0 + 16 * j, head_dim);
          RIVER_UNROLL for (int g = 0; g < kHeads; g++) sums[g * kBeside + j].add(value, w[g][p]);
        }
      }
      for (int g = 0; g < kHeads && g0 + g < group; g++)
        for (int j = 0; j < kBeside && i0 + 16 * j < padded; j++)
          store(out[(g0 + g) * stride].value + i0 + 16 * j, sums[g * kBeside + j].all());
    }
}

// k, v: one KV head of one slot, [max_len, head_dim]. query: [group, padded head_dim], already scaled.
// Two passes over the split: scores of all positions, then the weighted values.
template <DType D>
void attend_as(const float* query, int group, int head_dim, const char* k, const char* v, const int32_t* positions,
               int count, river::cpu::AttentionState* out, int64_t stride) {
  static_assert(river::cpu::kSplit % 16 == 0);
  alignas(64) float weight[river::kMaxGroup][river::cpu::kSplit];
  score<D>(query, group, head_dim, k, positions, count, weight);
  for (int g = 0; g < group; g++) {
    float max = weight[g][0];
    for (int p = 1; p < count; p++) max = weight[g][p] > max ? weight[g][p] : max;
    for (int p = count; p % 16 != 0; p++) weight[g][p] = -__builtin_inff();
    if (max == -__builtin_inff()) max = 0;  // all weights are then 0, and merge skips the split
    f32x16 sum{};
    for (int p = 0; p < count; p += 16) {
      const f32x16 e = vexp(load<f32x16>(weight[g] + p) - max);
      store(weight[g] + p, e);
      sum += e;
    }
    out[g * stride].max = max;
    out[g * stride].sum = reduce(sum);
  }
  weigh<D>(weight, group, head_dim, v, positions, count, out, stride);
}

void attend(DType dtype, const float* query, int group, int head_dim, const void* k, const void* v,
            const int32_t* positions, int count, river::cpu::AttentionState* out, int64_t stride) {
  auto as = [&]<DType D>() {
    attend_as<D>(query, group, head_dim, (const char*)k, (const char*)v, positions, count, out, stride);
  };
  switch (dtype) {
    case DType::kFloat32: return as.template operator()<DType::kFloat32>();
    case DType::kBFloat16: return as.template operator()<DType::kBFloat16>();
    case DType::kFloat16: return as.template operator()<DType::kFloat16>();
  }
}

void merge(const river::cpu::AttentionState* splits, int count, int head_dim, float* out) {
  const int padded = (int)river::round_up(head_dim, 16);
  float max = -__builtin_inff(), sum = 0;
  for (int s = 0; s < count; s++)
    if (splits[s].sum > 0 && splits[s].max > max) max = splits[s].max;
  memset(out, 0, padded * sizeof(float));
  for (int s = 0; s < count; s++) {
    const auto& split = splits[s];
    if (split.sum == 0) continue;  // saw nothing; NaN scores give a NaN sum and go on
    const float factor = vexp(splat(split.max - max))[0];
    sum += split.sum * factor;
    for (int i = 0; i < padded; i += 16) store(out + i, load<f32x16>(out + i) + load<f32x16>(split.value + i) * factor);
  }
  if (sum == 0) return;
  for (int i = 0; i < padded; i += 16) store(out + i, load<f32x16>(out + i) / sum);
}

// Exponents of two halves of a factor: applied one after the other they stay in range for any input.
struct Scaling {
  bool usable;  // false: a zero or non-finite vector
  float first = 1, second = 1;
};

// 1 where squares are safe, else the power of two that brings the largest magnitude to [1, 2).
Scaling safe_scaling(DType dtype, const void* x, int n) {
  f32x16 largest{}, check{};
  for_lanes(dtype, x, n, [&](int64_t, f32x16 v) {
    const f32x16 magnitude = (f32x16)((u32x16)v & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
    check += v * 0.f;  // NaN once any entry is not finite
  });
  float max = 0;
  for (int i = 0; i < 16; i++) max = largest[i] > max ? largest[i] : max;
  if (max == 0 || reduce(check) != 0) return {false};
  if (max >= 0x1p-40f && max <= 0x1p40f) return {true};
  const int exponent = -ilogbf(max);
  return {true, ldexpf(1.f, exponent / 2), ldexpf(1.f, exponent - exponent / 2)};
}

// Sums of 16 products each, added in order, so that a kernel that produces 16 rows at a time can keep one
// (dot, a, b) triple per chunk and get the same bits.
float similarity(DType dtype, const void* x, const void* y, int n) {
  const Scaling sx = safe_scaling(dtype, x, n), sy = safe_scaling(dtype, y, n);
  if (!sx.usable || !sy.usable) return 0;
  float dot = 0, a = 0, b = 0;
  for (int i = 0; i < n; i += 16) {
    const f32x16 u = load_as_float(dtype, x, i) * sx.first * sx.second;
    const f32x16 v = load_as_float(dtype, y, i) * sy.first * sy.second;
    dot += reduce(u * v);
    a += reduce(u * u);
    b += reduce(v * v);
  }
  const float cosine = dot / (sqrtf(a) * sqrtf(b));
  return cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;
}

void to_float(DType dtype, const void* x, float* y, int64_t n) {
  for_lanes(dtype, x, n, [&](int64_t i, f32x16 v) { store_lanes(DType::kFloat32, y, i, n, v); });
}

void from_float(DType dtype, const float* x, void* y, int64_t n) {
  for_lanes(DType::kFloat32, x, n, [&](int64_t i, f32x16 v) { store_lanes(dtype, y, i, n, v); });
}

}  // namespace

#define RIVER_JOIN_(a, b) a##b
#define RIVER_JOIN(a, b) RIVER_JOIN_(a, b)
#define RIVER_TEXT_(a) #a
#define RIVER_TEXT(a) RIVER_TEXT_(a)

namespace river::cpu {
extern const Kernels RIVER_JOIN(kernels_, RIVER_ISA);
const Kernels RIVER_JOIN(kernels_, RIVER_ISA) = {
    RIVER_TEXT(RIVER_ISA),
    rms_norm,
    prepare,
    dense_strip,
    w4_strip,
    swiglu,
    attend,
    merge,
    similarity,
    to_float,
    from_float,
};
}  // namespace river::cpu
