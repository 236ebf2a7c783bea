"""Small models for the engine's tests: random ones built in memory, and the bundled demo model."""

from dataclasses import fields
from functools import cache

import torch

import river_ext
from river_ext.loading.config import ModelConfig
from river_ext.loading.weights import BlockShape, DecoderBlockWeights, ModelWeights
from river_ext.model import Model
from river_ext.quant import exit_river as river

CONFIG = {
    "model_type": "llama",
    "vocab_size": 80,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "dtype": torch.float32,
    "bos_token_id": None,
    "eos_token_ids": (),
    "sliding_window": None,
}
# what a model of Granite has
MULTIPLIERS = {"softmax_scale": 0.1, "residual_multiplier": 0.8, "logits_scaling": 3.0}
BIASES, QK_NORMS = ("q_bias", "k_bias", "v_bias", "o_bias"), ("q_norm", "k_norm")
STRONG = ("q_proj", "k_proj", "down_proj")  # so that attention is sharp, and blocks change what they get


@cache
def random_model(
    seed: int = 0, dtype=torch.float32, biases: bool = False, qk_norm: bool = False, tokenizer=None, **changes
) -> Model:
    """A random model whose greedy text does not repeat itself and whose similarities vary by token."""
    if scaling := changes.get("rope_scaling"):
        changes["rope_scaling"] = dict(scaling)
    config = ModelConfig(**(CONFIG | changes | {"dtype": dtype}))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, mean=0.0):
        return (mean + scale * torch.randn(shape, generator=generator)).to(dtype)

    shapes = BlockShape.of(config).tensors()
    lacking = (() if biases else BIASES) + (() if qk_norm else QK_NORMS)

    def tensor(name):
        *_, columns = shapes[name]
        if name.endswith("norm"):
            return normal(*shapes[name], scale=0.1, mean=1.0)
        if name in BIASES:
            return normal(*shapes[name], scale=0.1 if name == "o_bias" else 1.0)
        return normal(*shapes[name], scale=(2 if name in STRONG else 1) * columns**-0.5)

    def block():
        names = [field.name for field in fields(DecoderBlockWeights) if field.name not in lacking]
        return DecoderBlockWeights(**{name: tensor(name) for name in names})

    hidden = config.hidden_size
    weights = ModelWeights(
        embed_tokens=normal(config.vocab_size, hidden),
        layers=[block() for _ in range(config.num_hidden_layers)],
        norm=normal(hidden, scale=0.1, mean=1.0),
        lm_head=normal(config.vocab_size, hidden, scale=3 * hidden**-0.5),
    )
    return Model(config, weights, river.build_river(config, weights, progress=False), tokenizer)


def random_prompt(length: int, seed: int = 0, vocab_size: int = CONFIG["vocab_size"]) -> list[int]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


@cache
def demo_model() -> Model:
    return river_ext.load(device="cpu")
