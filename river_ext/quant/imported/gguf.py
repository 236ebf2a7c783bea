"""GGUF files. Blocks of 32 or 256 columns end inside of a river's tiles, so their weights are dequantised."""

from collections import Counter
from pathlib import Path

from torch import Tensor

from ...loading.checkpoint import tensor_name, tensor_shapes
from ...loading.gguf_checkpoint import GgufModel
from .source import Source


class Gguf(Source):
    def __init__(self, path: Path):
        self.path, self.files, self.model = path, [path], GgufModel(path)
        self.names = tensor_shapes(self.model.config)
        kinds = Counter(tensor.kind for tensor in self.model.file.tensors.values() if tensor.quantised)
        self.description = f"GGUF {', '.join(kind for kind, _ in kinds.most_common())}".strip()

    def quantised(self, layer: int, projection: str) -> Tensor | None:
        name = tensor_name(layer, projection)
        return self.model.read(name) if self.model.stored(name).quantised else None

    def plain(self, layer: int, field: str) -> Tensor | None:
        name = tensor_name(layer, field)
        return self.model.read(name) if name in self.names else None
