"""AWQ, the layout "gemm" of AutoAWQ. For a weight of K columns, N rows and groups of g columns:

    qweight  int32 [K, N / 8]      eight rows in a word, in the order of ORDER from the lowest nibble up
    qzeros   int32 [K / g, N / 8]  packed in the same way
    scales   fp16  [K / g, N]

They stand for

    W[n, k] = (q[k, n] - zero[k // g, n]) * scale[k // g, n]
"""

from torch import Tensor

from ...loading.json_object import Reader
from .grid import Grid, nibbles, words
from .source import FLOATS, PackedCheckpoint

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight rows each nibble holds


class Awq(PackedCheckpoint):
    name, method = "AWQ", "awq"
    parts = ("qweight", "qzeros", "scales")

    def read_settings(self, settings: Reader) -> int:
        settings.exactly("bits", 4)
        settings.exactly("zero_point", True)
        version = settings.values.get("version")
        if not isinstance(version, str) or version.lower() != "gemm":
            settings.fail("version", '"gemm"')
        return self.group_size_of(settings)

    def unpack(self, prefix: str, rows: int, columns: int, group_size: int) -> Grid:
        groups = columns // group_size
        q = self.take(prefix + "qweight", ("I32",), (columns, words(rows)))
        zero = self.take(prefix + "qzeros", ("I32",), (groups, words(rows)))
        scale = self.take(prefix + "scales", FLOATS, (groups, rows))
        return Grid(_rows(q)[:rows], scale.T.float(), _rows(zero)[:rows].float(), group_size)


def _rows(packed: Tensor) -> Tensor:
    """uint8 [N, ...] of int32 [..., N / 8]."""
    places = [ORDER.index(row) for row in range(8)]
    return nibbles(packed).unflatten(1, (-1, 8))[..., places].flatten(1).T.contiguous()
