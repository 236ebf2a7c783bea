"""The exit layers of a calibration that goes on, each in a file, so that an interruption costs one layer.

They lie in the folder .calibration of the river's directory, and go when the river takes its place there. A
file comes whole, by a rename, and its name begins with a hash of all that the layer was made from: what is
there under that name is what would be made again.
"""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..loading.weights import BlockShape, ExitLayerWeights
from ..quant.river_store import UNFINISHED


class UnfinishedRiver:
    """The exit layers that are there."""

    def __init__(self, path: Path, facts: dict, shape: BlockShape):
        """path is the river's directory; facts, for JSON, are what its layers are made from."""
        self.path, self.folder, self.shapes = path, path / UNFINISHED, shape.tiles()
        self.key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def load(self, index: int, device: torch.device) -> ExitLayerWeights | None:
        """None where there is no such layer."""
        try:
            tensors = load_file(self._file(index), device=str(device))
        except (OSError, SafetensorError):  # of an empty file as well, which a crash of the machine may leave
            return None
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return ExitLayerWeights(**tensors) if shapes == self.shapes else None

    def save(self, index: int, layer: ExitLayerWeights) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f"new-{os.getpid()}"
        try:
            save_file({field.name: getattr(layer, field.name).cpu() for field in fields(layer)}, scratch)
            os.replace(scratch, self._file(index))
        finally:
            scratch.unlink(missing_ok=True)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # it holds a river
            self.path.rmdir()

    def _file(self, index: int) -> Path:
        return self.folder / f"{self.key}-{index}.safetensors"
