"""compressed-tensors, format "pack-quantized". For a weight of K columns, N rows and G groups of a row:

    weight_packed      int32 [N, ceil(K / 8)]   eight columns in a word, the first in the lowest nibble
    weight_scale       float [N, G]             G is 1 where the strategy is "channel"
    weight_zero_point  int32 [ceil(N / 8), G]   eight rows in a word; only where it is not symmetric
    weight_shape       int64 [2]                N, K
    weight_g_idx       int32 [K]                only where columns are ordered by activations

Numbers are signed, -8 to 7, and stored plus 8; so are the zeros, whose 8 cancels that of the numbers:

    W[n, k] = (stored[n, k] - stored_zero[n, k // g]) * scale[n, k // g], a symmetric zero being 8
"""

import torch
from torch import Tensor

from ...errors import RiverError
from ...loading.json_object import Reader
from .grid import Grid, nibbles, words
from .source import FLOATS, MAX_GROUP, PackedCheckpoint

OFFSET = 8.0


class CompressedTensors(PackedCheckpoint):
    name, method = "compressed-tensors", "compressed-tensors"
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

    def read_settings(self, settings: Reader) -> int:
        settings.exactly("format", "pack-quantized")
        groups = settings.values.get("config_groups")
        if not isinstance(groups, dict) or len(groups) != 1:
            settings.fail("config_groups", "one group, whose weights all have the same scheme")
        ((name, group),) = groups.items()
        weights = group.get("weights") if isinstance(group, dict) else None
        prefix = f"{settings.prefix}config_groups.{name[:40]}."
        if not isinstance(weights, dict):
            Reader(settings.path, {"weights": weights}, prefix).fail("weights", "an object")
        scheme = Reader(settings.path, weights, f"{prefix}weights.")
        scheme.exactly("num_bits", 4)
        scheme.exactly("type", "int")
        self.symmetric = scheme.boolean("symmetric", True)
        if weights.get("actorder") not in (None, False, "weight", "static"):  # these leave groups as they are
            scheme.fail("actorder", 'null, "weight" or "static": groups of neighbours')
        if scheme.choice("strategy", ("group", "channel")) == "channel":
            return -1
        return scheme.integer("group_size", 1, MAX_GROUP)

    def unpack(self, prefix: str, rows: int, columns: int, group_size: int) -> Grid:
        groups = columns // group_size
        shape = self.take(prefix + "weight_shape", ("I64", "I32"), (2,)).tolist()
        if shape != [rows, columns]:
            raise RiverError(f"{self.path}: {prefix}weight_shape is {shape}; accepted: {[rows, columns]}")
        q = self.take(prefix + "weight_packed", ("I32",), (rows, words(columns)))
        scale = self.take(prefix + "weight_scale", FLOATS, (rows, groups)).float()
        self.refuse_other_order(prefix + "weight_g_idx", columns, group_size)
        return Grid(nibbles(q)[:, :columns], scale, self._zero(prefix, rows, groups), group_size)

    def _zero(self, prefix: str, rows: int, groups: int) -> Tensor:
        if self.symmetric:
            return torch.full((rows, groups), OFFSET)
        packed = self.take(prefix + "weight_zero_point", ("I32",), (words(rows), groups))
        return nibbles(packed.T)[:, :rows].T.float()
