"""Random weights: of a linear, of a model and its river. Quantising would take minutes and change no time."""

import torch

from river_ext import ops
from river_ext.engine.network import Network
from river_ext.loading.config import ModelConfig
from river_ext.loading.weights import BlockShape, DecoderBlockWeights, ExitLayerWeights, ModelWeights
from river_ext.quant.exit_river import ExitRiver


def dense_weight(out_features: int, in_features: int) -> torch.Tensor:
    return torch.randn(out_features, in_features, dtype=torch.bfloat16) * in_features**-0.5


def packed_weight(out_features: int, in_features: int) -> torch.Tensor:
    """Random nibbles with plausible scales: outputs of unit inputs have about unit size."""
    tiles = torch.randint(0, 256, ops.packed_shape(out_features, in_features), dtype=torch.uint8)
    metadata = torch.tensor([0.2 * in_features**-0.5, 7.5]).repeat(ops.TILE_ROWS).half()
    tiles[..., 512:] = metadata.view(torch.uint8)
    return tiles


def random_weights(config: ModelConfig) -> ModelWeights:
    """A backbone without biases and q/k norms; its head is tied."""
    shape = BlockShape.of(config)
    norm = torch.ones(config.hidden_size, dtype=torch.bfloat16)
    layers = [
        DecoderBlockWeights(
            input_layernorm=norm.clone(),
            post_attention_layernorm=norm.clone(),
            **{name: dense_weight(*size) for name, size in shape.projections().items()},
        )
        for _ in range(config.num_hidden_layers)
    ]
    embed_tokens = dense_weight(config.vocab_size, config.hidden_size)
    return ModelWeights(embed_tokens, layers, norm, embed_tokens)


def random_river(config: ModelConfig) -> ExitRiver:
    sizes = BlockShape.of(config).packed()
    layers = [
        ExitLayerWeights(**{name: packed_weight(*size) for name, size in sizes.items()})
        for _ in range(config.num_hidden_layers)
    ]
    return ExitRiver(layers, packed_weight(config.vocab_size, config.hidden_size), ops.TILE_COLS)


def random_network(config: ModelConfig, device: str = "cuda") -> Network:
    with torch.device(device):
        return Network(config, random_weights(config), random_river(config))
