"""How far is a river from its backbone? The errors of its weights."""

import torch
from torch import Tensor

from .. import ops
from ..loading.config import ModelConfig
from ..loading.weights import BlockShape, ExitLayerWeights, ModelWeights
from .exit_river import HEAD, ExitRiver
from .w4 import split_gate_up, split_qkv

STRIPS_AT_A_TIME = 512  # of a head, which in fp32 would be larger than all else


def quantisation_errors(config: ModelConfig, weights: ModelWeights, river: ExitRiver) -> dict[str, float]:
    """By projection, over all layers, and of the head: the mean square of the errors of a river's weights, in
    parts of the weights' own."""
    shape = BlockShape.of(config)
    sums = {name: [0.0, 0.0] for name in (*shape.projections(), HEAD)}

    def add(name: str, weight: Tensor, stored: Tensor) -> None:
        sums[name][0] += (weight.float() - stored).square().sum().item()
        sums[name][1] += weight.float().square().sum().item()

    for block, exit_layer in zip(weights.layers, river, strict=True):
        for name, stored in dense_projections(exit_layer, shape).items():
            add(name, getattr(block, name), stored)
    rows = weights.lm_head.split(STRIPS_AT_A_TIME * ops.TILE_ROWS)
    for part, packed in zip(rows, river.lm_head.split(STRIPS_AT_A_TIME), strict=True):
        add(HEAD, part, ops.dequantize_w4(packed, *part.shape, torch.float32))
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
