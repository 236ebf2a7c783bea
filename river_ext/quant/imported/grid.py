"""A weight on a 4-bit grid, as all of the imported formats have it once it is unpacked."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import TILE_COLS
from ..w4 import Quantised


@dataclass(frozen=True)
class Grid:
    """W = (q - zero) * scale, with one scale and zero for each row and group of columns."""

    q: Tensor  # uint8 [out_features, in_features], 0..15
    scale: Tensor  # fp32 [out_features, groups]
    zero: Tensor  # fp32 [out_features, groups], integers
    group_size: int  # divides in_features

    def dense(self) -> Tensor:
        """fp32 [out_features, in_features]."""
        scale, zero = (part.repeat_interleave(self.group_size, 1) for part in (self.scale, self.zero))
        return (self.q - zero) * scale

    def to(self, device: torch.device) -> "Grid":
        return Grid(self.q.to(device), self.scale.to(device), self.zero.to(device), self.group_size)

    def part(self, rows: slice) -> "Grid":
        return Grid(self.q[rows], self.scale[rows], self.zero[rows], self.group_size)

    def times(self, rows: Tensor) -> "Grid":
        """The weight with each row times a factor [out_features]."""
        return Grid(self.q, self.scale * rows[:, None], self.zero, self.group_size)

    def in_tiles(self) -> Quantised | None:
        """As a river holds it, a pair of fp16 for each 64 columns; None where groups end inside of a tile."""
        columns = self.q.shape[1]
        if self.group_size % TILE_COLS and self.group_size != columns:
            return None
        groups = torch.arange(0, columns, TILE_COLS, device=self.q.device) // self.group_size
        return self.q, self.scale[:, groups].half(), self.zero[:, groups].half()


def words(numbers: int) -> int:
    """How many int32 hold so many 4-bit numbers."""
    return -(-numbers // 8)


def nibbles(packed: Tensor) -> Tensor:
    """The eight 4-bit numbers of each int32, the lowest first: uint8 [rows, 8 words] of [rows, words]."""
    parts = packed.contiguous().view(torch.uint8)
    return torch.stack((parts & 15, parts >> 4), -1).flatten(1)
