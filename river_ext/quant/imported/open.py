"""Which format is it, and is it of the same shape as the backbone?"""

from pathlib import Path

from ...errors import RiverError
from ...loading.checkpoint import text_tensors
from ...loading.config import ModelConfig, text_model
from ...loading.families import MULTIMODAL
from ...loading.files import is_regular, path_of
from ...loading.gguf_file import names_gguf
from ...loading.json_object import Reader, read_json_object
from ...loading.stored import stored_tensors
from ..river_store import FACTS
from .awq import Awq
from .compressed_tensors import CompressedTensors
from .gguf import Gguf
from .gptq import Gptq
from .source import PackedCheckpoint, Source

FORMATS: dict[str, type[PackedCheckpoint]] = {kind.method: kind for kind in (Awq, Gptq, CompressedTensors)}
SETTINGS = ("quantization_config", "compression_config")  # keys of config.json, the newer one first
SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip


def is_foreign(path: str | Path) -> bool:
    """Whether a river is to be imported: it is a GGUF file or a quantised checkpoint, and no saved river."""
    path = path_of(path, "river")
    if names_gguf(path):
        return True
    if is_regular(path / FACTS) or not is_regular(path / "config.json"):
        return False
    return not read_json_object(path / "config.json").keys().isdisjoint(SETTINGS)


def open_source(path: str | Path, config: ModelConfig) -> Source:
    """Opens what 4-bit weights are imported from; config is the backbone's."""
    path = path_of(path, "river")
    if names_gguf(path):
        source = Gguf(path)
        _check_sizes(Reader(path, source.model.config_json), config)
        return source
    if not is_regular(path / "config.json"):
        raise RiverError(
            f"{path}: no config.json in it; 4-bit weights come from a GGUF file, or from a checkpoint's "
            f"directory in one of the formats {', '.join(FORMATS)}"
        )
    top = Reader(path / "config.json", read_json_object(path / "config.json"))
    key = next((key for key in SETTINGS if key in top.values), SETTINGS[0])
    values = top.values.get(key)
    if not isinstance(values, dict):
        top.fail(key, f"an object whose quant_method is {', '.join(FORMATS)}")
    settings = Reader(top.path, values, prefix=f"{key}.")
    kind = FORMATS[settings.choice("quant_method", FORMATS)]
    stored = stored_tensors(path)
    if top.values.get("model_type") in list(MULTIMODAL):  # whatever type the value has
        top, stored = text_model(top), text_tensors(stored)
    _check_sizes(top, config)
    return kind(path, settings, stored, config)


def _check_sizes(top: Reader, config: ModelConfig) -> None:
    given = {name: value for name, value in top.values.items() if value is not None}
    given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    sizes = Reader(top.path, given, top.prefix)
    for name in SIZES:
        size = getattr(config, name)
        sizes.exactly(name, size, f"{size}, as the model that it is a river for has it")
