"""More than one process, or more than one machine, with Ray: replicas of the engine.

    serve run river_ext.scale:app model=DIR replicas=2       OpenAI's API, as of `river serve`: serving.py
    river_ext.scale.generate_file("in.jsonl", "out.jsonl")   a file of prompts: offline.py, lines.py

A *replica* is a process with a copy of the model, on cores or a GPU of its own: replica.py. What a request
gets is what a single process gives it, bit for bit. Ray starts replicas, spreads the work over them, and
starts anew what dies. It comes with the extra `scale`.
"""

import os
from importlib import import_module

from ..errors import RiverError

# Ray reports its use over the network, unless it is told not to before a cluster starts.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

_HOMES = {"app": "serving", "generate_file": "offline"}  # which do not load what the other one needs
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name.startswith("river_ext"):
            raise
        raise RiverError(
            f"river_ext.scale needs the module {error.name}; accepted: after pip install 'river_ext[scale]'"
        ) from None


def __dir__() -> list[str]:
    return __all__
