"""Designs of the CUDA path that hardware is to judge (csrc/cuda/variants.h), as RIVER_VARIANTS asks."""

from . import _C
from .errors import RiverError


def choose(text: str) -> None:
    """Of `RIVER_VARIANTS="late_trigger=0,full_grid=1"`; nothing is changed unless all of it is right."""
    asked = []
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in _C.variants() or value not in ("0", "1"):
            raise RiverError(
                f"RIVER_VARIANTS: {item[:60]!r}; accepted: NAME=0 or NAME=1, separated by commas, "
                f"NAME one of {', '.join(_C.variants())}"
            )
        asked.append((name, int(value)))
    for name, value in asked:
        _C.set_variant(name, value)
