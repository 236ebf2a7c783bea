"""How far is a river from its backbone? The errors of its weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..loading.config import ModelConfig
from ..loading.weights import BlockShape, ExitLayerWeights, ModelWeights
from .w4 import split_gate_up, split_qkv


def quantisation_errors(
    config: ModelConfig, weights: ModelWeights, river: Sequence[ExitLayerWeights]
) -> dict[str, float]:
    """By projection: the mean square of a river's errors in parts of that of the weights, over all layers."""
    shape = BlockShape.of(config)
    sums = {name: [0.0, 0.0] for name in shape.projections()}
    for block, exit_layer in zip(weights.layers, river, strict=True):
        for name, stored in dense_projections(exit_layer, shape).items():
            weight = getattr(block, name).float()
            sums[name][0] += (weight - stored).square().sum().item()
            sums[name][1] += weight.square().sum().item()
    return {name: errors / squares if squares else 0.0 for name, (errors, squares) in sums.items()}


def dense_projections(exit_layer: ExitLayerWeights, shape: BlockShape) -> dict[str, Tensor]:
    """The seven projections of an exit layer in fp32, by their names in `DecoderBlockWeights`."""
    sizes = shape.projections()
    q, k, v = split_qkv(exit_layer.qkv_proj, shape)
    gate, up = split_gate_up(exit_layer.gate_up_proj, shape)
    inner = shape.intermediate_size
    return {
        "q_proj": q,
        "k_proj": k,
        "v_proj": v,
        "o_proj": ops.dequantize_w4(exit_layer.o_proj, *sizes["o_proj"], torch.float32),
        "gate_proj": gate[:inner],
        "up_proj": up[:inner],
        "down_proj": ops.dequantize_w4(exit_layer.down_proj, *sizes["down_proj"], torch.float32),
    }
