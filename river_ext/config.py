"""The configuration of a checkpoint: config.json (and generation_config.json), checked and normalised.

Names are Hugging Face's. Both spellings are read: `rope_scaling` + `rope_theta` and `rope_parameters`,
`torch_dtype` and `dtype`, `type` and `rope_type`. A key that is read and makes no sense is refused with
one line; a key that is not read (`auto_map` included) has no effect, and no code is ever run.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import RiverError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3")
MAX_JSON_BYTES = 64 << 20
MAX_POSITIONS = 1 << 24
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Family:
    """What a model_type implies beyond the keys of its config.json, and which optional tensors it has."""

    qkv_bias: bool | None = None  # None: the key attention_bias decides
    o_bias: bool = True  # o has a bias where q, k and v have one
    qk_norm: bool = False
    sliding_window: str | None = None  # "key": sliding_window itself; "switch": only if use_sliding_window
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads


# A family belongs here once test_hf_parity.py compares it with transformers.
FAMILIES = {
    "llama": Family(),
    "mistral": Family(qkv_bias=False, sliding_window="key"),
    "qwen2": Family(qkv_bias=True, o_bias=False, sliding_window="switch"),
    "qwen3": Family(qk_norm=True, sliding_window="switch", default_head_dim=128),
}


@dataclass(frozen=True)
class ModelConfig:
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int  # dims of a head that rotate; the rest passes through
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: dict | None  # None, or {"rope_type": "linear" | "dynamic" | "llama3", "factor": ...}
    tie_word_embeddings: bool
    attention_bias: bool  # q, k and v have biases
    dtype: torch.dtype | None  # None: config.json does not say; a loaded checkpoint always has one
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    sliding_window: int | None = None

    @property
    def max_length(self) -> int:
        """Positions that the model supports."""
        scaling = self.rope_scaling or {}
        if scaling.get("rope_type") in ("linear", "dynamic"):
            return int(self.max_position_embeddings * scaling["factor"])
        return self.max_position_embeddings


def read_config(directory: str | Path) -> ModelConfig:
    """Reads `config.json` of a checkpoint directory, and its `generation_config.json` for bos and eos ids."""
    directory = Path(directory)
    if not directory.is_dir():
        raise RiverError(f"{directory}: no such directory; a Hugging Face checkpoint directory is needed")
    path = directory / "config.json"
    if not path.is_file():
        raise RiverError(f"{path}: missing; a checkpoint directory holds config.json and *.safetensors")
    generation_path = directory / "generation_config.json"
    generation = read_json_object(generation_path) if generation_path.is_file() else {}
    return _model_config(_Reader(path, read_json_object(path)), _Reader(generation_path, generation))


def read_json_object(path: Path) -> dict:
    """The JSON object in a file; anything else is refused."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise RiverError(
                f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB, not a JSON file of a checkpoint"
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RiverError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, RiverError):
            raise
        raise RiverError(f"{path}: not valid JSON ({str(error)[:160]})") from None
    if not isinstance(value, dict):
        raise RiverError(f"{path}: a JSON object is needed, found {_json_type(value)}")
    return value


def parse_dtype(value, where: str) -> torch.dtype:
    """A torch dtype or its name, one of `DTYPES`."""
    name = str(value).removeprefix("torch.")
    if not isinstance(value, (str, torch.dtype)) or name not in DTYPES:
        raise RiverError(f"{where}: dtype {name[:40]!r} is not supported; accepted: {', '.join(DTYPES)}")
    return DTYPES[name]


class _Reader:
    """One JSON object whose keys are checked as they are read."""

    def __init__(self, path: Path, values: dict, prefix: str = ""):
        self.path, self.values, self.prefix = path, values, prefix

    def fail(self, key: str, accepted: str):
        found = json.dumps(self.values[key]) if key in self.values else "missing"
        found = found if len(found) <= 60 else found[:57] + "..."
        raise RiverError(f"{self.path}: {self.prefix}{key} is {found}; accepted: {accepted}")

    def owner(self, key: str, other: "_Reader") -> "_Reader":
        """This object if it holds the key, else the other one."""
        return self if self.values.get(key) is not None else other

    def choice(self, key: str, accepted: Iterable[str], default: str | None = None) -> str:
        value = default if self.values.get(key) is None else self.values[key]
        if not isinstance(value, str) or value not in accepted:
            self.fail(key, ", ".join(accepted))
        return value

    def strings(self, key: str) -> list[str]:
        value = self.values[key]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(key, "an array of strings")
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.fail(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:  # NaN fails both comparisons
            self.fail(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, "true or false")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        # ids past the vocabulary exist in public configs (-1 too, for "none"); such an id is never generated
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            self.fail(key, "a token id, a list of token ids or null")
        return tuple(dict.fromkeys(i for i in ids if 0 <= i < vocab_size))


def _model_config(top: _Reader, generation: _Reader) -> ModelConfig:
    family = FAMILIES[top.choice("model_type", FAMILIES)]
    _refuse_unsupported(top)
    vocab_size = top.integer("vocab_size", 1, 1 << 24)
    num_hidden_layers = top.integer("num_hidden_layers", 1, 1024)
    hidden_size = top.integer("hidden_size", 64, 1 << 16)
    if hidden_size % 64:
        top.fail("hidden_size", "a multiple of 64")
    heads = top.integer("num_attention_heads", 1, 1024)
    kv_heads = top.integer("num_key_value_heads", 1, 1024, default=heads)
    if heads % kv_heads:
        top.fail("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    even_split = hidden_size // heads if hidden_size % heads == 0 else None
    head_dim = top.integer("head_dim", 2, MAX_HEAD_DIM, default=family.default_head_dim or even_split)
    if head_dim % 2:
        top.fail(
            "head_dim", f"an even number, also where it is hidden_size / num_attention_heads, {head_dim}"
        )
    max_position_embeddings = top.integer("max_position_embeddings", 1, MAX_POSITIONS)
    rope_theta, rope_scaling = _rope(top, head_dim, max_position_embeddings)
    attention_bias = top.boolean("attention_bias", False)
    ids = {
        key: generation.token_ids(key, vocab_size) or top.token_ids(key, vocab_size)
        for key in ("bos_token_id", "eos_token_id")
    }
    return ModelConfig(
        model_type=top.values["model_type"],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=top.integer("intermediate_size", 1, 1 << 20),
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=head_dim,
        rms_norm_eps=top.number("rms_norm_eps", 1e-12, 1.0),
        max_position_embeddings=max_position_embeddings,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=top.boolean("tie_word_embeddings", False),
        attention_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        dtype=_dtype(top),
        bos_token_id=ids["bos_token_id"][0] if ids["bos_token_id"] else None,
        eos_token_ids=ids["eos_token_id"],
        sliding_window=_sliding_window(top, family, num_hidden_layers),
    )


def _refuse_unsupported(top: _Reader) -> None:
    if top.values.get("quantization_config") is not None:
        top.fail("quantization_config", "none, a checkpoint in bfloat16, float16 or float32 is needed")
    if top.boolean("mlp_bias", False):
        top.fail("mlp_bias", "false")
    top.choice("hidden_act", ("silu", "swish"), default="silu")


def _dtype(top: _Reader) -> torch.dtype | None:
    key = "dtype" if top.values.get("dtype") is not None else "torch_dtype"
    value = top.values.get(key)
    return None if value is None else parse_dtype(value, f"{top.path}: {key}")


def _rope(top: _Reader, head_dim: int, max_position_embeddings: int) -> tuple[float, dict | None]:
    """rope_theta and the normalised rope_scaling, from either spelling."""
    key = "rope_scaling" if top.values.get("rope_scaling") else "rope_parameters"
    values = top.values.get(key) or {}
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        top.fail(key, "an object with rope_type, the same for all layers")
    rope = _Reader(top.path, values, prefix=f"{key}.")
    theta = rope.owner("rope_theta", top).number("rope_theta", 1.0, 1e12, default=10000.0)
    partial = rope.owner("partial_rotary_factor", top)
    if partial.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
        partial.fail("partial_rotary_factor", f"1, whole heads rotate in {', '.join(FAMILIES)}")

    type_key = "rope_type" if values.get("rope_type") is not None else "type"
    rope_type = rope.choice(type_key, ROPE_TYPES, default="default")
    if rope_type == "default":
        return theta, None
    factor = rope.number("factor", 1.0, 1e4)
    if rope_type != "llama3":
        if max_position_embeddings * factor > MAX_POSITIONS:
            rope.fail("factor", f"one that gives at most {MAX_POSITIONS} positions")
        if rope_type == "dynamic" and head_dim == 2:
            rope.fail(type_key, "another one, dynamic needs a head_dim of 4 or more")
        return theta, {"rope_type": rope_type, "factor": factor}
    low = rope.number("low_freq_factor", 1e-3, 1e6)
    high = rope.number("high_freq_factor", 1e-3, 1e6)
    if high <= low:
        rope.fail("high_freq_factor", f"a number above low_freq_factor, {low:g}")
    original = "original_max_position_embeddings"
    owner = top.owner(original, rope)  # where both say it, transformers takes the outer one
    return theta, {
        "rope_type": rope_type,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        original: owner.integer(original, 1, MAX_POSITIONS, default=max_position_embeddings),
    }


def _sliding_window(top: _Reader, family: Family, num_hidden_layers: int) -> int | None:
    """The window that every layer has, or None; models where only some layers have one are refused."""
    if family.sliding_window is None:
        return None
    if family.sliding_window == "key":
        if "sliding_window" not in top.values:
            top.fail("sliding_window", "the window's positions, or null for none")
    elif not top.boolean("use_sliding_window", False):
        return None
    if top.values.get("sliding_window") is None:
        return None
    window = top.integer("sliding_window", 1, MAX_POSITIONS)
    if family.sliding_window == "key":
        return window
    first = top.integer("max_window_layers", 0, 1 << 16, default=28)
    windowed = [layer >= first for layer in range(num_hidden_layers)]
    if top.values.get("layer_types") is not None:
        windowed = [kind == "sliding_attention" for kind in top.strings("layer_types")]
    if any(windowed) and not (all(windowed) and len(windowed) == num_hidden_layers):
        top.fail("use_sliding_window", "false, or a window in every layer")
    return window if any(windowed) else None


def _json_type(value) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
