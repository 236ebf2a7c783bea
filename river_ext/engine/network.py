"""The network: every weight of backbone and river, arranged once as the ops take them."""

from collections import deque
from dataclasses import MISSING, fields
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
# thresholds, min_layers, limit, exited and similarities of ops.dual_layer
Decision = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Layer(NamedTuple):
    """One depth: the backbone's decoder block and its exit layer, and how the ops take them."""

    block: DecoderBlockWeights
    exit_layer: ExitLayerWeights
    block_args: tuple[Tensor, ...]  # the weights of ops.decoder_block, in its order
    exit_args: tuple[Tensor, ...]  # the weights of ops.exit_layer, in its order
    dual_args: tuple[Tensor, ...]  # the weights of ops.dual_layer, in its order
    options: dict  # keyword arguments of all three: biases, q/k norms, sliding window


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
        layer, config = self.layers[index], self.config
        return ops.decoder_block(
            hidden, *layer.block_args, *cache.layer(index), slots, positions, *rope,
            config.num_attention_heads, config.rms_norm_eps, **layer.options,
        )  # fmt: skip

    def exit_layer(
        self, index: int, hidden: Tensor, cache: KVCache, slots: Tensor, positions: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor]:
        """The same through its exit layer."""
        layer, config = self.layers[index], self.config
        return ops.exit_layer(
            hidden, *layer.exit_args, *cache.layer(index), slots, positions, *rope,
            config.num_attention_heads, config.rms_norm_eps, **layer.options,
        )  # fmt: skip

    def dual_layer(
        self, index: int, hidden: Tensor, previous: Tensor | None, decision: Decision,
        cache: KVCache, slots: Tensor, positions: Tensor, rope: Rope,
    ) -> Tensor:  # fmt: skip
        """The same by the path that the device chooses; previous [T, hidden_size] went into the last."""
        layer, config = self.layers[index], self.config
        return ops.dual_layer(
            index, hidden, previous, *decision, *layer.dual_args, *cache.layer(index), slots, positions,
            *rope, config.num_attention_heads, config.rms_norm_eps, **layer.options,
        )  # fmt: skip


def _layer(config: ModelConfig, block: DecoderBlockWeights, exit_layer: ExitLayerWeights) -> Layer:
    tensors = {field.name: getattr(block, field.name) for field in fields(block)}
    required = [field.name for field in fields(block) if field.default is MISSING]
    block_args = tuple(tensors.pop(name) for name in required)
    exit_args = (
        block.input_layernorm,
        exit_layer.qkv_proj,
        exit_layer.o_proj,
        block.post_attention_layernorm,
        exit_layer.gate_up_proj,
        exit_layer.down_proj,
    )
    tiles = (exit_layer.qkv_proj, exit_layer.o_proj, exit_layer.gate_up_proj, exit_layer.down_proj)
    options = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if config.sliding_window is not None:
        options["sliding_window"] = config.sliding_window
    return Layer(block, exit_layer, block_args, exit_args, block_args + tiles, options)
