"""The ops of `ops.py`, same arguments and returns, by the CUDA kernels on the emulated GPU.

Every call runs under all schedules of `emulated.SCHEDULES` and checks that they agree in every bit.
"""

import torch
from emulated import emulate

from river_ext.ops import TILE_COLS, packed_shape


def linear(x, weight, bias=None):
    return _linear(x, weight, weight.shape[0], bias, packed=False)


def linear_w4(x, weight, out_features, bias=None):
    return _linear(x, weight, out_features, bias, packed=True)


def _linear(x, weight, out_features, bias, packed):
    rows, in_features = x.shape
    return emulate(
        "linear", {"out": ((rows, out_features), x.dtype)}, dtype=x.dtype, packed=packed, rows=rows,
        in_features=in_features, out_features=out_features, x=x, weight=weight, bias=bias,
    )["out"]  # fmt: skip


def lm_head(hidden, norm, weight, rms_norm_eps, **options):
    return _lm_head(hidden, norm, weight, weight.shape[0], rms_norm_eps, packed=False, **options)


def lm_head_w4(hidden, norm, weight, vocab_size, rms_norm_eps, **options):
    return _lm_head(hidden, norm, weight, vocab_size, rms_norm_eps, packed=True, **options)


def _lm_head(
    hidden, norm, weight, vocab_size, rms_norm_eps, *, packed, return_logits=True, temperature=None,
    seeds=None, positions=None, logits_scaling=1.0,
):  # fmt: skip
    rows, hidden_size = hidden.shape
    outputs = {"tokens": ((rows,), torch.int64), "margins": ((rows,), torch.float32)}
    fields = {"logits": None}
    if return_logits:
        outputs["logits"], fields = ((rows, vocab_size), torch.float32), {}
    got = emulate(
        "lm_head", outputs, dtype=hidden.dtype, packed=packed, rows=rows, hidden_size=hidden_size,
        vocab_size=vocab_size, rms_norm_eps=rms_norm_eps, hidden=hidden, norm=norm, weight=weight,
        temperature=temperature, seeds=seeds, positions=positions, logits_scaling=logits_scaling, **fields,
    )  # fmt: skip
    return got["tokens"], got.get("logits", torch.empty(0, vocab_size)), got["margins"]


def sample(logits, temperature, top_k, top_p, min_p, seeds, positions):
    rows, vocab_size = logits.shape
    outputs = {"tokens": ((rows,), torch.int64), "logprobs": ((rows,), torch.float32)}
    got = emulate(
        "sample", outputs, rows=rows, vocab_size=vocab_size, logits=logits, temperature=temperature,
        top_k=top_k, top_p=top_p, min_p=min_p, seeds=seeds, positions=positions,
    )  # fmt: skip
    return got["tokens"], got["logprobs"]


def state_similarity(x, y):
    rows, hidden_size = x.shape
    outputs = {"out": ((rows,), torch.float32)}
    return emulate("state_similarity", outputs, dtype=x.dtype, rows=rows, hidden_size=hidden_size, x=x, y=y)[
        "out"
    ]


def decode_attention(
    query, k_cache, v_cache, slots, positions, *, softmax_scale=None, sliding_window=None, kv_valid=None
):
    common = _attention(
        query, query.shape[1], k_cache, slots, positions, softmax_scale, sliding_window, kv_valid
    )
    outputs = {"out": (query.shape, query.dtype)}
    return emulate("decode_attention", outputs, query=query, k_cache=k_cache, v_cache=v_cache, **common)[
        "out"
    ]


def _attention(x, num_heads, k_cache, slots, positions, softmax_scale, sliding_window, kv_valid):
    num_slots, num_kv_heads, max_len, head_dim = k_cache.shape
    return dict(
        dtype=x.dtype, rows=x.shape[0], num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        num_slots=num_slots, max_len=max_len, slots=slots, positions=positions, kv_valid=kv_valid,
        softmax_scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
        sliding_window=sliding_window or 0,
    )  # fmt: skip


def decoder_block(
    hidden, input_layernorm, q_proj, k_proj, v_proj, o_proj, post_attention_layernorm, gate_proj, up_proj,
    down_proj, *common, **options,
):  # fmt: skip
    return _block(
        "decoder_block", hidden, input_layernorm, post_attention_layernorm, *common, **options,
        weights=dict(q_proj=q_proj, k_proj=k_proj, v_proj=v_proj, o_proj=o_proj, gate_proj=gate_proj,
                     up_proj=up_proj, down_proj=down_proj, intermediate_size=gate_proj.shape[0]),
    )  # fmt: skip


def exit_layer(
    hidden, input_layernorm, qkv_proj, o_proj, post_attention_layernorm, gate_up_proj, down_proj, *common,
    **options,
):  # fmt: skip
    return _block(
        "exit_layer", hidden, input_layernorm, post_attention_layernorm, *common, **options,
        weights=dict(qkv_proj=qkv_proj, o_proj=o_proj, gate_up_proj=gate_up_proj, down_proj=down_proj,
                     gate_up_strips=gate_up_proj.shape[0]),
    )  # fmt: skip


def dual_layer(
    index, hidden, previous, thresholds, min_layers, limit, exited, similarities, input_layernorm,
    q_proj, k_proj, v_proj, o_proj, post_attention_layernorm, gate_proj, up_proj, down_proj,
    qkv_tiles, o_tiles, gate_up_tiles, down_tiles, *common, together=False, **options,
):  # fmt: skip
    weights = dict(q_proj=q_proj, k_proj=k_proj, v_proj=v_proj, o_proj=o_proj, gate_proj=gate_proj,
                   up_proj=up_proj, down_proj=down_proj, intermediate_size=gate_proj.shape[0],
                   qkv_tiles=qkv_tiles, o_tiles=o_tiles, gate_up_tiles=gate_up_tiles,
                   down_tiles=down_tiles)  # fmt: skip
    rule = dict(index=index, previous=previous, thresholds=thresholds, min_layers=min_layers, limit=limit,
                together=together)  # fmt: skip
    got = _run_block(
        "dual_layer", {"exited": exited, "similarities": similarities}, hidden, input_layernorm,
        post_attention_layernorm, *common, **options, weights=weights | rule | {"similarity": None},
    )  # fmt: skip
    exited.copy_(got["exited"])
    similarities.copy_(got["similarities"])
    return got["out"]


def advance(
    before, after, tokens, embed_tokens, stop_tokens, hidden, slots, positions, draw_positions, remaining,
    exited, similarities, step, records,
):  # fmt: skip
    written = dict(hidden=hidden, slots=slots, positions=positions, draw_positions=draw_positions,
                   remaining=remaining, exited=exited, similarities=similarities, step=step,
                   records=records)  # fmt: skip
    got = emulate(
        "advance", written, dtype=hidden.dtype, rows=len(tokens), hidden_size=hidden.shape[1],
        vocab_size=len(embed_tokens), layers=len(exited), num_stop_tokens=stop_tokens.shape[1],
        num_records=len(records), before=before, after=after, tokens=tokens, embed_tokens=embed_tokens,
        stop_tokens=stop_tokens,
    )  # fmt: skip
    for name, tensor in written.items():
        tensor.copy_(got[name])


def draft_advance(
    tokens, margins, index, wanted, sure, embed_tokens, drafts, hidden, slots, positions, draw_positions,
    verify_hidden, verify_slots,
):  # fmt: skip
    written = dict(drafts=drafts, hidden=hidden, slots=slots, positions=positions,
                   draw_positions=draw_positions, verify_hidden=verify_hidden,
                   verify_slots=verify_slots)  # fmt: skip
    read = dict(index=index, wanted=wanted, margins=margins, sure=sure)
    _end_of_step("draft_advance", written, tokens, embed_tokens, **read)


def accept(
    tokens, drafts, embed_tokens, stop_tokens, remaining, hidden, slots, positions, draw_positions,
    verify_hidden, verify_slots, verify_positions, verify_draw_positions, step, records,
):  # fmt: skip
    written = dict(drafts=drafts, remaining=remaining, hidden=hidden, slots=slots, positions=positions,
                   draw_positions=draw_positions, verify_hidden=verify_hidden, verify_slots=verify_slots,
                   verify_positions=verify_positions, verify_draw_positions=verify_draw_positions, step=step,
                   records=records)  # fmt: skip
    _end_of_step(
        "accept", written, tokens, embed_tokens, rows=len(tokens), num_stop_tokens=stop_tokens.shape[1],
        num_records=len(records), stop_tokens=stop_tokens,
    )  # fmt: skip


def _end_of_step(op, written, tokens, embed_tokens, **fields):
    """Of a draft step or a verification."""
    max_tokens, requests = written["drafts"].shape
    vocab_size, hidden_size = embed_tokens.shape
    got = emulate(
        op, written, dtype=embed_tokens.dtype, requests=requests, max_tokens=max_tokens,
        hidden_size=hidden_size, vocab_size=vocab_size, tokens=tokens, embed_tokens=embed_tokens, **fields,
    )  # fmt: skip
    for name, tensor in written.items():
        tensor.copy_(got[name])


def _block(op, hidden, *args, **options):
    got = _run_block(op, {"similarity": (hidden.shape[:1], torch.float32)}, hidden, *args, **options)
    return got["out"], got["similarity"]


def _run_block(
    op, outputs, hidden, input_layernorm, post_attention_layernorm, k_cache, v_cache, slots, positions, cos,
    sin, num_attention_heads, rms_norm_eps, *, weights, q_bias=None, k_bias=None, v_bias=None, o_bias=None,
    q_norm=None, k_norm=None, query_scale=None, softmax_scale=None, sliding_window=None, kv_valid=None,
    residual_multiplier=1.0,
):  # fmt: skip
    outputs = outputs | {"out": (hidden.shape, hidden.dtype), "k_cache": k_cache, "v_cache": v_cache}
    common = _attention(
        hidden, num_attention_heads, k_cache, slots, positions, softmax_scale, sliding_window, kv_valid
    )
    got = emulate(
        op, outputs, **common, **weights, hidden_size=hidden.shape[1], rotary_dim=2 * cos.shape[1],
        rms_norm_eps=rms_norm_eps, residual_multiplier=residual_multiplier, hidden=hidden,
        input_layernorm=input_layernorm, post_attention_layernorm=post_attention_layernorm, q_bias=q_bias,
        k_bias=k_bias, v_bias=v_bias, o_bias=o_bias, q_norm=q_norm, k_norm=k_norm, cos=cos, sin=sin,
        query_scale=query_scale,
    )  # fmt: skip
    k_cache.copy_(got["k_cache"])
    v_cache.copy_(got["v_cache"])
    return got


def pack_w4(q, scale, zero):
    (out_features, in_features), groups = q.shape, scale.shape[1]
    outputs = {"packed": (packed_shape(out_features, in_features), torch.uint8)}
    group_tiles = -(-_tiles(in_features) // groups)
    return _w4("pack_w4", outputs, out_features, in_features, group_tiles, q=q, scale=scale, zero=zero)[
        "packed"
    ]


def unpack_w4(packed, out_features, in_features, group_size=64):
    pairs = ((out_features, -(-in_features // group_size)), torch.float16)
    outputs = {"q": ((out_features, in_features), torch.uint8), "scale": pairs, "zero": pairs}
    got = _w4("unpack_w4", outputs, out_features, in_features, group_size // TILE_COLS, packed=packed)
    return got["q"], got["scale"], got["zero"]


def dequantize_w4(packed, out_features, in_features, dtype):
    outputs = {"dense": ((out_features, in_features), dtype)}
    return _w4("dequantize_w4", outputs, out_features, in_features, 1, packed=packed, dtype=dtype)["dense"]


def _w4(op, outputs, out_features, in_features, group_tiles, dtype=torch.float32, **given):
    absent = {"packed", "q", "scale", "zero", "dense"} - outputs.keys() - given.keys()
    sizes = dict(out_features=out_features, in_features=in_features, group_tiles=group_tiles, dtype=dtype)
    return emulate(op, outputs, **sizes, **given, **dict.fromkeys(absent))


def _tiles(columns):
    return -(-columns // TILE_COLS)
