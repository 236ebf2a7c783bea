"""The results of all parts of the GPU suite: one file, gpu_<device>.jsonl, one JSON object a line.

A line is written as soon as it is measured, so a part that is killed keeps what it had. Each names its `part`
and what it is a `record` of. Only the standard library: the suite reads and writes before anything is built.
"""

import json
import math
import os
from pathlib import Path


def folder() -> Path:
    """$OUT, what a lent machine sends back; else results/ here."""
    return Path(os.environ.get("OUT") or Path(__file__).parent.parent / "results")


def slug(device: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in device).lower().split())


def path_of(folder: Path, device: str) -> Path:
    """Of the suite's parts, where it says: they might know the device by another name."""
    return Path(os.environ.get("RIVER_RECORDS") or folder / f"gpu_{slug(device)}.jsonl")


def append(path: Path, part: str, record: str, **fields) -> dict:
    line = {"part": part, "record": record} | finite(fields)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:  # one write at the end of the file: lines of two processes do not mix
        file.write(json.dumps(line, allow_nan=False) + "\n")
    return line


def finite(value):
    """NaN and infinity are no JSON, and no measurement either: null."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path, start: int = 0) -> list[dict]:
    """The lines from byte `start` on; one that a kill has cut off is left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(start)
        lines = file.read().split(b"\n")[:-1]
    return [json.loads(line) for line in lines if line]
