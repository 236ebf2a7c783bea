"""Builds a river from imported weights.

A grid is taken as it is, if its groups are made of whole tiles and no column's scale had to be changed
(moved_scales.py). Other weights are quantised anew by HQQ, and the error that this adds is stated. What the
source does not quantise is quantised from the backbone.
"""

import hashlib
from collections import Counter
from pathlib import Path

from torch import Tensor

from ...errors import RiverError
from ...loading.config import ModelConfig
from ...loading.files import open_regular
from ...loading.weights import BlockShape, DecoderBlockWeights, ExitLayerWeights, ModelWeights
from ...ops import TILE_COLS, pack_w4
from ...progress import progress_bar
from .. import hqq
from ..exit_river import HEAD, IMPORT_COUNTS, IMPORT_ERROR, ExitRiver
from ..w4 import Quantised, pack_exit_layer
from .moved_scales import ImportedWeight, undo_moved_scales
from .open import open_source
from .source import Source

MAX_DIFFERENCE = 0.2  # to the backbone: 4 bits cost a tenth of it, another model is ten times as far away
KEPT, REQUANTISED, FROM_BACKBONE = IMPORT_COUNTS
READ_BYTES = 1 << 22


def import_river(
    path: str | Path, config: ModelConfig, weights: ModelWeights, progress: bool = True
) -> ExitRiver:
    """The river of a backbone from the 4-bit weights of the same model in another format.

    Args:
        path: a directory in one of the formats of open.py, or a GGUF file.
        config, weights: the backbone. What is not a quantised form of it is refused.
        progress: show on standard error how far it is, if it takes long.
    """
    source = open_source(path, config)
    importer = _Importer(source, BlockShape.of(config))
    with progress_bar("importing", len(weights.layers) + 1, progress) as advance:
        layers = []
        for index, block in enumerate(weights.layers):
            layers.append(importer.exit_layer(index, block))
            advance()
        facts = importer.facts()
        lm_head = pack_w4(*hqq.quantize(weights.lm_head, name=HEAD))
        advance()
    return ExitRiver(layers, lm_head, TILE_COLS, "imported", imported=facts)


class _Importer:
    def __init__(self, source: Source, shape: BlockShape):
        self.source, self.shape = source, shape
        self.projections = Counter({KEPT: 0, REQUANTISED: 0, FROM_BACKBONE: 0})
        self.errors = self.squares = 0.0  # sums of squares: of what an import changed, and of what it was

    def exit_layer(self, index: int, block: DecoderBlockWeights) -> ExitLayerWeights:
        weights = {}
        for projection in self.shape.projections():
            found = ImportedWeight.read(self.source, index, projection, block.q_proj.device)
            if found is not None:
                weights[projection] = found
        if any(weight.quantised for weight in weights.values()):
            undo_moved_scales(weights, self.source, index, block, self.shape)
        quantised = {}
        for projection in self.shape.projections():
            own, name = getattr(block, projection), f"layers.{index}.{projection}"
            if projection in weights and weights[projection].quantised:
                quantised[projection] = self._import(weights[projection], own, name)
            else:
                quantised[projection] = hqq.quantize(own, name=name)
                self.projections[FROM_BACKBONE] += 1
        return pack_exit_layer(quantised, self.shape)

    def _import(self, weight: ImportedWeight, own: Tensor, name: str) -> Quantised:
        found = weight.difference(own)
        if not found <= MAX_DIFFERENCE:  # NaN is no match either
            raise RiverError(
                f"{self.source.path}: of another model: the mean square of the difference between {name} and "
                f"the model's is {found:.3g} of the model's mean square; accepted: up to {MAX_DIFFERENCE}"
            )
        kept = weight.grid.in_tiles() if weight.grid is not None and weight.columns is None else None
        dense = weight.as_the_backbones()
        self.projections[REQUANTISED if kept is None else KEPT] += 1
        q, scale, zero = hqq.quantize(dense, name=name) if kept is None else kept
        if not scale.isfinite().all():
            most = f"{hqq.FP16_MAX:g}, the largest in fp16"
            raise RiverError(f"{self.source.path}: {name} needs a scale above {most}")
        self.errors += (_dense(q, scale, zero) - dense).square().sum().item()
        self.squares += dense.square().sum().item()
        return q, scale, zero

    def facts(self) -> dict:
        """What river.json says of an import."""
        if self.projections[FROM_BACKBONE] == self.projections.total():
            raise RiverError(f"{self.source.path}: no projection of a layer is quantised in it")
        error = self.errors / self.squares if self.squares else 0.0
        files = {file.name: _sha256(file) for file in self.source.files}
        return {
            "source": self.source.description,
            "files": files,
            **self.projections,
            IMPORT_ERROR: error,
        }


def _dense(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    scale, zero = (part.float().repeat_interleave(TILE_COLS, 1)[:, : q.shape[1]] for part in (scale, zero))
    return (q - zero) * scale


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
