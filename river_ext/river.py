"""The exit river of a model: built from its backbone, saved to a directory, loaded from it.

A saved river is a directory of two files: `river.safetensors`, which holds `layers.<l>.<field>` for every
field of `ExitLayerWeights` in the layout of w4.py, and `river.json`, which says what they are (`_facts`).
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import hqq
from .config import ModelConfig, read_json_object
from .errors import RiverError
from .ops import packed_shape
from .progress import progress_bar
from .w4 import BlockShape, pack_exit_layer
from .weights import DecoderBlockWeights, ExitLayerWeights, ModelWeights

FORMAT, FORMAT_VERSION = "river_ext W4", 1
TENSORS, FACTS = "river.safetensors", "river.json"


class ExitRiver(list[ExitLayerWeights]):
    """The exit layers of a model, one per backbone layer, and how they were made."""

    def __init__(self, layers: list[ExitLayerWeights], group_size: int, quantiser: str = "hqq"):
        super().__init__(layers)
        self.group_size, self.quantiser = group_size, quantiser


def build_river(
    config: ModelConfig, weights: ModelWeights, group_size: int = 64, progress: bool = True
) -> ExitRiver:
    """Quantises every decoder block of the backbone, one after the other, on the device of its weights.

    Args:
        config, weights: the backbone.
        group_size: columns that share a scale and a zero, 64 or 128.
        progress: show on standard error how far it is, if it takes long.
    """
    shape = BlockShape.of(config)
    with progress_bar("quantising", len(weights.layers) * len(shape.projections()), progress) as advance:
        layers = [
            _build_exit_layer(block, shape, group_size, f"layers.{index}", advance)
            for index, block in enumerate(weights.layers)
        ]
    return ExitRiver(layers, group_size)


def _build_exit_layer(
    block: DecoderBlockWeights, shape: BlockShape, group_size: int, name: str, advance: Callable[[], None]
) -> ExitLayerWeights:
    quantised = {}
    for projection in shape.projections():
        weight = getattr(block, projection)
        quantised[projection] = hqq.quantize(weight, group_size, name=f"{name}.{projection}")
        advance()
    return pack_exit_layer(quantised, shape)


def save_river(path: str | Path, river: ExitRiver, config: ModelConfig, fingerprint: str) -> None:
    """Writes a river to the directory `path`: all of it, or nothing if that fails or is interrupted.

    Args:
        path: a new directory, or a saved river to replace.
        river: what `build_river` or `load_river` returned.
        config, fingerprint: of the checkpoint that the river was built from.
    """
    path = Path(path)
    _refuse_other_content(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path) as directory:
            save_file(_tensors(river), directory / TENSORS)
            facts = _facts(river, config, fingerprint)
            (directory / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise RiverError(f"{path}: cannot be written ({error}); a folder with free space is needed") from None


def load_river(
    path: str | Path, config: ModelConfig, fingerprint: str, device: torch.device | str = "cpu"
) -> ExitRiver:
    """Loads a saved river; on the CPU its tensors are views of the mapped file.

    Args:
        path: a directory that `save_river` wrote.
        config, fingerprint: of the checkpoint at hand. A river that was built from another one is refused.
        device: where the tensors go.
    """
    path = Path(path)
    facts = read_facts(path)
    if facts["fingerprint"] != fingerprint:
        raise RiverError(
            f"{path / FACTS}: built from another checkpoint, fingerprint {str(facts['fingerprint'])[:64]}; "
            f"accepted is a river of the one at hand, {fingerprint}"
        )
    stored = _stored_tensors(path / TENSORS, _packed_shapes(config))
    names = [field.name for field in fields(ExitLayerWeights)]
    layers = [
        ExitLayerWeights(**{name: stored[f"layers.{index}.{name}"].to(device) for name in names})
        for index in range(config.num_hidden_layers)
    ]
    return ExitRiver(layers, facts["group_size"], facts["quantiser"])


def read_facts(path: str | Path) -> dict:
    """The facts of a saved river, checked: those of `_facts`."""
    path = Path(path)
    if not (path / FACTS).is_file():
        raise RiverError(f"{path}: no {FACTS} in it; a directory that `river convert` wrote is needed")
    facts = read_json_object(path / FACTS)

    def refuse(key: str, accepted: str):
        found = repr(facts[key])[:80] if key in facts else "missing"
        raise RiverError(f"{path / FACTS}: {key} is {found}; accepted: {accepted}")

    if facts.get("format") != FORMAT:
        refuse("format", repr(FORMAT))
    if facts.get("format_version") != FORMAT_VERSION:
        refuse("format_version", str(FORMAT_VERSION))
    if facts.get("group_size") not in hqq.GROUP_SIZES:
        refuse("group_size", ", ".join(map(str, hqq.GROUP_SIZES)))
    for key in ("quantiser", "fingerprint"):
        if not isinstance(facts.get(key), str):
            refuse(key, "a string")
    return facts


def _facts(river: ExitRiver, config: ModelConfig, fingerprint: str) -> dict:
    """What river.json holds; block is the shape of a decoder block."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "quantiser": river.quantiser,
        "group_size": river.group_size,
        "fingerprint": fingerprint,
        "num_hidden_layers": len(river),
        "block": asdict(BlockShape.of(config)),
    }


def _tensors(river: ExitRiver) -> dict[str, torch.Tensor]:
    return {
        f"layers.{index}.{field.name}": getattr(layer, field.name).cpu()
        for index, layer in enumerate(river)
        for field in fields(layer)
    }


def _packed_shapes(config: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """Name and shape of every tensor of a river."""
    return {
        f"layers.{index}.{field}": packed_shape(rows, columns)
        for index in range(config.num_hidden_layers)
        for field, (rows, columns) in BlockShape.of(config).packed().items()
    }


def _stored_tensors(path: Path, shapes: dict[str, tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    """Views of the tensors in a file, which must be those of `shapes`."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        raise RiverError(f"{path}: not a complete safetensors file ({str(error)[:160]})") from None
    for name, shape in shapes.items():
        wanted = f"uint8 {list(shape)}"
        if name not in stored:
            raise RiverError(f"{path}: tensor {name} {wanted} is missing")
        found = f"{stored[name].dtype} {list(stored[name].shape)}".removeprefix("torch.")
        if found != wanted:
            raise RiverError(
                f"{path}: tensor {name} is {found}; the checkpoint's config.json asks for {wanted}"
            )
    for name in sorted(stored.keys() - shapes.keys()):
        raise RiverError(f"{path}: tensor {name[:120]} has no place in the river of this checkpoint")
    return stored


def _refuse_other_content(path: Path) -> None:
    """Only nothing, an empty directory or a saved river may be at `path`."""
    if not os.path.lexists(path):
        return
    if (
        path.is_symlink()
        or not path.is_dir()
        or not {entry.name for entry in path.iterdir()} <= {TENSORS, FACTS}
    ):
        raise RiverError(
            f"{path}: exists and is not a saved river; accepted: a new directory, or one to replace"
        )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary directory beside `path` that becomes `path` at the end, or vanishes on any error."""
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    fresh, old = scratch / "new", scratch / "old"
    try:
        fresh.mkdir()
        yield fresh
        if path.exists():
            path.rename(old)
        try:
            fresh.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
