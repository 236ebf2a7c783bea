"""River-LLM: training-free, token-level early exit for unmodified Hugging Face language models.

model = river_ext.load("path/to/hf-checkpoint")
print(model.generate("Once upon a time", threshold=0.5).text)
"""

from importlib import import_module

from . import ops as ops  # registers torch.ops.river.*

__version__: str = ops._C.build_info()["version"]  # pyproject.toml has it, and the compiled module knows

# Names and their modules, which come when asked for: users of the ops need no tokenizer and no safetensors.
_HOMES = {
    "Model": "model",
    "RiverError": "errors",
    "custom_generate": "huggingface",
    "load": "model",
    "quantize": "quant.hqq",
    "rotary_tables": "loading.rope",
}
_MODULES = {"ops": "ops", "reference": "reference", "trace": "trace", "w4": "quant.w4"}
__all__ = sorted([*_HOMES, *_MODULES])


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{_MODULES[name]}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
