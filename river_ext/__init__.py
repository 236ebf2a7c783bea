"""River-LLM: training-free, token-level early exit for unmodified Hugging Face language models.

model = river_ext.load("path/to/checkpoint")
print(model.generate("Once upon a time", threshold=0.5).text)
"""

from importlib import import_module

from . import ops as ops  # registers torch.ops.river.*

__version__ = "0.1.0"
__all__ = ["RiverError", "load", "ops", "quantize"]

_HOMES = {"load": "model", "quantize": "hqq", "RiverError": "errors"}


def __getattr__(name: str):
    """The rest comes when asked for: users of the ops alone need no tokenizer and no safetensors."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
