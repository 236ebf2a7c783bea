"""GGUF files: the header, read and checked here, and tensors in fp32 by the package `gguf`.

    "GGUF", version, number of tensors, number of values
    values:   key, type, value; an array is the type of its items, their number, and the items
    tensors:  name, dimensions (the innermost first), type, offset from the start of the data
    the data, aligned

The package's own reader believes what a header says, and loops over whatever length stands there. Here no
length is believed that the file cannot hold, before anything of that length is made.
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import RiverError
from .files import open_regular

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_ITEMS = 1 << 22  # of an array; vocabularies are the longest
MAX_TENSORS, MAX_DIMENSIONS = 1 << 16, 4
ALIGNMENT_KEY, DEFAULT_ALIGNMENT = "general.alignment", 32
BYTES_AT_A_TIME = 1 << 24  # that become fp32
NOT_QUANTISED = ("F32", "F16", "BF16", "F64")


class _Malformed(Exception):
    """What is wrong with a header, as the end of a sentence that begins with the file's name."""


@dataclass(frozen=True)
class GgufTensor:
    path: Path
    name: str
    kind: str  # as ggml names it: "F32", "Q4_1"
    shape: tuple[int, ...]  # the innermost dimension last, as in torch
    data: np.ndarray  # uint8 [rows, bytes of a row], a view of the mapped file

    @property
    def quantised(self) -> bool:
        return self.kind not in NOT_QUANTISED

    def read(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor, dequantised in fp32 and then rounded to dtype."""
        gguf = import_gguf(self.path)
        kind = gguf.GGMLQuantizationType[self.kind]
        result = torch.empty(len(self.data), self.shape[-1], dtype=dtype)
        rows = max(1, BYTES_AT_A_TIME // max(1, self.data.shape[1]))
        for start in range(0, len(self.data), rows):
            part = np.ascontiguousarray(self.data[start : start + rows])
            try:
                with np.errstate(all="ignore"):  # what is not finite is found by who asks for the tensor
                    dense = np.require(gguf.quants.dequantize(part, kind), np.float32, "CW")
            except Exception as error:
                why = f"{type(error).__name__}: {str(error)[:100]}"
                raise RiverError(
                    f"{self.path}: tensor {self.name} is stored as {self.kind}, which the package gguf "
                    f"does not dequantise ({why})"
                ) from None
            result[start : start + rows] = torch.from_numpy(dense)
        return result.view(self.shape)


@dataclass(frozen=True)
class GgufFile:
    path: Path
    metadata: dict
    tensors: dict[str, GgufTensor]

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        """Maps a file and reads its header; no tensor is read."""
        gguf = import_gguf(path)
        sizes = {kind.value: (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
        try:
            return cls(path, *_Header(path, _mapped(path), sizes).read())
        except _Malformed as error:
            raise RiverError(f"{path}: not a complete GGUF file ({error})") from None


def names_gguf(path) -> bool:
    """Whether a path is meant to be a GGUF file, rather than a directory."""
    return str(path).lower().endswith(".gguf") and not Path(path).is_dir()


def _mapped(path: Path) -> memoryview:
    with open_regular(path) as file:
        try:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise RiverError(f"{path}: cannot be mapped ({error})") from None


def import_gguf(path: Path):
    try:
        import gguf
    except ImportError:
        raise RiverError(
            f"{path}: reading it takes the package gguf; install it, or river_ext[gguf]"
        ) from None
    return gguf


class _Header:
    """Reads a header from start to end; `place` is where it is."""

    def __init__(self, path: Path, data: memoryview, sizes: dict[int, tuple[str, int, int]]):
        """sizes: name, values of a block and bytes of a block, of every type of a tensor."""
        self.path, self.data, self.sizes, self.place = path, data, sizes, 0

    def read(self) -> tuple[dict, dict[str, GgufTensor]]:
        if self._bytes(4, "the magic") != MAGIC:
            raise _Malformed("it does not begin with GGUF")
        version = self._scalar("I")
        if version not in VERSIONS:
            raise _Malformed(f"version {version}; accepted: {', '.join(map(str, VERSIONS))}, little-endian")
        tensors, values = self._scalar("Q"), self._scalar("Q")
        if tensors > MAX_TENSORS:
            raise _Malformed(f"{tensors} tensors; accepted: up to {MAX_TENSORS}")
        metadata: dict = {}
        for _ in range(values):
            self._add(metadata, self._string(), lambda: self._value(self._scalar("I")))
        described: dict = {}
        for _ in range(tensors):
            self._add(described, self._string(), self._description)
        start = self._start_of_data(metadata)
        return metadata, {name: self._tensor(name, start, *what) for name, what in described.items()}

    def _add(self, found: dict, key: str, value: Callable) -> None:
        if key in found:
            raise _Malformed(f"{key[:80]} is there twice")
        found[key] = value()

    def _bytes(self, count: int, what: str) -> memoryview:
        end = self.place + count
        if end > len(self.data):
            raise _Malformed(f"{what} of {count} bytes at byte {self.place} passes the end, {len(self.data)}")
        self.place, start = end, self.place
        return self.data[start:end]

    def _scalar(self, form: str):
        return struct.unpack("<" + form, self._bytes(struct.calcsize("<" + form), "a number"))[0]

    def _string(self) -> str:
        try:
            return str(self._bytes(self._scalar("Q"), "a string"), "utf-8")
        except UnicodeDecodeError:
            raise _Malformed(f"the string before byte {self.place} is no UTF-8") from None

    def _value(self, kind: int):
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._scalar(self._form(kind))
        kind, count = self._scalar("I"), self._scalar("Q")
        if count > MAX_ITEMS:
            raise _Malformed(f"an array of {count} items; accepted: up to {MAX_ITEMS}")
        if kind == STRING:
            return [self._string() for _ in range(count)]
        form = f"<{count}{self._form(kind)}"
        return list(struct.unpack(form, self._bytes(struct.calcsize(form), "an array")))

    def _form(self, kind: int) -> str:
        if kind not in SCALARS:
            raise _Malformed(f"a value of type {kind} before byte {self.place}; such a type is not known")
        return SCALARS[kind]

    def _description(self) -> tuple[tuple[int, ...], int, int]:
        """Shape, type and offset of a tensor."""
        dimensions = self._scalar("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _Malformed(f"a tensor of {dimensions} dimensions; accepted: 1 to {MAX_DIMENSIONS}")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))
        return shape[::-1], self._scalar("I"), self._scalar("Q")

    def _start_of_data(self, metadata: dict) -> int:
        alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise _Malformed(f"{ALIGNMENT_KEY} is {str(alignment)[:40]}; accepted: a power of two")
        return -(-self.place // alignment) * alignment

    def _tensor(self, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        if kind not in self.sizes:
            raise _Malformed(f"tensor {name[:80]} is of type {kind}, which the package gguf does not know")
        kind_name, block, block_bytes = self.sizes[kind]
        if 0 in shape or shape[-1] % block:
            raise _Malformed(f"tensor {name[:80]} has shape {list(shape)}; {kind_name} has blocks of {block}")
        row_bytes = shape[-1] // block * block_bytes
        rows = 1
        for size in shape[:-1]:
            rows *= size
        self.place = start + offset
        data = np.frombuffer(self._bytes(rows * row_bytes, f"tensor {name[:80]}"), np.uint8)
        return GgufTensor(self.path, name, kind_name, shape, data.reshape(rows, row_bytes))
