"""The torch ops, `torch.ops.river.*`, with their contracts.

Every function here calls the registered op of the same name (csrc/ops/) and has a plain fp32 twin
of the same name and arguments in `reference.py`. All tensors are contiguous and on one device; T is
the number of rows (tokens in flight), 1 <= T <= 8. On the CPU `decoder_block`, `exit_layer`, `linear`,
`linear_w4`, `state_similarity` and `decode_attention` take any number of rows, as those of a prompt, and
a row's bits do not depend on it. The model dtype is bfloat16 or float16 (CPU: also float32). A bad
argument raises RuntimeError with one line that names the value and what is accepted. Memory that an op
writes belongs to one of its tensors alone: an overlap with any other is refused.
The ops are for inference: what they return for inputs that require grad raises in backward().

On CUDA the ops run on the current stream and never wait for it, so that CUDA graphs can hold them:
run each op once on the stream before capturing it. They cannot look at what tensors hold, then: slots,
positions, temperatures and 4-bit levels are checked on the CPU only, and on CUDA a row whose slot or
position is out of range counts as inactive. head_dim, intermediate_size and in_features are multiples
of 8 there, and tensors that are read 16 bytes at a time are aligned to 16 bytes, as torch allocates them.
"""

import os

import torch
from torch import Tensor

from . import _C, variants  # importing _C registers torch.ops.river.*
from .registration import packed_shape as packed_shape
from .registration import register

MAX_ROWS: int = _C.MAX_ROWS
MAX_HEAD_DIM: int = _C.MAX_HEAD_DIM
MAX_GROUP: int = _C.MAX_GROUP  # query heads per KV head
TILE_ROWS: int = _C.TILE_ROWS
TILE_COLS: int = _C.TILE_COLS
TILE_BYTES: int = _C.TILE_BYTES

_river = register()
variants.choose(os.environ.get("RIVER_VARIANTS", ""))


def decoder_block(
    hidden: Tensor,
    input_layernorm: Tensor,
    q_proj: Tensor,
    k_proj: Tensor,
    v_proj: Tensor,
    o_proj: Tensor,
    post_attention_layernorm: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_attention_heads: int,
    rms_norm_eps: float,
    *,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    o_bias: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    query_scale: Tensor | None = None,
    softmax_scale: float | None = None,
    sliding_window: int | None = None,
    kv_valid: Tensor | None = None,
    residual_multiplier: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Runs T rows through one backbone layer and appends their K and V to the cache.

    Args:
        hidden: [T, hidden_size], model dtype; hidden_size is a multiple of 64.
        input_layernorm, post_attention_layernorm: [hidden_size] RMSNorm weights.
        q_proj: [num_attention_heads * head_dim, hidden_size], checkpoint order; k_proj and v_proj:
            [num_key_value_heads * head_dim, hidden_size]; o_proj: [hidden_size, heads * head_dim].
        gate_proj, up_proj: [intermediate_size, hidden_size]; down_proj: [hidden_size, intermediate_size].
        k_cache, v_cache: [slots, num_key_value_heads, max_len, head_dim], model dtype, written in place
            at (slot, position) of every active row before any row attends.
        slots: [T] int32, a row's slot, or -1 for an inactive row (hidden copied through, similarity 1
            or, for a zero or non-finite vector, 0; cache neither read nor written).
        positions: [T] int32, index of the row in its sequence; the row attends to positions <= its own.
            Pairs (slot, position) must differ.
        cos, sin: [max_len, rotary_dim / 2] fp32; dims i and i + rotary_dim / 2 of a head rotate
            together, dims past rotary_dim pass through.
        q_bias, k_bias, v_bias, o_bias: added before the norm and the rotation, before the residual.
        q_norm, k_norm: [head_dim] RMSNorm weights per head, applied before the rotation (Qwen3); both
            or none.
        query_scale: [max_len] fp32, factor on the rotated query by position (Ministral 3).
        softmax_scale: default head_dim ** -0.5.
        sliding_window: a row at p sees positions p - sliding_window + 1 .. p.
        kv_valid: [slots, max_len] bool, False = nothing to attend to at that position.
        residual_multiplier: factor on what attention and the feed-forward part each add to hidden (Granite).

    Returns:
        hidden [T, hidden_size] in the model dtype, and similarity [T] fp32, the cosine of a row's input
        and output (0 for a zero or non-finite vector).
    """
    return _river.decoder_block(
        hidden, input_layernorm, q_proj, k_proj, v_proj, o_proj, post_attention_layernorm,
        gate_proj, up_proj, down_proj, k_cache, v_cache, slots, positions, cos, sin,
        num_attention_heads, rms_norm_eps, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm,
        query_scale, softmax_scale, sliding_window, kv_valid, residual_multiplier,
    )  # fmt: skip


def exit_layer(
    hidden: Tensor,
    input_layernorm: Tensor,
    qkv_proj: Tensor,
    o_proj: Tensor,
    post_attention_layernorm: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_attention_heads: int,
    rms_norm_eps: float,
    *,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    o_bias: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    query_scale: Tensor | None = None,
    softmax_scale: float | None = None,
    sliding_window: int | None = None,
    kv_valid: Tensor | None = None,
    residual_multiplier: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Runs T rows through the W4 twin of a backbone layer, on the same cache slots.

    The packed weights (uint8 [N/16, K/64, 576], see `pack_w4`) hold their rows in the orders of
    `w4.py`: qkv_proj = rotary pairs of Q, rotary pairs of K, then V, each segment padded to 16 rows;
    gate_up_proj = 8 gate rows and their 8 up rows per tile; o_proj and down_proj in natural order.
    The cache's K and V are in natural order. All other arguments and the returns are those of
    `decoder_block`.
    """
    return _river.exit_layer(
        hidden, input_layernorm, qkv_proj, o_proj, post_attention_layernorm, gate_up_proj, down_proj,
        k_cache, v_cache, slots, positions, cos, sin, num_attention_heads, rms_norm_eps,
        q_bias, k_bias, v_bias, o_bias, q_norm, k_norm, query_scale, softmax_scale, sliding_window,
        kv_valid, residual_multiplier,
    )  # fmt: skip


def dual_layer(
    index: int,
    hidden: Tensor,
    previous: Tensor | None,
    thresholds: Tensor,
    min_layers: Tensor,
    limit: Tensor,
    exited: Tensor,
    similarities: Tensor,
    input_layernorm: Tensor,
    q_proj: Tensor,
    k_proj: Tensor,
    v_proj: Tensor,
    o_proj: Tensor,
    post_attention_layernorm: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    qkv_tiles: Tensor,
    o_tiles: Tensor,
    gate_up_tiles: Tensor,
    down_tiles: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_attention_heads: int,
    rms_norm_eps: float,
    *,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
    o_bias: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    query_scale: Tensor | None = None,
    softmax_scale: float | None = None,
    sliding_window: int | None = None,
    kv_valid: Tensor | None = None,
    residual_multiplier: float = 1.0,
    together: bool = False,
) -> Tensor:
    """Runs T rows through layer `index`: each by the decoder block, or by the exit layer once it has left.

    The device decides, so that no step waits for the host. A row that has left stays outside. Another one
    agrees to leave if the similarity of the layer before is strictly above its threshold and
    `index >= min_layers`, or if `index >= limit`. Then it leaves, whatever other rows do; with `together`,
    only where all active rows agree. A row's results are the same bits as those of the layer that it takes,
    alone. Weights are read in both formats where rows take both ways, else in one.

    Args:
        index: the layer, 0 <= index < layers.
        hidden: [T, hidden_size], the layer's input.
        previous: [T, hidden_size], the input of layer index - 1, whose output is `hidden`; None for index 0.
        thresholds: [T] fp32. min_layers: [T] int32. limit: [T] int32, decoder blocks that a row may run.
        exited: [layers, T] int32. Row index - 1 is read, row index written: 1 = takes the exit layer, 0 = the
            decoder block, or is inactive.
        similarities: [layers, T] fp32. In row index - 1, the entries of active rows that took the decoder
            block there are written.
        q_proj .. down_proj: the weights of `decoder_block`.
        qkv_tiles .. down_tiles: the packed weights of `exit_layer`, there qkv_proj .. down_proj.
        together: all active rows leave at the same layer.

    All other arguments are those of `decoder_block`. Returns hidden [T, hidden_size].
    """
    return _river.dual_layer(
        index, hidden, previous, thresholds, min_layers, limit, exited, similarities,
        input_layernorm, q_proj, k_proj, v_proj, o_proj, post_attention_layernorm, gate_proj, up_proj,
        down_proj, qkv_tiles, o_tiles, gate_up_tiles, down_tiles, k_cache, v_cache, slots, positions,
        cos, sin, num_attention_heads, rms_norm_eps, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm,
        query_scale, softmax_scale, sliding_window, kv_valid, residual_multiplier, together,
    )  # fmt: skip


def advance(
    before: Tensor,
    after: Tensor,
    tokens: Tensor,
    embed_tokens: Tensor,
    stop_tokens: Tensor,
    hidden: Tensor,
    slots: Tensor,
    positions: Tensor,
    draw_positions: Tensor,
    remaining: Tensor,
    exited: Tensor,
    similarities: Tensor,
    step: Tensor,
    records: Tensor,
) -> None:
    """Ends a step of `dual_layer`s: writes a record of it for the host, and what the next step starts from.

    Args:
        before, after: [T, hidden_size], input and output of the last layer; hidden_size is a multiple of 16.
            `before` may be `hidden` itself, as it is in a network of one layer.
        tokens: [T] int64, drawn from `after`.
        embed_tokens: [vocab_size, hidden_size].
        stop_tokens: [T, any number] int64, tokens that end each row; unused entries are -1.
        hidden: [T, hidden_size]; an active row gets its token's embedding.
        slots, positions: [T] int32. An active row moves one position on; after its last token, or a number
            that is no token's (-1 from `lm_head`), its slot becomes -1.
        draw_positions: [T] int32, becomes positions + 1 in active rows: where the next token is drawn.
        remaining: [T] int32, tokens that a row may still draw; one less in active rows, and the end at 0.
        exited: [layers, T] int32, what `dual_layer` wrote; becomes 0.
        similarities: [layers, T] fp32; in the last layer's row, the entries of active rows that took its
            decoder block are written.
        step: [1] int32, steps taken; one more.
        records: [any number, 1 + 2 * T + layers * T] int32, on the CPU, pinned where the others are on CUDA.
            Entry step % records is written: the number of the step from 1; T exit depths, `layers` where a
            row is inactive; T tokens, -1 in inactive rows and -2 where an active one drew none; the bits of
            similarities, of which those of exit layers and of inactive rows may hold anything. The number
            is written last, so that the host may poll it.
    """
    _river.advance(
        before, after, tokens, embed_tokens, stop_tokens, hidden, slots, positions, draw_positions, remaining,
        exited, similarities, step, records,
    )  # fmt: skip


def draft_advance(
    tokens: Tensor,
    margins: Tensor,
    index: int,
    wanted: Tensor,
    sure: Tensor,
    embed_tokens: Tensor,
    drafts: Tensor,
    hidden: Tensor,
    slots: Tensor,
    positions: Tensor,
    draw_positions: Tensor,
    verify_hidden: Tensor,
    verify_slots: Tensor,
) -> None:
    """Ends a draft step of R requests: its drafts become rows to verify, and start the next draft step.

    Up to V tokens of a request are verified together, R * V <= 8. Their rows go token by token: row
    i * R + r holds token i of request r, which is its last token (i = 0) or its draft i. So the first
    (k + 1) * R rows verify k drafts of each request.

    A request drafts while its slot is not -1. A token counts as its draft if the request wants more than
    `index` drafts, and if it is a token: -1 of `lm_head` is none. No draft follows one that is not sure.

    Args:
        tokens: [R] int64, what the step drew.
        margins: [R] fp32, those that `lm_head` gave with them.
        index: drafts before this one, 0 <= index and index + 1 < V.
        wanted: [R] int32, drafts that are to be verified, 0 to V - 1.
        sure: [R] fp32, the least margin of a draft that is sure; 0: all are.
        embed_tokens: [vocab_size, hidden_size]; on CUDA hidden_size is a multiple of 8.
        drafts: [V, R] int64; row index + 1 gets the drafts.
        hidden: [R, hidden_size]; gets the embeddings of the drafts.
        slots: [R] int32; becomes -1 where no draft counts, and after the last one wanted or one not sure.
        positions: [R] int32, of the newest tokens; one more where there is a draft.
        draw_positions: [R] int32, where the next tokens are drawn; one more where there is a draft.
        verify_hidden: [V * R, hidden_size]; the rows of the drafts get their embeddings.
        verify_slots: [V * R] int32; the rows of the drafts get the slots of their requests.
    """
    _river.draft_advance(
        tokens, margins, index, wanted, sure, embed_tokens, drafts, hidden, slots, positions, draw_positions,
        verify_hidden, verify_slots,
    )  # fmt: skip


def accept(
    tokens: Tensor,
    drafts: Tensor,
    embed_tokens: Tensor,
    stop_tokens: Tensor,
    remaining: Tensor,
    hidden: Tensor,
    slots: Tensor,
    positions: Tensor,
    draw_positions: Tensor,
    verify_hidden: Tensor,
    verify_slots: Tensor,
    verify_positions: Tensor,
    verify_draw_positions: Tensor,
    step: Tensor,
    records: Tensor,
) -> None:
    """Ends a verification: accepts drafts, writes a record, and sets up what the next cycle starts from.

    Rows lie as in `draft_advance`. What was drawn from a row is its target. The target of row 0 is a
    request's first new token. That of row i + 1 is the next one, if the row is active and its draft is the
    new token before. A request ends with a stop token, with the last token that it may draw, or with a
    target that is no token (-1 of `lm_head`), which is counted too; nothing is new after that.

    A request is active if row 0 has a slot. Of one that is not, only the drafts are cleared.

    Args:
        tokens: [(k + 1) * R] int64, the targets of the first rows.
        drafts: [V, R] int64; becomes -1.
        embed_tokens: [vocab_size, hidden_size]; on CUDA hidden_size is a multiple of 8.
        stop_tokens: [R, any number] int64, tokens that end each request; unused entries are -1.
        remaining: [R] int32, tokens that a request may still draw; one less for each new token.
        hidden: [R, hidden_size]; gets the embedding of the last new token, if it is one.
        slots: [R] int32; becomes the slot of the request, or -1 if it ends.
        positions: [R] int32; becomes the position of the last new token.
        draw_positions: [R] int32; becomes positions + 1.
        verify_hidden: [V * R, hidden_size]; row 0 of a request gets what `hidden` gets.
        verify_slots: [V * R] int32; row 0 of a request becomes what `slots` becomes, the rows of drafts -1.
        verify_positions: [V * R] int32; row i of a request becomes `positions` + i.
        verify_draw_positions: [V * R] int32; becomes verify_positions + 1.
        step: [1] int32, cycles so far; one more.
        records: [any number, 1 + R + V * R] int32, on the CPU, and pinned where the others are on CUDA.
            Entry step % records is written: the number of the cycle from 1; how many tokens of each request
            are new, -1 where it is inactive; the new tokens [V, R], -2 for a target that is no token, -1
            past the end. The number of the cycle is written last, so that the host may poll it.
    """
    _river.accept(
        tokens, drafts, embed_tokens, stop_tokens, remaining, hidden, slots, positions, draw_positions,
        verify_hidden, verify_slots, verify_positions, verify_draw_positions, step, records,
    )  # fmt: skip


def state_similarity(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of the rows of x and y, [T, hidden_size] each -> [T] fp32, clamped to [-1, 1].

    A zero or non-finite vector gives 0. Vectors whose squares would over- or underflow are scaled by a
    power of two first.
    """
    return _river.state_similarity(x, y)


def decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    *,
    softmax_scale: float | None = None,
    sliding_window: int | None = None,
    kv_valid: Tensor | None = None,
) -> Tensor:
    """Attention of T rows against the cache; grouped queries, causal by position.

    query is [T, num_attention_heads, head_dim], already rotated; caches, slots, positions and the
    keyword arguments are those of `decoder_block`. On the CPU T is any number, on CUDA 1 to 8. Rows of one
    slot, in any order, share one pass over its cache. Returns [T, num_attention_heads, head_dim]; a row
    that is inactive, or sees no valid position, gives zeros.
    """
    return _river.decode_attention(
        query, k_cache, v_cache, slots, positions, softmax_scale, sliding_window, kv_valid
    )


def lm_head(
    hidden: Tensor,
    norm: Tensor,
    weight: Tensor,
    rms_norm_eps: float,
    *,
    return_logits: bool = True,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    logits_scaling: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Final RMSNorm and head: hidden [T, hidden_size], norm [hidden_size], weight [vocab_size, hidden_size].

    Returns tokens int64 [T], fp32 logits [T, vocab_size] (or [0, vocab_size] without return_logits), and
    fp32 margins [T]. Logits are divided by logits_scaling, a number above 0 (Granite), before anything else
    is done with them. A token is the argmax of its logits, ties to the lowest id. With temperature [T] fp32,
    seeds [T] int64 and positions [T] int32 (all three), rows with temperature > 0 sample instead: the argmax
    of logits / temperature + Gumbel noise (see `reference.gumbel`), which draws from
    softmax(logits / temperature). `positions` is that of the token being drawn. A margin is how far the
    argmax is ahead of the second best, in what it was the argmax of. A row of which a logit is NaN or
    infinite has no token: -1, and a margin of 0.
    """
    return _river.lm_head(
        hidden, norm, weight, rms_norm_eps, return_logits, temperature, seeds, positions, logits_scaling
    )


def lm_head_w4(
    hidden: Tensor,
    norm: Tensor,
    weight: Tensor,
    vocab_size: int,
    rms_norm_eps: float,
    *,
    return_logits: bool = True,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    logits_scaling: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lm_head` for a head in 4 bits: weight is packed (`pack_w4`), a row per token in the order of ids.

    weight has ceil(vocab_size / 16) x ceil(hidden_size / 64) tiles. Rows from vocab_size on are padding:
    whatever they hold, they have no logits and are not drawn.
    """
    return _river.lm_head_w4(
        hidden, norm, weight, vocab_size, rms_norm_eps, return_logits, temperature, seeds, positions,
        logits_scaling,
    )  # fmt: skip


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draws a token per row from fp32 logits [T, vocab_size], each row by its own options.

    A token is the argmax of logits / temperature + Gumbel noise (see `reference.gumbel`) over the tokens that
    three filters keep, ties to the lowest id. Tokens are ranked by logit, then by lower id. A row does not
    depend on the others; CPU and GPU give the same tokens, and log-probabilities of the same bits.

    Args:
        temperature: [T] fp32; 0 is greedy, whatever the filters.
        top_k: [T] int32, keeps so many tokens of the highest rank; 0 keeps all.
        top_p: [T] fp32, above 0, at most 1: of the tokens that top_k keeps, and by their softmax(logits /
            temperature), keeps each before which less than this probability is ranked; 1 keeps all.
        min_p: [T] fp32, 0 to 1, keeps tokens at least this times as likely as the likeliest, by
            softmax(logits / temperature); 0 keeps all.
        seeds: [T] int64. positions: [T] int32, of the tokens that are drawn.

    Returns:
        tokens int64 [T], and logprobs fp32 [T]: their log_softmax(logits), before filters and temperature. A
        row of which a logit is NaN or infinite has no token: -1, and NaN.
    """
    return _river.sample(logits, temperature, top_k, top_p, min_p, seeds, positions)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in_features] @ weight [out_features, in_features]^T + bias, fp32 sums, in x's dtype."""
    return _river.linear(x, weight, bias)


def linear_w4(x: Tensor, weight: Tensor, out_features: int, bias: Tensor | None = None) -> Tensor:
    """x [T, in_features] @ W4^T + bias -> [T, out_features] in x's dtype.

    weight is packed (`pack_w4`) with ceil(out_features / 16) x ceil(in_features / 64) tiles.
    """
    return _river.linear_w4(x, weight, out_features, bias)


def pack_w4(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Packs a canonical 4-bit weight, W ~ (q - zero) * scale, into tiles of 16 rows x 64 columns.

    q is uint8 [out_features, in_features] with values 0..15; scale and zero are fp16
    [out_features, ceil(in_features / group_size)], and group_size (a multiple of 64) is derived as the
    smallest of 64, 128, ... that gives that number of groups. Returns uint8 [ceil(out_features / 16),
    ceil(in_features / 64), 576]; rows past out_features have scale 0.
    """
    return _river.pack_w4(q, scale, zero)


def unpack_w4(
    packed: Tensor, out_features: int, in_features: int, group_size: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack_w4`: (q, scale, zero)."""
    return _river.unpack_w4(packed, out_features, in_features, group_size)


def dequantize_w4(packed: Tensor, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """The packed weight as dense [out_features, in_features]: (q - zero) * scale in fp32, then rounded."""
    # torch takes numbers for dtypes, and looks up any of them
    if not isinstance(dtype, torch.dtype):
        raise RuntimeError(f"river::dequantize_w4: dtype is {repr(dtype)[:60]}, expected torch.dtype")
    return _river.dequantize_w4(packed, out_features, in_features, dtype)
