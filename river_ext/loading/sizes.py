"""What a model takes, by its configuration alone: parameters, and bytes of backbone, river and KV cache."""

import math

from ..ops import packed_shape
from .checkpoint import tensor_shapes
from .config import ModelConfig
from .weights import BlockShape


def parameters(config: ModelConfig) -> int:
    """Numbers in the backbone's tensors; a tied head counts once."""
    return sum(map(math.prod, tensor_shapes(config).values()))


def model_bytes(config: ModelConfig) -> dict[str, int]:
    """Bytes by part of the model in config.dtype, and of its river in W4 tiles, padding included."""
    shapes, item = tensor_shapes(config), config.dtype.itemsize
    layers = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("model.layers."))
    tiles = BlockShape.of(config).tiles().values()
    return {
        "backbone": layers * item,
        "embedding_and_head": (parameters(config) - layers) * item,
        "river": config.num_hidden_layers * sum(map(math.prod, tiles)),
        "river_head": math.prod(packed_shape(config.vocab_size, config.hidden_size)),
    }


def kv_bytes_per_token(config: ModelConfig) -> int:
    """Of the KV cache, in config.dtype."""
    values = 2 * config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * values * config.dtype.itemsize
