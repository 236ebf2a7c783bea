"""The models of the GPU benchmarks: shapes of Llama-3.2-1B and Llama-3.1-8B with random weights, what a step
of them must read, and the design's budgets for it. And the plainest peer: the same step in torch, on cuBLAS.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from bench.cpu.decode import LLAMA_1B, random_river, random_weights
from river_ext.engine.cache import KVCache
from river_ext.engine.network import Network
from river_ext.loading.config import ModelConfig
from river_ext.quant import w4

CONFIGS = {
    "1B": replace(LLAMA_1B, max_position_embeddings=16384),
    "8B": replace(
        LLAMA_1B, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128,
        rotary_dim=128, max_position_embeddings=16384,
    ),  # its head is not tied, which changes no byte of a step
}  # fmt: skip


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
CONTROL_GOAL_US = 3.0  # of decisions and control per token; the paper: 100


def layer_bytes(config: ModelConfig) -> tuple[int, int]:
    """(bf16 decoder block, W4 exit layer), norms not counted."""
    shape = w4.BlockShape.of(config)
    dense = sum(2 * n * k for n, k in shape.projections().values())
    packed = sum(n * k * 576 // 1024 for n, k in shape.packed().values())
    return dense, packed


def step_bytes(config: ModelConfig, depth: int, context: int, rows: int = 1) -> int:
    """What a step must read: the weights once, and the cache of every row."""
    block, exit_layer = layer_bytes(config)
    layers = config.num_hidden_layers
    head = 2 * config.vocab_size * config.hidden_size
    cache = layers * rows * context * 2 * config.num_key_value_heads * config.head_dim * 2
    return depth * block + (layers - depth) * exit_layer + head + cache


def exit_depths(config: ModelConfig) -> list[int]:
    """Those that are measured: full bf16 first, full W4 last."""
    layers = config.num_hidden_layers
    return [layers, *sorted({1, 2, 3, 4, 8, layers // 2}, reverse=True), 0]


def random_network(config: ModelConfig, device: str = "cuda") -> Network:
    with torch.device(device):
        return Network(config, random_weights(config), random_river(config))


def fill_cache(cache: KVCache) -> None:
    """Random, as a cache of zeros could be faster than real ones."""
    for tensor in (*cache.k, *cache.v):
        tensor.normal_()


# ---- the step in plain torch ------------------------------------------------------------------------


class TorchStep:
    """One token for every row in plain torch: fused projections, a static cache, no exits. Greedy."""

    def __init__(self, network: Network, rows: int, context: int):
        config, device = network.config, network.device
        self.network, self.context = network, context
        self.shape = (rows, -1, 1, config.head_dim)
        self.qkv = [torch.cat([b.q_proj, b.k_proj, b.v_proj]) for b, *_ in network.layers]
        self.gate_up = [torch.cat([b.gate_proj, b.up_proj]) for b, *_ in network.layers]
        self.cache = KVCache(config, rows, context + 1, network.dtype, device)
        fill_cache(self.cache)
        self.position = torch.tensor([context], device=device)
        cos, sin = (table[context].to(network.dtype) for table in network.rope(context + 1))
        self.cos, self.sin = torch.cat([cos, cos]), torch.cat([sin, sin])
        self.tokens = torch.randint(0, config.vocab_size, (rows,), device=device)
        kv = config.num_key_value_heads * config.head_dim
        self.sizes = [config.num_attention_heads * config.head_dim, kv, kv]

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], dim=-1) * self.sin

    def layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        block, eps = self.network.layers[index].block, self.network.config.rms_norm_eps
        k_cache, v_cache = self.cache.layer(index)
        x = rms_norm(hidden, hidden.shape[1:], block.input_layernorm, eps)
        q, k, v = (part.view(self.shape) for part in linear(x, self.qkv[index]).split(self.sizes, dim=1))
        k_cache.index_copy_(2, self.position, self.rotate(k))
        v_cache.index_copy_(2, self.position, v)
        attended = scaled_dot_product_attention(self.rotate(q), k_cache, v_cache, enable_gqa=True)
        hidden = hidden + linear(attended.flatten(1), block.o_proj)
        x = rms_norm(hidden, hidden.shape[1:], block.post_attention_layernorm, eps)
        gate, up = linear(x, self.gate_up[index]).chunk(2, dim=1)
        return hidden + linear(silu(gate) * up, block.down_proj)

    @torch.inference_mode()
    def __call__(self) -> None:
        network = self.network
        hidden = embedding(self.tokens, network.embed_tokens)
        for index in range(len(network.layers)):
            hidden = self.layer(index, hidden)
        x = rms_norm(hidden, hidden.shape[1:], network.norm, network.config.rms_norm_eps)
        self.tokens.copy_(linear(x, network.lm_head).argmax(dim=1))
