"""The network: every weight of backbone and river, arranged once as the ops take them."""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..errors import RiverError
from ..loading.config import ModelConfig
from ..loading.rope import rope_tables
from ..loading.weights import DecoderBlockWeights, ExitLayerWeights, ModelWeights
from .cache import KVCache

Rope = tuple[Tensor, Tensor]  # cos and sin, fp32 [positions, rotary_dim / 2]


class Decision(NamedTuple):
    """What `ops.dual_layer` decides by, and where it writes that down; its shapes are those of the op."""

    thresholds: Tensor
    min_layers: Tensor
    limit: Tensor
    exited: Tensor
    similarities: Tensor
    together: bool  # policy "min"


class Layer(NamedTuple):
    """One depth: the backbone's decoder block and its exit layer, and how the ops take them."""

    block: DecoderBlockWeights
    exit_layer: ExitLayerWeights
    block_args: dict  # what ops.decoder_block takes of this layer, by name
    exit_args: dict  # what ops.exit_layer takes
    dual_args: dict  # what ops.dual_layer takes
    options: dict  # of these, what not every model has: biases, q/k norms, sliding window


class Network:
    """Backbone, exit river, embedding and head of one model on one device."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, river: list[ExitLayerWeights]):
        if not len(river) == len(weights.layers) == config.num_hidden_layers:
            raise RiverError(
                f"the river has {len(river)} exit layers and the backbone {len(weights.layers)} layers; "
                f"both need {config.num_hidden_layers}"
            )
        self.config = config
        self.embed_tokens, self.norm, self.lm_head = weights.embed_tokens, weights.norm, weights.lm_head
        self.layers = [_layer(config, *pair) for pair in zip(weights.layers, river, strict=True)]
        self.dtype, self.device = weights.embed_tokens.dtype, weights.embed_tokens.device
        self._rope = rope_tables(config, 0, device=self.device)
        self.idle_runners = deque(maxlen=1)  # of graph.py, from the latest run

    def embed(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.embedding(tokens, self.embed_tokens)

    def rope(self, max_len: int) -> Rope:
        """cos and sin for decoding: tables of at least max_len positions.

        Their rows never change, and longer tables are new tensors: a graph keeps those it was captured with.
        """
        if max_len > len(self._rope[0]):
            self._rope = rope_tables(self.config, 1 << (max_len - 1).bit_length(), device=self.device)
        return self._rope

    def prompt_rope(self, length: int, max_len: int) -> Rope:
        """The same for a prompt: under dynamic scaling all its tokens see the whole prompt's length."""
        scaling = self.config.rope_scaling or {}
        if scaling.get("rope_type") == "dynamic" and length > self.config.max_position_embeddings:
            return rope_tables(self.config, max_len, seq_len=length, device=self.device)
        return self.rope(max_len)

    def decoder_block(
        self, index: int, hidden: Tensor, cache: KVCache, slots: Tensor, positions: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor]:
        """Up to eight rows through a backbone layer: hidden [T, hidden_size] and similarity [T]."""
        return ops.decoder_block(
            hidden=hidden, **self.layers[index].block_args, **_place(index, cache, slots, positions, rope)
        )

    def exit_layer(
        self, index: int, hidden: Tensor, cache: KVCache, slots: Tensor, positions: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor]:
        """The same through its exit layer."""
        return ops.exit_layer(
            hidden=hidden, **self.layers[index].exit_args, **_place(index, cache, slots, positions, rope)
        )

    def dual_layer(
        self, index: int, hidden: Tensor, previous: Tensor | None, decision: Decision,
        cache: KVCache, slots: Tensor, positions: Tensor, rope: Rope,
    ) -> Tensor:  # fmt: skip
        """The same by the path that the device chooses; previous [T, hidden_size] went into the last."""
        return ops.dual_layer(
            index=index, hidden=hidden, previous=previous, **decision._asdict(),
            **self.layers[index].dual_args, **_place(index, cache, slots, positions, rope),
        )  # fmt: skip


def _place(index: int, cache: KVCache, slots: Tensor, positions: Tensor, rope: Rope) -> dict:
    """Where the rows of a step are, as the ops take it."""
    k_cache, v_cache = cache.layer(index)
    cos, sin = rope
    return {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slots": slots,
        "positions": positions,
        "cos": cos,
        "sin": sin,
    }


def _layer(config: ModelConfig, block: DecoderBlockWeights, exit_layer: ExitLayerWeights) -> Layer:
    options = _options(config, block)
    common = {
        "input_layernorm": block.input_layernorm,
        "post_attention_layernorm": block.post_attention_layernorm,
        "num_attention_heads": config.num_attention_heads,
        "rms_norm_eps": config.rms_norm_eps,
        **options,
    }
    backbone = {
        "q_proj": block.q_proj,
        "k_proj": block.k_proj,
        "v_proj": block.v_proj,
        "o_proj": block.o_proj,
        "gate_proj": block.gate_proj,
        "up_proj": block.up_proj,
        "down_proj": block.down_proj,
    }
    river = {
        "qkv_proj": exit_layer.qkv_proj,
        "o_proj": exit_layer.o_proj,
        "gate_up_proj": exit_layer.gate_up_proj,
        "down_proj": exit_layer.down_proj,
    }
    tiles = {
        "qkv_tiles": exit_layer.qkv_proj,
        "o_tiles": exit_layer.o_proj,
        "gate_up_tiles": exit_layer.gate_up_proj,
        "down_tiles": exit_layer.down_proj,
    }
    return Layer(
        block=block,
        exit_layer=exit_layer,
        block_args=common | backbone,
        exit_args=common | river,
        dual_args=common | backbone | tiles,
        options=options,
    )


def _options(config: ModelConfig, block: DecoderBlockWeights) -> dict:
    options = {
        "q_bias": block.q_bias,
        "k_bias": block.k_bias,
        "v_bias": block.v_bias,
        "o_bias": block.o_bias,
        "q_norm": block.q_norm,
        "k_norm": block.k_norm,
        "sliding_window": config.sliding_window,
    }
    return {name: value for name, value in options.items() if value is not None}
