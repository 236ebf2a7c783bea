"""The configuration of a checkpoint: config.json (and generation_config.json), checked and normalised.

Names are Hugging Face's. Both spellings are read: `rope_scaling` + `rope_theta` and `rope_parameters`,
`torch_dtype` and `dtype`, `type` and `rope_type`. A key that is read and makes no sense is refused with
one line, and so is one that would change the arithmetic (families.py), and a size that the ops do not take.
Other keys (`auto_map` included) have no effect, and no code is ever run.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import ops
from ..errors import RiverError
from .families import (
    FAMILIES,
    Family,
    refuse_foreign_architectures,
    refuse_foreign_keys,
    refuse_foreign_rope_keys,
    refuse_known_architectures,
)
from .files import is_regular, path_of
from .json_object import Reader, read_json_object
from .multipliers import with_multipliers

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROPE_TYPES = ("default", "linear", "dynamic", "llama3")
MAX_POSITIONS = 1 << 24
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


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
    rms_norm_eps: float  # of hidden vectors as they are kept, see multipliers.py
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: dict | None  # None, or {"rope_type": "linear" | "dynamic" | "llama3", "factor": ...}
    tie_word_embeddings: bool
    attention_bias: bool  # q, k and v have biases
    dtype: torch.dtype | None  # None: config.json does not say; a loaded checkpoint always has one
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    sliding_window: int | None = None
    softmax_scale: float | None = None  # None: head_dim ** -0.5
    residual_multiplier: float = 1.0  # of hidden vectors as they are kept, see multipliers.py
    logits_scaling: float = 1.0  # logits are divided by it

    @property
    def max_length(self) -> int:
        """Positions that the model supports."""
        scaling = self.rope_scaling or {}
        if scaling.get("rope_type") in ("linear", "dynamic"):
            return int(self.max_position_embeddings * scaling["factor"])
        return self.max_position_embeddings


def read_config(directory: str | Path) -> ModelConfig:
    """Reads `config.json` of a checkpoint directory, and its `generation_config.json` for bos and eos ids."""
    directory = checkpoint_directory(directory)
    path = directory / "config.json"
    if not is_regular(path):
        raise RiverError(f"{path}: missing; a checkpoint directory holds config.json and *.safetensors")
    generation_path = directory / "generation_config.json"
    generation = read_json_object(generation_path) if is_regular(generation_path) else {}
    return _model_config(Reader(path, read_json_object(path)), Reader(generation_path, generation))


def checkpoint_directory(directory: str | Path) -> Path:
    """The directory, which must be there: nothing is fetched."""
    path, name = path_of(directory, "checkpoint"), str(directory)
    if not os.path.isdir(directory):
        if HUB_NAME.fullmatch(name) and not os.path.lexists(directory):
            raise RiverError(
                f"{name}: no such directory. If it is a model's name on a hub, download it first: "
                f"hf download {name} --local-dir {name.split('/')[1]}, and give that directory"
            )
        raise RiverError(f"{name}: no such directory; a Hugging Face checkpoint directory is needed")
    return path


def parse_dtype(value, where: str) -> torch.dtype:
    """A torch dtype or its name, one of `DTYPES`."""
    name = str(value).removeprefix("torch.")
    if not isinstance(value, (str, torch.dtype)) or name not in DTYPES:
        raise RiverError(f"{where}: dtype {name[:40]!r} is not supported; accepted: {', '.join(DTYPES)}")
    return DTYPES[name]


def _model_config(top: Reader, generation: Reader) -> ModelConfig:
    refuse_known_architectures(top)
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
    if heads // kv_heads > ops.MAX_GROUP:
        most = f"at most {ops.MAX_GROUP} times num_key_value_heads, {kv_heads}"
        top.fail("num_attention_heads", f"a number of query heads {most}")
    even_split = hidden_size // heads if hidden_size % heads == 0 else None
    head_dim = top.integer("head_dim", 2, ops.MAX_HEAD_DIM, default=family.default_head_dim or even_split)
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
    config = ModelConfig(
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
        sliding_window=_sliding_window(top, family, num_hidden_layers, max_position_embeddings),
    )
    if family.multipliers:
        config = with_multipliers(config, top)
    refuse_foreign_architectures(top)
    refuse_foreign_keys(top, config)
    return config


def _refuse_unsupported(top: Reader) -> None:
    if top.values.get("quantization_config") not in (None, {}):
        top.fail("quantization_config", "none, a checkpoint in bfloat16, float16 or float32 is needed")
    if top.boolean("mlp_bias", False):
        top.fail("mlp_bias", "false")
    top.choice("hidden_act", ("silu", "swish"), default="silu")


def _dtype(top: Reader) -> torch.dtype | None:
    key = "dtype" if top.values.get("dtype") is not None else "torch_dtype"
    value = top.values.get(key)
    return None if value is None else parse_dtype(value, f"{top.path}: {key}")


def _rope(top: Reader, head_dim: int, max_position_embeddings: int) -> tuple[float, dict | None]:
    """rope_theta and the normalised rope_scaling, from either spelling."""
    key = "rope_scaling" if top.values.get("rope_scaling") else "rope_parameters"
    values = top.values.get(key) or {}
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        top.fail(key, "an object with rope_type, the same for all layers")
    rope = Reader(top.path, values, prefix=f"{key}.")
    refuse_foreign_rope_keys(rope)
    other = top.values.get("rope_parameters")
    for name in values.keys() & other.keys() if isinstance(other, dict) else ():
        if other[name] != values[name]:
            rope.fail(name, f"what rope_parameters.{name} is, or only one of the two objects")
    theta = rope.owner("rope_theta", top).number("rope_theta", 1.0, 1e12, default=10000.0)
    partial = rope.owner("partial_rotary_factor", top)
    if partial.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
        partial.fail("partial_rotary_factor", f"1, whole heads rotate in {', '.join(FAMILIES)}")

    type_key = "rope_type" if values.get("rope_type") is not None else "type"
    rope_type = rope.choice(type_key, ROPE_TYPES, default="default")
    if rope_type == "default":
        if rope.number("factor", 1.0, 1e4, default=1.0) != 1:
            rope.fail("factor", f"1, or a {key}.rope_type that takes a factor")
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
    if not torch.tensor(high) > torch.tensor(low):  # in fp32, where their difference divides
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


def _sliding_window(top: Reader, family: Family, num_hidden_layers: int, max_positions: int) -> int | None:
    """The window that every layer has, or None; models where only some layers have one are refused."""
    window = _window(top, family, num_hidden_layers, max_positions)
    if top.values.get("layer_types") is not None:
        kind = "full_attention" if window is None else "sliding_attention"
        if top.strings("layer_types") != [kind] * num_hidden_layers:
            top.fail("layer_types", f"{kind!r} for each of the {num_hidden_layers} layers")
    return window


def _window(top: Reader, family: Family, num_hidden_layers: int, max_positions: int) -> int | None:
    if family.sliding_window == "key":
        if "sliding_window" not in top.values:
            top.fail("sliding_window", "the window's positions, or null for none")
    elif not top.boolean("use_sliding_window", family.sliding_window is None):
        return None
    if top.values.get("sliding_window") is None:
        return None
    window = top.integer("sliding_window", 1, MAX_POSITIONS)
    if family.sliding_window is None:
        if window < max_positions:
            top.fail("sliding_window", f"null, or all of the {max_positions} positions, in such a model")
        return None
    if family.sliding_window == "key":
        return window
    first = top.integer("max_window_layers", 0, 1 << 16, default=28)
    windowed = [layer >= first for layer in range(num_hidden_layers)]
    if top.values.get("layer_types") is not None:
        windowed = [kind == "sliding_attention" for kind in top.strings("layer_types")]
    if any(windowed) and not (all(windowed) and len(windowed) == num_hidden_layers):
        top.fail("use_sliding_window", "false, or a window in every layer")
    return window if any(windowed) else None
