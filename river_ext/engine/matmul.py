"""A prompt through large matrix products: what prefill uses on a GPU, where many rows are cheap.

The arithmetic is that of the ops: fp32 sums, values rounded to the model dtype at the same six points. A
layer takes a block of rows at a time, and attention a part of a block, which bounds the memory that a long
prompt needs. Packed weights are dequantised, exactly, for the time of a product.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..loading.config import ModelConfig
from ..loading.weights import BlockShape, DecoderBlockWeights, ExitLayerWeights
from ..quant import w4
from .cache import KVCache
from .network import Layer, Network, Rope

SCORES_AT_A_TIME = 1 << 24  # of attention


@dataclass(frozen=True)
class Matrices:
    """The dense matrices of a layer, made when they are needed: dequantised ones are large."""

    qkv: Callable[[], tuple[Tensor, Tensor, Tensor]]
    o: Callable[[], Tensor]
    gate_up: Callable[[], tuple[Tensor, Tensor]]
    down: Callable[[], Tensor]


def backbone_matrices(block: DecoderBlockWeights) -> Matrices:
    return Matrices(
        qkv=lambda: (block.q_proj, block.k_proj, block.v_proj),
        o=lambda: block.o_proj,
        gate_up=lambda: (block.gate_proj, block.up_proj),
        down=lambda: block.down_proj,
    )


def river_matrices(weights: ExitLayerWeights, shape: BlockShape) -> Matrices:
    attended = shape.num_attention_heads * shape.head_dim
    inner = weights.gate_up_proj.shape[0] * ops.TILE_ROWS // 2
    return Matrices(
        qkv=lambda: w4.split_qkv(weights.qkv_proj, shape),
        o=lambda: ops.dequantize_w4(weights.o_proj, shape.hidden_size, attended, torch.float32),
        gate_up=lambda: w4.split_gate_up(weights.gate_up_proj, shape),
        down=lambda: ops.dequantize_w4(weights.down_proj, shape.hidden_size, inner, torch.float32),
    )


class MatmulPrompt:
    """The tokens of a prompt at positions start..length-1 of a slot, through matrix products."""

    rows_at_a_time = 512
    cuts_change_bits = True  # the bits of a product depend on the number of its rows

    def __init__(self, network: Network, cache: KVCache, slot: int, start: int, length: int):
        self.network, self.cache, self.slot, self.start = network, cache, slot, start
        self.rope = network.prompt_rope(length, cache.max_len)

    def decoder_block(self, index: int) -> Callable[[int, Tensor], Tensor]:
        """A backbone layer for a block of rows [n, hidden_size] from that row of the prompt on.

        It writes K and V of the rows. Attention is causal: those of all rows before must be there.
        """
        return self._layer(index, backbone_matrices(self.network.layers[index].weights))

    def exit_layer(self, index: int) -> Callable[[int, Tensor], Tensor]:
        """The same for its exit layer."""
        shape = BlockShape.of(self.network.config)
        return self._layer(index, river_matrices(self.network.layers[index].river, shape))

    def _layer(self, index: int, matrices: Matrices) -> Callable[[int, Tensor], Tensor]:
        k, v = (part[self.slot] for part in self.cache.layer(index))
        layer = ManyRows(
            config=self.network.config,
            layer=self.network.layers[index],
            matrices=matrices,
            rope=self.rope,
            k=k,
            v=v,
        )
        return lambda first, hidden: layer.run(self.start + first, hidden)


class ManyRows:
    """One layer for any number of rows of one slot, with the arithmetic of the ops."""

    def __init__(
        self, config: ModelConfig, layer: Layer, matrices: Matrices, rope: Rope, k: Tensor, v: Tensor
    ):
        self.config, self.block, self.options, self.matrices = config, layer.weights, layer.options, matrices
        self.tables = layer.tables(rope)
        self.k, self.v = k, v  # [kv_heads, max_len, head_dim]

    def run(self, start: int, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden_size] of positions start, start + 1, ..."""
        return self.mlp_half(self.attention_half(start, hidden))

    def attention_half(self, start: int, hidden: Tensor) -> Tensor:
        """Rows from position start on through norm, QKV, RoPE, attention, O and residual; writes K and V."""
        attended = self.attended(start, hidden)
        o = linear(attended, self.matrices.o(), self.options.get("o_bias"))
        return add(hidden, o, self.config.residual_multiplier)

    def attended(self, start: int, hidden: Tensor) -> Tensor:
        """What O takes, [rows, heads * head_dim]; writes K and V."""
        config, options, stop = self.config, self.options, start + hidden.shape[0]
        cos, sin = (self.tables[name][start:stop] for name in ("cos", "sin"))
        x = rms_norm(hidden, self.block.input_layernorm, config.rms_norm_eps)
        q, k, v = (
            linear(x, weight, options.get(bias)).unflatten(1, (-1, config.head_dim))
            for weight, bias in zip(self.matrices.qkv(), ("q_bias", "k_bias", "v_bias"), strict=True)
        )
        if "q_norm" in options:
            q = rms_norm(q, options["q_norm"], config.rms_norm_eps)
            k = rms_norm(k, options["k_norm"], config.rms_norm_eps)
        self.k[:, start:stop] = rotate(k, cos, sin).transpose(0, 1)  # rounds to the model dtype
        self.v[:, start:stop] = v.transpose(0, 1)
        q = rotate(q, cos, sin)
        if (scale := self.tables["query_scale"]) is not None:
            q = q * scale[start:stop, None, None]
        q = q.to(hidden.dtype)
        attended = causal_attention(
            q, self.k, self.v, start, config.softmax_scale, options.get("sliding_window")
        )
        return attended.to(hidden.dtype).flatten(1)

    def mlp_half(self, hidden: Tensor) -> Tensor:
        """Rows through norm, gate and up, SwiGLU, down and residual."""
        down = linear(self.swiglu(hidden), self.matrices.down())
        return add(hidden, down, self.config.residual_multiplier)

    def swiglu(self, hidden: Tensor) -> Tensor:
        """What down takes, [rows, intermediate_size]."""
        x = rms_norm(hidden, self.block.post_attention_layernorm, self.config.rms_norm_eps)
        gate, up = (linear(x, weight) for weight in self.matrices.gate_up())
        return (torch.nn.functional.silu(gate) * up).to(hidden.dtype)


def causal_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: int,
    softmax_scale: float | None,
    sliding_window: int | None,
) -> Tensor:
    """fp32 [n, heads, head_dim]: queries at positions start.. against positions up to their own.

    k_cache and v_cache are one slot's, [kv_heads, max_len, head_dim].
    """
    rows, heads, head_dim = query.shape
    kv_heads = k_cache.shape[0]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    group, queries_at_a_time = heads // kv_heads, max(1, SCORES_AT_A_TIME // (heads * (start + rows)))
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    for begin in range(0, rows, queries_at_a_time):
        part = query[begin : begin + queries_at_a_time].float()
        n, position = part.shape[0], start + begin
        positions = torch.arange(position, position + n, device=query.device)[:, None]
        first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
        keys = torch.arange(first, position + n, device=query.device)
        unseen = keys > positions
        if sliding_window is not None:
            unseen |= keys <= positions - sliding_window
        k, v = (cache[:, first : position + n].float() for cache in (k_cache, v_cache))
        # the query heads of a group are more rows against the same keys
        part = (
            part.view(n, kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, group * n, head_dim)
        )
        scores = (part @ k.transpose(1, 2) * scale).view(kv_heads, group, n, -1)
        weights = torch.softmax(scores.masked_fill_(unseen, float("-inf")), dim=-1)
        attended = (weights.view(kv_heads, group * n, -1) @ v).view(kv_heads, group, n, head_dim)
        out[begin : begin + n] = attended.permute(2, 0, 1, 3).flatten(1, 2)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dim in fp32, in x's dtype."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of fp32 x [rows, heads, head_dim] with cos and sin [rows, rotary_dim / 2]."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    lo, hi = x[..., :half], x[..., half : 2 * half]
    return torch.cat([lo * cos - hi * sin, hi * cos + lo * sin, x[..., 2 * half :]], dim=-1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias with fp32 sums, in fp32."""
    if x.is_cuda and x.dtype == weight.dtype != torch.float32:
        y = torch.mm(x, weight.T, out_dtype=torch.float32)
    else:
        y = x.float() @ weight.float().T
    return y if bias is None else y + bias.float()


def add(hidden: Tensor, y: Tensor, multiplier: float) -> Tensor:
    """The residual: fp32 y, times the multiplier, onto hidden, in the model dtype."""
    return (hidden.float() + multiplier * y).to(hidden.dtype)
