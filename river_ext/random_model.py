"""A model of random weights in the shape of a config: what is timed where there are no weights.

Its river is random as well. Quantising would take minutes and change no time. So the river agrees with its
backbone no more than chance does: neither its exit depths nor its drafts say anything of a trained model.
"""

import os
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from . import ops
from .errors import RiverError
from .loading.checkpoint import check_gpu_kernels, layer_tensors
from .loading.config import ModelConfig
from .loading.sizes import model_bytes
from .loading.weights import BlockShape, DecoderBlockWeights, ExitLayerWeights, ModelWeights
from .model import Model
from .quant.exit_river import ExitRiver


def dense_weight(out_features: int, in_features: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Outputs of unit inputs have about unit size."""
    return torch.randn(out_features, in_features, dtype=dtype) * in_features**-0.5


def packed_weight(out_features: int, in_features: int) -> Tensor:
    """Random nibbles with plausible scales: outputs of unit inputs have about unit size."""
    tiles = torch.randint(0, 256, ops.packed_shape(out_features, in_features), dtype=torch.uint8)
    metadata = torch.tensor([0.2 * in_features**-0.5, 7.5]).repeat(ops.TILE_ROWS).half()
    tiles[..., 512:] = metadata.view(torch.uint8)
    return tiles


def random_weights(config: ModelConfig) -> ModelWeights:
    """A backbone in config.dtype on torch's default device. Norms are one, biases zero."""
    layers = []
    for layer in range(config.num_hidden_layers):
        fields = chain.from_iterable(held.items() for held in layer_tensors(config, layer).values())
        layers.append(
            DecoderBlockWeights(**{name: _tensor(name, shape, config.dtype) for name, shape in fields})
        )
    embed_tokens = dense_weight(config.vocab_size, config.hidden_size, config.dtype)
    tied = config.tie_word_embeddings
    lm_head = embed_tokens if tied else dense_weight(config.vocab_size, config.hidden_size, config.dtype)
    return ModelWeights(embed_tokens, layers, torch.ones(config.hidden_size, dtype=config.dtype), lm_head)


def _tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if len(shape) == 2:
        return dense_weight(*shape, dtype)
    return torch.full(shape, 0.0 if name.endswith("_bias") else 1.0, dtype=dtype)


def random_river(config: ModelConfig) -> ExitRiver:
    sizes = BlockShape.of(config).packed()
    layers = [
        ExitLayerWeights(**{name: packed_weight(*size) for name, size in sizes.items()})
        for _ in range(config.num_hidden_layers)
    ]
    return ExitRiver(layers, packed_weight(config.vocab_size, config.hidden_size), ops.TILE_COLS)


def check_room(config: ModelConfig, device: torch.device) -> None:
    """Refuses a model that the device's memory cannot hold, before hours of drawing it."""
    needed = sum(model_bytes(config).values())
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise RiverError(
            f"a model of this config and its river take {needed / 1e9:.1f} GB; accepted: at most "
            f"{there / 1e9:.1f} GB, the memory of device {str(device)!r}"
        )


def random_model(config: ModelConfig, device: torch.device, directory: Path | None = None) -> Model:
    """A model without a tokenizer; of a config without a dtype in bfloat16, which most are stored in."""
    config = replace(config, dtype=config.dtype or torch.bfloat16)
    if device.type == "cuda":
        check_gpu_kernels(config)
    check_room(config, device)
    with torch.device(device):
        return Model(config, random_weights(config), random_river(config), directory=directory)
