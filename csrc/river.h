// The contract between the kernels and everything else: an Args struct per op, a launcher per op and backend, raw
// pointers and ints. No torch here, nor in any file outside csrc/ops/. Shapes stand beside the pointers; T = rows.
// Comments say which pointers may be null, and which are written to. CPU launchers take a Parallel (how to use the
// caller's threads), CUDA launchers a workspace and a stream.
#pragma once

#include <cstdint>

#include "cuda/variants.h"

struct CUstream_st;  // a cudaStream_t points to one

namespace river {

constexpr int kMaxRows = 8;         // rows (tokens in flight) of one step
constexpr int kTileRows = 16;       // a W4 tile has 16 output rows
constexpr int kTileCols = 64;       // and 64 input columns:
constexpr int kTileMetadata = 512;  // 512 bytes of nibbles, and behind them
constexpr int kTileBytes = 576;     // fp16 scale and zero of each output row; river_ext/quant/w4.py says more
constexpr int kMaxHeadDim = 256;
constexpr int kMaxGroup = 64;  // query heads per KV head
constexpr int kNoToken = -1;   // of a row of which a logit is NaN or infinite

enum class DType { kFloat32, kBFloat16, kFloat16 };  // the model dtype; CUDA: the last two

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ---- layers -----------------------------------------------------------------------------------------

struct AttentionArgs {
  DType dtype;  // of query, caches and out
  int rows, num_heads, num_kv_heads, head_dim, num_slots, max_len;
  float softmax_scale;       // of the scores, before the softmax
  int64_t sliding_window;    // positions a row sees, itself included; 0 = all
  const void* query;         // [T, heads, head_dim], rotated
  const void* k_cache;       // [slots, kv_heads, max_len, head_dim]
  const void* v_cache;       // the same
  const int32_t* slots;      // [T], -1 = inactive
  const int32_t* positions;  // [T]
  const bool* kv_valid;      // [slots, max_len] or null = all
  void* out;                 // [T, heads, head_dim], written; zeros where a row sees nothing
};

struct StateSimilarityArgs {
  DType dtype;
  int rows, hidden_size;
  const void *x, *y;  // [T, hidden]
  float* out;         // [T], written
};

// What decoder_block and exit_layer share
struct BlockArgs {
  DType dtype;  // of everything that is void here
  int rows, hidden_size, num_heads, num_kv_heads, head_dim;
  int rotary_dim;  // leading dims of a head that rotate
  int num_slots, max_len;
  float rms_norm_eps, softmax_scale;
  float residual_multiplier;             // of what attention and feed-forward part add to hidden
  int64_t sliding_window;                // positions a row sees, itself included; 0 = all
  const void* hidden;                    // [T, hidden]
  const void* input_layernorm;           // [hidden]
  const void* post_attention_layernorm;  // [hidden]
  const void* q_bias;                    // [heads * head_dim] or null
  const void *k_bias, *v_bias;           // [kv_heads * head_dim] or null
  const void* o_bias;                    // [hidden] or null
  const void *q_norm, *k_norm;           // [head_dim]; both or none
  const float *cos, *sin;                // [max_len, rotary_dim / 2]
  const float* query_scale;              // [max_len] or null: factor of a query, by its position
  const int32_t* slots;                  // [T], -1 = inactive
  const int32_t* positions;              // [T]
  const bool* kv_valid;                  // [slots, max_len] or null = all
  void *k_cache, *v_cache;               // [slots, kv_heads, max_len, head_dim]: K and V of active rows are written
  void* out;                             // [T, hidden], written
  float* similarity;                     // [T], written: of hidden and out
};

// The attention of a layer. query and out: [T, heads, head_dim]
inline AttentionArgs attention_of(const BlockArgs& a, const void* query, void* out) {
  return {.dtype = a.dtype,
          .rows = a.rows,
          .num_heads = a.num_heads,
          .num_kv_heads = a.num_kv_heads,
          .head_dim = a.head_dim,
          .num_slots = a.num_slots,
          .max_len = a.max_len,
          .softmax_scale = a.softmax_scale,
          .sliding_window = a.sliding_window,
          .query = query,
          .k_cache = a.k_cache,
          .v_cache = a.v_cache,
          .slots = a.slots,
          .positions = a.positions,
          .kv_valid = a.kv_valid,
          .out = out};
}

// The similarity of a layer's input and output
inline StateSimilarityArgs similarity_of(const BlockArgs& a) {
  return {
      .dtype = a.dtype, .rows = a.rows, .hidden_size = a.hidden_size, .x = a.hidden, .y = a.out, .out = a.similarity};
}

struct DecoderBlockArgs : BlockArgs {
  int intermediate_size;
  const void* q_proj;               // [heads * head_dim, hidden]
  const void *k_proj, *v_proj;      // [kv_heads * head_dim, hidden]
  const void* o_proj;               // [hidden, heads * head_dim]
  const void *gate_proj, *up_proj;  // [intermediate, hidden]
  const void* down_proj;            // [hidden, intermediate]
};

struct ExitLayerArgs : BlockArgs {  // packed weights: [strips, in / 64, 576], both rounded up
  int gate_up_strips;               // of gate_up_proj, 8 intermediate channels each
  const uint8_t* qkv_proj;          // in = hidden; rows in the order of row_order.h, as those of gate_up_proj
  const uint8_t* o_proj;            // in = heads * head_dim
  const uint8_t* gate_up_proj;      // in = hidden
  const uint8_t* down_proj;         // in = intermediate
};

// What decides each row's path through layer `index`, by the exit rule of step_rules.h: exit layer or decoder block
struct ExitDecision {
  int index;
  bool together;            // the active rows leave the backbone at the same layer, or none does
  const void* previous;     // [T, hidden], the input of layer index - 1, whose output is the input here; null: index 0
  const float* thresholds;  // [T]
  const int32_t* min_layers;  // [T], backbone layers before a row may exit
  const int32_t* limit;       // [T], backbone layers that a row may run
  int32_t* exited;  // [layers, T]: entries of index - 1 are read, those of index written: 1 = exit layer, 0 = decoder
                    // block, or the row is inactive
  float* similarities;  // [layers, T]: of index - 1, those of rows that ran it as a decoder block are written
};

// One depth of the network, each row by the path that the device chooses for it. Both members hold the same BlockArgs,
// without `similarity`: the next depth measures it where it decides.
struct DualLayerArgs {
  DecoderBlockArgs block;
  ExitLayerArgs exit_layer;
  ExitDecision decision;
};

// ---- tokens -----------------------------------------------------------------------------------------

struct LmHeadArgs {
  DType dtype;
  bool packed;  // the weight is W4 tiles, of which those past the vocabulary are padding; else dense
  int rows, hidden_size, vocab_size;
  float rms_norm_eps;
  float logits_scaling;      // logits are divided by it
  const void* hidden;        // [T, hidden]
  const void* norm;          // [hidden]
  const void* weight;        // [vocab, hidden], or packed [vocab / 16, hidden / 64, 576], both rounded up
  const float* temperature;  // [T] or null; a row is sampled above 0, else it is greedy
  const int64_t* seeds;      // [T], null without temperature
  const int32_t* positions;  // [T], null without temperature: those of the tokens that are drawn
  int64_t* tokens;           // [T], written; kNoToken where a logit is not finite
  float* logits;             // [T, vocab], written, or null
  float* margins;            // [T], written: by how much the token's score, its logit or what was drawn by, exceeds
                             // that of the second best; infinity if there is none, 0 without a token
};

struct SampleArgs {
  int rows, vocab_size;
  const float* logits;                       // [T, vocab]
  const float *temperature, *top_p, *min_p;  // [T]: 0 = greedy; 1 = all; 0 = all
  const int32_t* top_k;                      // [T], 0 = all
  const int64_t* seeds;                      // [T]
  const int32_t* positions;                  // [T], of the tokens that are drawn
  int64_t* tokens;                           // [T], or kNoToken
  float* logprobs;                           // [T], of the tokens under softmax(logits), or NaN
};

// The end of a step whose tokens are drawn: what the next one starts from, and a record for the host.
struct AdvanceArgs {
  DType dtype;
  int rows, hidden_size, vocab_size, layers, num_stop_tokens, num_records;
  const void *before, *after;  // [T, hidden], input and output of the last layer
  const int64_t* tokens;       // [T], drawn
  const void* embed_tokens;    // [vocab, hidden]
  const int64_t* stop_tokens;  // [T, num_stop_tokens]
  void* hidden;                // [T, hidden], written: the embedding of an active row's token
  int32_t* slots;              // [T], written: -1 after a row's last token, or without one
  int32_t* positions;          // [T], written: one further
  int32_t* draw_positions;     // [T], written: positions + 1
  int32_t* remaining;          // [T], written: tokens that a row may still draw
  int32_t* exited;             // [layers, T], read, then zeros
  float* similarities;         // [layers, T]: the last layer's are written of rows that ran it as a decoder block
  int32_t* step;               // [1], written: steps taken
  int32_t* records;            // [num_records, 1 + 2 * T + layers * T], see RecordLayout in step_rules.h: entry
                               // step % num_records is written
};

// The R requests of lossless mode. Up to V tokens of each are verified together, R * V <= kMaxRows: row i * R + r of a
// verification holds token i of request r, which is its last token (i = 0) or its draft i. So the first (k + 1) * R
// rows verify k drafts of each request.
struct LosslessArgs {
  DType dtype;
  int requests, max_tokens;  // R, V
  int hidden_size, vocab_size;
  const int64_t* tokens;     // drawn: [R] by a draft step, [rows] by a verification
  const void* embed_tokens;  // [vocab, hidden]
  int64_t* drafts;           // [V, R], written; row 0 means nothing
  void* hidden;              // [R, hidden], written: what the next draft step starts from
  int32_t* slots;            // [R], written: -1 = drafts no more
  int32_t* positions;        // [R], written
  int32_t* draw_positions;   // [R], written: positions + 1
  void* verify_hidden;       // [V * R, hidden], written: what the verification starts from
  int32_t* verify_slots;     // [V * R], written
};

// The end of a draft step: by next_draft() of step_rules.h its tokens become row index + 1 of drafts and of each
// request's verification, and what the next draft step starts from.
struct DraftAdvanceArgs : LosslessArgs {
  int index;              // drafts before this one; index + 1 < V
  const int32_t* wanted;  // [R], drafts to verify
  const float* margins;   // [R], of the tokens, see LmHeadArgs;
  const float* sure;      // [R]: no draft follows one whose margin is below this
};

// The end of a verification: by NewTokens of step_rules.h targets become new tokens, which a record tells the host, and
// the last of them what the next cycle starts from.
struct AcceptArgs : LosslessArgs {
  int rows;  // that were verified, a multiple of R
  int num_stop_tokens, num_records;
  const int64_t* stop_tokens;      // [R, num_stop_tokens]
  int32_t* remaining;              // [R], written: tokens that a request may still draw
  int32_t* verify_positions;       // [V * R], written
  int32_t* verify_draw_positions;  // [V * R], written: verify_positions + 1
  int32_t* step;                   // [1], written: cycles so far
  int32_t* records;                // [num_records, 1 + R + V * R], see CycleLayout in step_rules.h: entry
                                   // step % num_records is written
};

// ---- linears and the W4 format ----------------------------------------------------------------------

struct LinearArgs {
  DType dtype;
  bool packed;  // W4 tiles, else dense row-major
  int rows, in_features, out_features;
  const void* x;       // [T, in]
  const void* weight;  // [out, in] or [out / 16, in / 64, 576]
  const void* bias;    // [out] or null
  void* out;           // [T, out], written
};

struct W4Args {  // pack, unpack, dequantize: which pointers are read and which written depends on the op
  int out_features, in_features;
  int group_tiles;         // tiles along K per (scale, zero) pair
  DType dtype;             // of dense
  uint8_t* packed;         // [out / 16, in / 64, 576]
  uint8_t* q;              // [out, in], 0..15
  uint16_t *scale, *zero;  // fp16 [out, groups]
  void* dense;             // [out, in]
};

// ---- launchers --------------------------------------------------------------------------------------

namespace cpu {

// Runs body(begin, end, context) over [0, n), in pieces of at least `grain`, on as many threads as there are pieces.
struct Parallel {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  int count;  // of the threads, at most
  void (*run)(void* state, int64_t n, int64_t grain, Body body, void* context);
  void* state;

  template <class F>
  void operator()(int64_t n, int64_t grain, F f) const {
    run(
        state, n, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); },
        &f);
  }
};

// Torch's threads, as many as torch.set_num_threads allows this one. Defined in ops/.
Parallel callers_threads();

void launch_decoder_block(const DecoderBlockArgs& args, const Parallel& parallel);
void launch_exit_layer(const ExitLayerArgs& args, const Parallel& parallel);
void launch_decode_attention(const AttentionArgs& args, const Parallel& parallel);
void launch_dual_layer(const DualLayerArgs& args, const Parallel& parallel);
void launch_advance(const AdvanceArgs& args, const Parallel& parallel);
void launch_draft_advance(const DraftAdvanceArgs& args, const Parallel& parallel);
void launch_accept(const AcceptArgs& args, const Parallel& parallel);
void launch_state_similarity(const StateSimilarityArgs& args, const Parallel& parallel);
void launch_lm_head(const LmHeadArgs& args, const Parallel& parallel);
void launch_sample(const SampleArgs& args, const Parallel& parallel);
void launch_linear(const LinearArgs& args, const Parallel& parallel);
void launch_pack_w4(const W4Args& args, const Parallel& parallel);
void launch_unpack_w4(const W4Args& args, const Parallel& parallel);
void launch_dequantize_w4(const W4Args& args, const Parallel& parallel);

const char* isa();                    // the instruction set in use
const char* const* supported_isas();  // those this machine can run, best first, null-terminated
bool set_isa(const char* name);       // false: not supported here

}  // namespace cpu

namespace cuda {

using Stream = CUstream_st*;  // cudaStream_t

// How much of a kernel may happen before the kernels ahead of it end. Results do not depend on it.
enum class Overlap {
  kNone,      // nothing; and no bulk copies: what older chips run, and the control in measurements
  kLaunch,    // its launch
  kPrefetch,  // its launch, and filling the ring with its weights, which those kernels must not write
};

// What a launch may use beside its arguments; WorkspaceSize says how much an op needs. One workspace may serve all
// launches of a stream.
struct Workspace {
  float* partials;     // fp32 sums of split weights
  uint32_t* counters;  // zero before the first launch, 8-byte aligned; every launch leaves zeros
  void* scratch;       // what the kernels of one op hand to each other, 256-byte aligned
  int blocks;          // blocks to launch, one per SM; results do not depend on it
  Overlap overlap;
  Variants variants;
};

struct WorkspaceSize {
  int64_t partials, counters;  // elements
  int64_t scratch;             // bytes
};

WorkspaceSize decoder_block_workspace(const DecoderBlockArgs& args);
WorkspaceSize exit_layer_workspace(const ExitLayerArgs& args);
WorkspaceSize dual_layer_workspace(const DualLayerArgs& args);
WorkspaceSize decode_attention_workspace(const AttentionArgs& args);
WorkspaceSize lm_head_workspace(const LmHeadArgs& args);
WorkspaceSize linear_workspace(const LinearArgs& args);

void launch_decoder_block(const DecoderBlockArgs& args, const Workspace& workspace, Stream stream);
void launch_exit_layer(const ExitLayerArgs& args, const Workspace& workspace, Stream stream);
void launch_dual_layer(const DualLayerArgs& args, const Workspace& workspace, Stream stream);
void launch_decode_attention(const AttentionArgs& args, const Workspace& workspace, Stream stream);
void launch_lm_head(const LmHeadArgs& args, const Workspace& workspace, Stream stream);
void launch_sample(const SampleArgs& args, const Workspace& workspace, Stream stream);
void launch_linear(const LinearArgs& args, const Workspace& workspace, Stream stream);
void launch_state_similarity(const StateSimilarityArgs& args, const Workspace& workspace, Stream stream);
void launch_advance(const AdvanceArgs& args, const Workspace& workspace, Stream stream);
void launch_draft_advance(const DraftAdvanceArgs& args, const Workspace& workspace, Stream stream);
void launch_accept(const AcceptArgs& args, const Workspace& workspace, Stream stream);
void launch_pack_w4(const W4Args& args, Stream stream);
void launch_unpack_w4(const W4Args& args, Stream stream);
void launch_dequantize_w4(const W4Args& args, Stream stream);

}  // namespace cuda
}  // namespace river
