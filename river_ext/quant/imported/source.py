"""Where imported weights come from: a directory of safetensors with a quantization_config, or a GGUF file.

A source gives the weights of a layer by the fields of `DecoderBlockWeights`. A Grid is a weight in 4 bits, a
Tensor one that was quantised otherwise and is dequantised here; None is one that the source leaves alone.
"""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from ...errors import RiverError
from ...loading.checkpoint import layer_tensors
from ...loading.config import ModelConfig
from ...loading.json_object import Reader
from ...loading.stored import STORED_DTYPES, StoredTensor
from .grid import Grid

MAX_GROUP = 1 << 20
FLOATS = tuple(STORED_DTYPES)


class Source(ABC):
    path: Path  # what the user gave
    files: list[Path]  # with all weights
    description: str  # "AWQ, groups of 128"

    @abstractmethod
    def quantised(self, layer: int, projection: str) -> Grid | Tensor | None:
        """A projection, if it is quantised; a Tensor is fp32."""

    @abstractmethod
    def plain(self, layer: int, field: str) -> Tensor | None:
        """A norm, or a projection that is not quantised, in fp32; None where it is missing."""

    def dense(self, layer: int, projection: str) -> Tensor | None:
        """A projection in fp32, quantised or not."""
        found = self.quantised(layer, projection)
        if found is None:
            return self.plain(layer, projection)
        return found.dense() if isinstance(found, Grid) else found


class PackedCheckpoint(Source):
    """Safetensors in which several tensors stand for a weight: `...q_proj.qweight` and others."""

    name: str  # of the format
    method: str  # quant_method in config.json
    parts: tuple[str, ...]  # what may follow the weight's name

    def __init__(self, path: Path, settings: Reader, stored: dict[str, StoredTensor], config: ModelConfig):
        """
        Args:
            path: the directory.
            settings: the object of its config.json that describes the quantisation.
            stored: its tensors.
            config: of the backbone.
        """
        self.path, self.stored, self.config = path, stored, config
        self.files = sorted({tensor.path for tensor in stored.values()})
        self.group_size = self.read_settings(settings)
        groups = "one group a row" if self.group_size == -1 else f"groups of {self.group_size}"
        self.description = f"{self.name}, {groups}"

    @abstractmethod
    def read_settings(self, settings: Reader) -> int:
        """Refuses what is not read; returns the group size, -1 for whole rows."""

    @abstractmethod
    def unpack(self, prefix: str, rows: int, columns: int, group_size: int) -> Grid:
        """The weight whose tensors have names that begin with prefix; group_size divides columns."""

    def quantised(self, layer: int, projection: str) -> Grid | None:
        name, (rows, columns), place = self._place(layer, projection)
        prefix = name.removesuffix("weight")
        if not any(prefix + part in self.stored for part in self.parts):
            return None
        group_size = columns if self.group_size == -1 else self.group_size
        if columns % group_size:
            raise RiverError(
                f"{self.path}: groups of {group_size} columns do not divide the {columns} of "
                f"{prefix.removesuffix('.')}; accepted: groups that do"
            )
        grid = self.unpack(prefix, rows, columns, group_size)
        if not grid.scale.isfinite().all():
            raise RiverError(f"{self.path}: {prefix}* has a scale that is not finite")
        return grid.part(place)

    def plain(self, layer: int, field: str) -> Tensor | None:
        name, shape, rows = self._place(layer, field)
        return self.take(name, FLOATS, shape)[rows].float() if name in self.stored else None

    def _place(self, layer: int, field: str) -> tuple[str, tuple[int, ...], slice]:
        """The tensor of the model that holds a field, that tensor's shape, and the field's rows in it."""
        tensors = layer_tensors(self.config, layer).items()
        name, fields = next((name, fields) for name, fields in tensors if field in fields)
        sizes, (own, *columns) = [shape[0] for shape in fields.values()], fields[field]
        start = sum(sizes[: list(fields).index(field)])
        return name, (sum(sizes), *columns), slice(start, start + own)

    def take(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
        """A tensor that must be there, of the shape and of one of the dtypes, as safetensors names them."""
        wanted = f"{' or '.join(dtypes)} {list(shape)}"
        if name not in self.stored:
            raise RiverError(f"{self.path}: tensor {name} {wanted} is missing")
        tensor = self.stored[name]
        if tensor.dtype_name not in dtypes or tensor.shape != tuple(shape):
            found = f"{tensor.dtype_name} {list(tensor.shape)}"
            raise RiverError(f"{tensor.path}: tensor {name} is {found}; accepted: {wanted}")
        return tensor.read()

    def refuse_other_order(self, name: str, columns: int, group_size: int) -> None:
        """Refuses groups of columns that are no neighbours: a tile of a river has one pair for its 64.

        name: of the tensor [columns] with the group of each column; it may be missing.
        """
        if name not in self.stored:
            return
        groups = self.take(name, ("I32", "I64"), (columns,))
        if not torch.equal(groups, torch.arange(columns, dtype=groups.dtype) // group_size):
            raise RiverError(
                f"{self.path}: {name} orders columns by activations; accepted: groups of neighbours"
            )

    @staticmethod
    def group_size_of(settings: Reader) -> int:
        """The columns of a group; -1 is one group for a whole row."""
        group_size = settings.integer("group_size", -1, MAX_GROUP)
        if group_size == 0:
            settings.fail("group_size", "a number of columns, or -1 for whole rows")
        return group_size
