"""Undoes what quantisers move out of a weight and into what comes before it.

AWQ and its kin make a weight's important columns larger and what gives them their inputs smaller: the norm
before q, k, v, gate and up, the rows of v before o, the rows of up before down. As a whole that is the same
function. But an exit layer has the norms and the KV cache of its backbone layer, so that it needs weights of
the backbone's own scale.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import RiverError
from ...loading.checkpoint import tensor_name
from ...loading.weights import BlockShape, DecoderBlockWeights
from .grid import Grid
from .source import Source

NORM_BEFORE = {
    "q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm",
}  # fmt: skip
SAME_NORM = 2.0**-7  # how far two norms of one model are apart, one of them rounded to bf16
CLEARLY = 0.5  # undoing must leave less of the difference to the backbone, else there was nothing to undo


@dataclass
class ImportedWeight:
    dense: Tensor  # fp32 [out_features, in_features], its columns in the source's scale
    grid: Grid | None  # the same on a 4-bit grid, if it is on one
    quantised: bool  # whether the source has it quantised; else it only tells what was moved
    columns: Tensor | None = None  # [in_features]: what brings its columns to the backbone's scale

    @classmethod
    def read(
        cls, source: Source, layer: int, projection: str, device: torch.device
    ) -> "ImportedWeight | None":
        found = source.quantised(layer, projection)
        if isinstance(found, Grid):
            grid = found.to(device)
            return cls(grid.dense(), grid, True)
        dense = source.plain(layer, projection) if found is None else found
        return None if dense is None else cls(dense.to(device), None, found is not None)

    def scale_rows(self, factors: Tensor) -> None:
        self.dense = self.dense * factors[:, None]
        self.grid = None if self.grid is None else self.grid.times(factors)

    def as_the_backbones(self) -> Tensor:
        return self.dense if self.columns is None else self.dense * self.columns

    def difference(self, own: Tensor) -> float:
        """Mean square of the difference to the backbone's weight, in parts of its mean square.

        Both are taken in the source's scale, in which it has rounded: what it made small it rounded coarsely.
        """
        own = self._in_the_sources_scale(own)
        square = own.square().sum().item()
        error = (self.dense - own).square().sum().item()
        return error / square if square else error

    def row_factors(self, own: Tensor) -> Tensor:
        """What each row is to be multiplied by for the backbone's scale: [out_features].

        A row is the backbone's over its factor, and the error of rounding, which hardly depends on it.
        """
        own = self._in_the_sources_scale(own)
        factors = own.square().sum(1) / (self.dense * own).sum(1)
        sensible = (factors > 0) & factors.isfinite()  # not so for a row without weights
        return torch.where(sensible, factors, 1.0)

    def _in_the_sources_scale(self, own: Tensor) -> Tensor:
        return own.float() if self.columns is None else own.float() / self.columns


def undo_moved_scales(
    weights: dict[str, ImportedWeight],
    source: Source,
    layer: int,
    block: DecoderBlockWeights,
    shape: BlockShape,
) -> None:
    """Brings the weights of a layer, by their projections, to the scale of the backbone's block."""
    for projection, norm in NORM_BEFORE.items():
        if projection in weights:
            weights[projection].columns = _norm_ratio(source, layer, norm, getattr(block, norm))
    _undo_between(weights, block, "v_proj", "o_proj", _rows_of_v(shape))
    _undo_between(weights, block, "up_proj", "down_proj", torch.arange(shape.intermediate_size))


def _norm_ratio(source: Source, layer: int, norm: str, own: Tensor) -> Tensor | None:
    """The source's norm over the backbone's, [hidden_size]; None where they are the same."""
    found = source.plain(layer, norm)
    if found is None:
        raise RiverError(f"{source.path}: tensor {tensor_name(layer, norm)} {list(own.shape)} is missing")
    found, own = found.to(own.device), own.float()
    ratio = torch.where(own == 0, 1.0, found / own)
    return None if (ratio - 1).abs().max() <= SAME_NORM else ratio


def _rows_of_v(shape: BlockShape) -> Tensor:
    """The row of v that each column of o meets: query heads share KV heads."""
    group = shape.num_attention_heads // shape.num_key_value_heads
    heads = torch.arange(shape.num_key_value_heads).repeat_interleave(group)
    return (heads[:, None] * shape.head_dim + torch.arange(shape.head_dim)).flatten()


def _undo_between(
    weights: dict[str, ImportedWeight], block: DecoderBlockWeights, first: str, second: str, rows: Tensor
) -> None:
    """Moves the scales of the first weight's rows back into the second one's columns, if they were moved.

    rows: that of the first weight which each column of the second one meets.
    """
    if first not in weights or second not in weights:
        return
    factors = weights[first].row_factors(getattr(block, first))
    as_it_is, own = weights[second], getattr(block, second)
    moved_back = replace(as_it_is, columns=1 / factors[rows.to(factors.device)])
    if moved_back.difference(own) < CLEARLY * as_it_is.difference(own):
        weights[first].scale_rows(factors)
        weights[second] = moved_back
