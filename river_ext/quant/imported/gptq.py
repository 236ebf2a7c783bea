"""GPTQ as AutoGPTQ and GPTQModel store it. For a weight of K columns, N rows and groups of g columns:

    qweight  int32 [K / 8, N]      eight columns in a word, the first in the lowest nibble
    qzeros   int32 [K / g, N / 8]  eight rows in a word; the format "gptq" holds zero - 1 there, and
                                   "gptq_v2" the zero itself
    scales   fp16  [K / g, N]
    g_idx    int32 [K]             the group of each column: without desc_act, k // g

They stand for

    W[n, k] = (q[k, n] - zero[k // g, n]) * scale[k // g, n]
"""

from ...loading.json_object import Reader
from .grid import Grid, nibbles, words
from .source import FLOATS, PackedCheckpoint

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # by format
FORMAT_KEYS = ("checkpoint_format", "format")  # older and newer programs write one of them, or both


class Gptq(PackedCheckpoint):
    name, method = "GPTQ", "gptq"
    parts = ("qweight", "qzeros", "scales")

    def read_settings(self, settings: Reader) -> int:
        settings.exactly("bits", 4)
        if settings.boolean("desc_act", False):
            settings.fail("desc_act", "false")
        formats = {settings.choice(key, ZERO_OFFSETS) for key in FORMAT_KEYS if key in settings.values}
        if len(formats) > 1:
            settings.fail("format", "what checkpoint_format is")
        self.zero_offset = ZERO_OFFSETS[formats.pop() if formats else "gptq"]
        return self.group_size_of(settings)

    def unpack(self, prefix: str, rows: int, columns: int, group_size: int) -> Grid:
        groups = columns // group_size
        q = self.take(prefix + "qweight", ("I32",), (words(columns), rows))
        zero = self.take(prefix + "qzeros", ("I32",), (groups, words(rows)))
        scale = self.take(prefix + "scales", FLOATS, (groups, rows))
        self.refuse_other_order(prefix + "g_idx", columns, group_size)
        zero = nibbles(zero)[:, :rows].T.float() + self.zero_offset
        return Grid(nibbles(q.T)[:, :columns], scale.T.float(), zero, group_size)
