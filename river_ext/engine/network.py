"""The network: every weight of backbone and river, arranged once as the ops take them."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..errors import RiverError
from ..loading.config import ModelConfig
from ..loading.rope import query_scales, rope_tables, unrotated_tables
from ..loading.weights import DecoderBlockWeights, ExitLayerWeights, ModelWeights
from ..quant.exit_river import ExitRiver
from .cache import KVCache
from .cpu_graph import call


class Rope(NamedTuple):
    """What depends on a row's position: fp32 tables of as many positions as the cache has, or more."""

    cos: Tensor  # [positions, rotary_dim / 2]
    sin: Tensor
    unrotated: tuple[Tensor, Tensor] | None  # cos and sin of layers without RoPE, if there are any
    query_scale: Tensor | None  # [positions]


class Place(NamedTuple):
    """Where the rows of a step are."""

    cache: KVCache
    slots: Tensor  # int32 [T]; -1: the row is inactive, and its hidden state is copied through
    positions: Tensor  # int32 [T]
    rope: Rope
    kv_valid: Tensor | None = None  # bool [slots, max_len]; None: K and V are there at all positions


class Decision(NamedTuple):
    """What `ops.dual_layer` decides by, and where it writes that down; its shapes are those of the op."""

    thresholds: Tensor
    min_layers: Tensor
    limit: Tensor
    exited: Tensor
    similarities: Tensor
    together: bool


class Layer:
    """One depth: the backbone's decoder block, its exit layer, and the choice between them.

    hidden is [T, hidden_size] throughout. Every call writes K and V of its active rows.
    """

    def __init__(
        self, index: int, config: ModelConfig, weights: DecoderBlockWeights, river: ExitLayerWeights
    ):
        self.index, self.weights, self.river = index, weights, river
        # what not every model has
        self.options = {
            name: value
            for name in ("q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm")
            if (value := getattr(weights, name)) is not None
        }
        if config.sliding_window is not None and index not in config.full_attention_layers:
            self.options["sliding_window"] = config.sliding_window
        self._rotates = index not in config.nope_layers
        self._common = {
            "input_layernorm": weights.input_layernorm,
            "post_attention_layernorm": weights.post_attention_layernorm,
            "num_attention_heads": config.num_attention_heads,
            "rms_norm_eps": config.rms_norm_eps,
            "softmax_scale": config.softmax_scale,
            "residual_multiplier": config.residual_multiplier,
            **self.options,
        }
        names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        self._dense = {name: getattr(weights, name) for name in names}
        self._packed = vars(river)
        tiles = {name.replace("proj", "tiles"): tiles for name, tiles in vars(river).items()}
        self._both = self._dense | tiles

    def block(self, hidden: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Rows through the decoder block: hidden and similarity [T]."""
        return ops.decoder_block(hidden=hidden, **self._dense, **self._common, **self._at(place))

    def exit(self, hidden: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """The same through the exit layer."""
        return ops.exit_layer(hidden=hidden, **self._packed, **self._common, **self._at(place))

    def dual(self, hidden: Tensor, previous: Tensor | None, decision: Decision, place: Place) -> Tensor:
        """Each row by the path that the device chooses; previous [T, hidden_size] went into layer - 1."""
        return ops.dual_layer(
            index=self.index, hidden=hidden, previous=previous, **decision._asdict(),
            **self._both, **self._common, **self._at(place),
        )  # fmt: skip

    def tables(self, rope: Rope) -> dict[str, Tensor | None]:
        """Those that this layer takes, as arguments of the ops."""
        cos, sin = (rope.cos, rope.sin) if self._rotates else rope.unrotated
        return {"cos": cos, "sin": sin, "query_scale": rope.query_scale}

    def _at(self, place: Place) -> dict:
        k_cache, v_cache = place.cache.layer(self.index)
        return {
            "k_cache": k_cache,
            "v_cache": v_cache,
            "slots": place.slots,
            "positions": place.positions,
            "kv_valid": place.kv_valid,
            **self.tables(place.rope),
        }


class Network:
    """Backbone, exit river, embedding and heads of one model on one device."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, river: ExitRiver):
        if not len(river) == len(weights.layers) == config.num_hidden_layers:
            raise RiverError(
                f"the river has {len(river)} exit layers and the backbone {len(weights.layers)} layers; "
                f"both need {config.num_hidden_layers}"
            )
        self.config = config
        self.embed_tokens, self.norm, self.lm_head = weights.embed_tokens, weights.norm, weights.lm_head
        pairs = zip(weights.layers, river, strict=True)
        self.layers = [Layer(index, config, *pair) for index, pair in enumerate(pairs)]
        self.first_fetched = config.num_hidden_layers  # layers from this one on need `fetch`
        self.lm_head_w4 = river.lm_head
        self.river_head_bytes = (self.lm_head if self.lm_head_w4 is None else self.lm_head_w4).nbytes
        self.dtype, self.device = weights.embed_tokens.dtype, weights.embed_tokens.device
        own = (self.embed_tokens, self.norm, self.lm_head, self.lm_head_w4)
        parts = [part for layer in self.layers for part in (layer.weights, layer.river)]
        named = [weight for part in parts for weight in vars(part).values()]
        self._weights = [weight for weight in (*own, *named) if weight is not None]
        self._rope = self._tables(0)

    def embed(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.embedding(tokens, self.embed_tokens)

    def addresses(self) -> list[int]:
        """Of the weights; `weight.data = ...` gives one another."""
        return [weight.data_ptr() for weight in self._weights]

    def fetch(self, index: int, depth: int) -> None:
        """Comes before the decoder block of a layer, for work that is given to the current stream.

        depth: the backbone layers up to there follow for certain. Here all weights are where ops read them.
        """

    def synchronise(self) -> None:
        """Waits for the copies that `fetch` has begun."""

    def head(self, hidden: Tensor, river_head: bool | Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
        """What `ops.lm_head` gives, by the model's head or by the river's, if it was saved with one.

        With river_head bool [T], both run, and each row has what its own gives.
        """
        if isinstance(river_head, Tensor):
            outputs = self.head(hidden, False, **options)
            of_river = self.head(hidden, True, **options)
            for ours, others in zip(outputs, of_river, strict=True):
                rows = river_head[: len(ours)]  # none of the logits, where they are not wanted
                rows = rows[:, None] if ours.dim() == 2 else rows
                call(partial(torch.where, rows, others, ours, out=ours))
            return outputs
        config = self.config
        options |= {"rms_norm_eps": config.rms_norm_eps, "logits_scaling": config.logits_scaling}
        if river_head and self.lm_head_w4 is not None:
            return ops.lm_head_w4(hidden, self.norm, self.lm_head_w4, config.vocab_size, **options)
        return ops.lm_head(hidden, self.norm, self.lm_head, **options)

    def check_river_head(self) -> None:
        """Refuses a river that was saved without a head, where that is wanted."""
        if self.lm_head_w4 is None:
            raise RiverError(
                "river_head='w4' needs a river with a head, and this one was saved without; accepted: "
                "river_head='model', or a river that `river convert` writes anew"
            )

    def rope(self, max_len: int) -> Rope:
        """The tables for decoding, of at least max_len positions.

        Their rows never change, and longer tables are new tensors: a graph keeps those it was captured with.
        """
        rope = self._rope  # which another thread may change meanwhile
        if max_len > len(rope.cos):
            rope = self._rope = self._tables(1 << (max_len - 1).bit_length())
        return rope

    def prompt_rope(self, length: int, max_len: int) -> Rope:
        """The same for a prompt, whose tokens may all see the whole prompt's length."""
        return self._tables(max_len, length) if self.rotation(length) else self.rope(max_len)

    def rotation(self, length: int) -> int:
        """Prompts with the same number rotate alike; 0: as sequences of any shorter length do."""
        longest = self.config.longest_unscaled
        if longest is None or length <= longest:
            return 0
        return 1 if self.config.rotates_anew_after else length

    def _tables(self, max_len: int, seq_len: int | None = None) -> Rope:
        rotated = rope_tables(self.config, max_len, seq_len, self.device)
        return Rope(
            *rotated,
            unrotated=unrotated_tables(rotated) if self.config.nope_layers else None,
            query_scale=query_scales(self.config, max_len, self.device),
        )
