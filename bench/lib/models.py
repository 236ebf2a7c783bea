"""The models that are measured: their shapes, what a step of them must read, and the budgets for it."""

import math
from dataclasses import dataclass, replace

import torch

from river_ext import ops
from river_ext.loading.config import ModelConfig
from river_ext.loading.weights import BlockShape

LLAMA_1B = ModelConfig(
    model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
    num_attention_heads=32, num_key_value_heads=8, head_dim=64, rotary_dim=64, rms_norm_eps=1e-5,
    max_position_embeddings=8192, rope_theta=500000.0, rope_scaling=None, tie_word_embeddings=True,
    attention_bias=False, dtype=torch.bfloat16, bos_token_id=None, eos_token_ids=(),
)  # fmt: skip

CONFIGS = {
    "1B": replace(LLAMA_1B, max_position_embeddings=16384),
    "8B": replace(
        LLAMA_1B, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128,
        rotary_dim=128, max_position_embeddings=16384,
    ),  # its head is not tied, which changes no byte of a step
}  # fmt: skip

# (out_features, in_features) of the linears of one layer, as the kernels see them
LAYER_SHAPES = {
    f"{model} {name.removesuffix('_proj')}": size
    for model, config in CONFIGS.items()
    for name, size in BlockShape.of(config).packed().items()
}

# for checks and sanitizers: odd sizes, and little of everything
TINY = replace(
    LLAMA_1B, vocab_size=300, hidden_size=192, intermediate_size=88, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=2, head_dim=32, rotary_dim=32, max_position_embeddings=1024,
)  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """A row of the design's table: batch 1, context 1k. A floor is bytes over the ring's ceiling there."""

    model: str
    depth: int  # of exit; the number of layers: full bf16, 0: full W4
    goal: float  # times the floor
    best_public: str


BUDGETS = [
    Budget("1B", 16, 1.08, "H100 973 us, H200 760 us (persistent kernel)"),
    Budget("8B", 32, 1.05, "H100 5.5 ms (82 % of bandwidth)"),
    Budget("8B", 4, 1.07, "none"),
    Budget("8B", 0, 1.08, "none"),
    Budget("1B", 3, 1.15, "none"),
]


@dataclass(frozen=True)
class CycleBudget:
    """The same of a lossless cycle, whose floor is the bytes of its drafts and of their verification."""

    model: str
    drafts: int
    goal: float  # times the floor
    acceptance: float  # of drafts, at which
    speed_up: float  # is so many times the speed of full bf16 steps


CYCLE_BUDGET = CycleBudget("8B", drafts=4, goal=1.06, acceptance=0.93, speed_up=1.9)


def layer_bytes(config: ModelConfig) -> tuple[int, int]:
    """(bf16 decoder block, W4 exit layer), norms not counted."""
    shape, itemsize = BlockShape.of(config), config.dtype.itemsize
    dense = sum(itemsize * math.prod(size) for size in shape.projections().values())
    packed = sum(math.prod(tiles) for tiles in shape.tiles().values())
    return dense, packed


def step_bytes(config: ModelConfig, depth: int, context: int, rows: int = 1) -> int:
    """What a step must read: the weights once, and the cache of every row."""
    block, exit_layer = layer_bytes(config)
    layers = config.num_hidden_layers
    head = config.vocab_size * config.hidden_size
    cache = layers * rows * context * 2 * config.num_key_value_heads * config.head_dim  # K and V
    return depth * block + (layers - depth) * exit_layer + (head + cache) * config.dtype.itemsize


def mixed_bytes(config: ModelConfig, depth: int, context: int, rows: int) -> int:
    """The same where some rows leave at a depth and others do not: what follows reads both layers."""
    layers = config.num_hidden_layers
    return step_bytes(config, layers, context, rows) + (layers - depth) * layer_bytes(config)[1]


def cycle_bytes(config: ModelConfig, drafts: int, context: int, requests: int = 1) -> int:
    """What a lossless cycle must read: the river and its 4-bit head for each draft, then the backbone once.

    The rows of a request share its cache.
    """
    head = config.vocab_size, config.hidden_size
    river_head = math.prod(ops.packed_shape(*head)) - math.prod(head) * config.dtype.itemsize
    draft = step_bytes(config, 0, context, requests) + river_head
    return step_bytes(config, config.num_hidden_layers, context, requests) + drafts * draft


def tokens_of_cycle(drafts: int, acceptance: float) -> float:
    """New tokens of a request on average, where a draft behind right ones is right that often."""
    return sum(acceptance**right for right in range(drafts + 1))


def exit_depths(config: ModelConfig) -> list[int]:
    """Those that are measured: full bf16 first, full W4 last."""
    layers = config.num_hidden_layers
    return [layers, *sorted({1, 2, 3, 4, 8, layers // 2}, reverse=True), 0]
