"""A calibrated threshold: the file that `river calibrate` writes and `load` reads.

It belongs to one model, one river and one dtype, and to the options that decide over exits beside it.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checks import short
from ..errors import RiverError
from ..ops import MAX_ROWS
from .files import flush, path_of
from .json_object import Reader, read_json_object

CALIBRATED = "calibrated"  # as a value of an option: what the file says
FORMAT, FORMAT_VERSION = "river_ext calibrated threshold", 1
PREFILL = "full"
RIVER_HEADS = ("model", "w4")
MOST_DRAFTS = MAX_ROWS - 1  # one row of a verification is the token before them


@dataclass(frozen=True)
class Calibrated:
    """What a file says that generation goes by."""

    threshold: float | tuple[float, ...]  # one for all layers, or for each
    min_layers: int  # the option that the threshold was measured with, and so are these
    river_head: str
    draft_tokens: int | str  # of lossless mode: 1 to 7, or "auto"
    fingerprint: str  # of the checkpoint
    river_sha256: str  # of the river's tensors
    dtype: torch.dtype

    @property
    def measured_with(self) -> dict:
        """The options of a request that must be these for the threshold to mean what was measured."""
        return {
            "prefill": PREFILL,
            "min_layers": self.min_layers,
            "river_head": self.river_head,
            "kv_strategy": "share",
            "deep_tokens": "stream",
        }

    def options(self, mode: str | None, threshold: float | str | None) -> dict:
        """What it stands for in a mode, where a command says no more than that (None: not even that)."""
        if mode == "lossless":
            return {"draft_tokens": CALIBRATED}
        if mode not in (None, "river") or threshold not in (None, CALIBRATED):
            return {}
        return {"threshold": CALIBRATED, "min_layers": self.min_layers, "river_head": self.river_head}

    def check_model(self, path: str | Path, fingerprint: str, dtype: torch.dtype | None) -> None:
        """Refuses another checkpoint's file, and one of another dtype (None: it is not known yet)."""
        if self.fingerprint != fingerprint:
            raise RiverError(
                f"{path}: belongs to another checkpoint; accepted: what `river calibrate` made of it"
            )
        if dtype not in (None, self.dtype):
            raise RiverError(
                f"{path}: was measured in {self.dtype}, the model is in {dtype}; accepted: the same"
            )

    def check_river(self, path: str | Path, sha256: str, has_head: bool) -> None:
        if self.river_sha256 != sha256:
            raise RiverError(
                f"{path}: was measured with another river; accepted: the same river, or a new file"
            )
        if self.river_head == "w4" and not has_head:
            raise RiverError(f'{path}: river_head is "w4", and this river has no head; accepted: model')


def read_calibrated(path: str | Path, layers: int) -> Calibrated:
    """Reads the file for a model of so many layers, and refuses what `write_calibrated` does not write."""
    path = path_of(path, CALIBRATED)
    reader = Reader(path, read_json_object(path))
    reader.exactly("format", FORMAT)
    reader.exactly("format_version", FORMAT_VERSION)
    reader.exactly("prefill", PREFILL)
    names = {
        str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    drafts = reader.values.get("draft_tokens")
    return Calibrated(
        threshold=_threshold(reader, layers),
        min_layers=reader.integer("min_layers", 1, layers),
        river_head=reader.choice("river_head", RIVER_HEADS),
        draft_tokens=drafts if drafts == "auto" else reader.integer("draft_tokens", 1, MOST_DRAFTS),
        fingerprint=_text(reader, "fingerprint"),
        river_sha256=_text(reader, "river_sha256"),
        dtype=names[reader.choice("dtype", names)],
    )


def _threshold(reader: Reader, layers: int) -> float | tuple[float, ...]:
    by_layer = reader.values.get("threshold")
    if isinstance(by_layer, list):
        if len(by_layer) != layers:
            raise RiverError(
                f"{reader.path}: threshold has {len(by_layer)} numbers, the model {layers} layers; accepted: "
                "one for each, in a file that `river calibrate` made for this model"
            )
        return reader.numbers("threshold", layers, -2, 1)
    return reader.number("threshold", -2, 1)


def _text(reader: Reader, key: str) -> str:
    if not isinstance(reader.values.get(key), str):
        reader.fail(key, "a string")
    return reader.values[key]


def write_calibrated(path: str | Path, calibrated: Calibrated, measured: dict) -> None:
    """Writes the file, whole or not at all.

    Args:
        measured: for JSON and for readers: what the choice was made from.
    """
    path = check_output(path)
    facts = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **vars(calibrated),
        "dtype": str(calibrated.dtype).removeprefix("torch."),
        "prefill": PREFILL,
        "measured": measured,
    }
    scratch = path.with_name(f".calibrated.{os.getpid()}")
    try:
        scratch.write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        flush(scratch)
        os.replace(scratch, path)
    except OSError as error:
        raise RiverError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        scratch.unlink(missing_ok=True)


def check_output(path: str | Path) -> Path:
    """Where a file would be written, or a RiverError: a new name, or a file of this kind to replace."""
    path = path_of(path, "output")
    try:
        exists = bool(os.lstat(path))
    except (FileNotFoundError, NotADirectoryError):
        exists = False
    except OSError as error:
        raise RiverError(f"{short(str(path))}: cannot be written ({error.strerror})") from None
    if exists:
        try:
            replaces = read_json_object(path).get("format") == FORMAT
        except RiverError:
            replaces = False
        if not replaces:
            raise RiverError(
                f"{path}: exists and is no calibrated threshold; accepted: a new file, or one to replace"
            )
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise RiverError(
            f"{path}: cannot be written, {short(str(folder))} is no directory that can be written to"
        )
    return path
