"""The configuration of a checkpoint: config.json (and generation_config.json), checked and normalised.

Names are Hugging Face's. Both spellings are read: `rope_scaling` + `rope_theta` and `rope_parameters`,
`torch_dtype` and `dtype`, `type` and `rope_type`. A key that is read and makes no sense is refused with
one line, and so is one that would change the arithmetic (families.py), and a size that the ops do not take.
Other keys (`auto_map` included) have no effect, and no code is ever run.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import ops
from ..errors import RiverError
from .calibrated import Calibrated
from .families import (
    FAMILIES,
    MULTIMODAL,
    refuse_foreign_architectures,
    refuse_foreign_keys,
    refuse_known_architectures,
)
from .files import is_regular, path_of
from .json_object import Reader, read_json_object
from .multipliers import with_multipliers
from .rope_config import MAX_POSITIONS, read_nope_layers, read_rope, read_windows

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
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
    rope_scaling: dict | None  # None, or {"rope_type": "linear", "factor": ...}, say: see rope_config.py
    tie_word_embeddings: bool
    attention_bias: bool  # q, k and v have biases
    dtype: torch.dtype | None  # None: config.json does not say; a loaded checkpoint always has one
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()  # that see all positions in spite of the window
    nope_layers: tuple[int, ...] = ()  # that do not rotate queries and keys
    # (beta, n): the query at position p is scaled by 1 + beta * log(1 + p // n)
    query_scaling: tuple[float, int] | None = None
    multimodal: bool = False  # the checkpoint holds more than this model, which is read alone
    resident_layers: int | None = None  # `load` says it: backbone layers from this one on are offloaded
    calibrated: Calibrated | None = None  # `load` says it, too: what `river calibrate` found
    softmax_scale: float | None = None  # None: head_dim ** -0.5
    residual_multiplier: float = 1.0  # of hidden vectors as they are kept, see multipliers.py
    logits_scaling: float = 1.0  # logits are divided by it

    @property
    def max_length(self) -> int:
        """Positions that the model supports."""
        scaling, positions = self.rope_scaling or {}, self.max_position_embeddings
        if scaling.get("rope_type") in ("linear", "dynamic"):
            return int(positions * scaling["factor"])
        if scaling.get("rope_type") == "yarn":
            return max(positions, int(scaling["original_max_position_embeddings"] * scaling["factor"]))
        return positions

    @property
    def longest_unscaled(self) -> int | None:
        """Tokens of the longest sequence whose rotation does not depend on its length; None: of any."""
        scaling = self.rope_scaling or {}
        return {
            "dynamic": self.max_position_embeddings,
            "longrope": scaling.get("original_max_position_embeddings"),
        }.get(scaling.get("rope_type"))

    @property
    def rotates_anew_after(self) -> int | None:
        """Tokens of a growing sequence after which all of it rotates anew; None: that never happens."""
        scaling = self.rope_scaling or {}
        return self.longest_unscaled if scaling.get("rope_type") == "longrope" else None


def read_config(directory: str | Path) -> ModelConfig:
    """Reads `config.json` of a checkpoint directory, and its `generation_config.json` for bos and eos ids."""
    path = checkpoint_directory(directory) / "config.json"
    if not is_regular(path):
        raise RiverError(f"{path}: missing; a checkpoint directory holds config.json and *.safetensors")
    return read_config_file(path)


def read_config_file(path: Path) -> ModelConfig:
    """The same of a file that is there; `generation_config.json` may lie beside it."""
    generation_path = path.parent / "generation_config.json"
    generation = read_json_object(generation_path) if is_regular(generation_path) else {}
    return read_config_objects(Reader(path, read_json_object(path)), Reader(generation_path, generation))


def read_config_objects(top: Reader, generation: Reader) -> ModelConfig:
    """The same of what such files hold."""
    refuse_known_architectures(top)
    if top.choice("model_type", [*FAMILIES, *MULTIMODAL]) in FAMILIES:
        return model_config(top, generation)
    return replace(model_config(text_model(top), generation), multimodal=True)


def text_model(top: Reader) -> Reader:
    """What a multimodal model's config.json says of its text model, as one object."""
    refuse_foreign_architectures(top)
    if not isinstance(top.values.get("text_config"), dict):
        top.fail("text_config", "the object of a text model")
    text = Reader(top.path, top.values["text_config"], prefix="text_config.")
    text.choice("model_type", MULTIMODAL[top.values["model_type"]])
    apart = {"model_type", "architectures", "text_config", "vision_config"}
    outer = {key: value for key, value in top.values.items() if key not in apart}
    # The head is the whole model's, and is tied if nothing is said.
    tied = {
        "tie_word_embeddings": outer.get("tie_word_embeddings", text.boolean("tie_word_embeddings", True))
    }
    unsaid = {key: value for key, value in outer.items() if text.values.get(key) is None}
    return Reader(top.path, text.values | unsaid | tied, prefix=text.prefix)


def checkpoint_directory(directory: str | Path) -> Path:
    """The directory, which must be there: nothing is fetched."""
    path, name = path_of(directory, "checkpoint"), str(directory)
    if not os.path.isdir(directory):
        if HUB_NAME.fullmatch(name) and not os.path.lexists(directory):
            raise RiverError(
                f"{name}: no such directory. If it is a model's name on a hub, download it first: "
                f"hf download {name} --local-dir {name.split('/')[1]}, and give that directory"
            )
        if name.lower().endswith(".gguf") and os.path.isfile(directory):
            raise RiverError(f"{name}: make a checkpoint of it first: river convert {name} --output DIR")
        raise RiverError(f"{name}: no such directory; a Hugging Face checkpoint directory is needed")
    return path


def parse_dtype(value, where: str) -> torch.dtype:
    """A torch dtype or its name, one of `DTYPES`."""
    name = str(value).removeprefix("torch.")
    if not isinstance(value, (str, torch.dtype)) or name not in DTYPES:
        raise RiverError(f"{where}: dtype {name[:40]!r} is not supported; accepted: {', '.join(DTYPES)}")
    return DTYPES[name]


def parse_device(device: torch.device | str) -> torch.device:
    """A device that this machine has, the CPU or a CUDA GPU."""
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        parsed = None
    gpus = torch.cuda.device_count()
    usable = parsed is not None and (
        parsed.type == "cpu" or parsed.type == "cuda" and (parsed.index or 0) < gpus
    )
    if not usable:
        accepted = (
            "cpu, cuda" + "".join(f", cuda:{i}" for i in range(gpus)) if gpus else "cpu (no GPU is available)"
        )
        raise RiverError(f"device {str(device)[:40]!r} cannot be used; accepted: {accepted}")
    return parsed


def model_config(top: Reader, generation: Reader) -> ModelConfig:
    """What the keys of a config.json say, and those of a generation_config.json of bos and eos ids."""
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
    nope_layers = read_nope_layers(top, family, num_hidden_layers)
    sliding_window, full_attention_layers = read_windows(
        top, family, num_hidden_layers, max_position_embeddings, nope_layers
    )
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
        rms_norm_eps=top.number("rms_norm_eps", 1e-12, 1.0),
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=top.boolean("tie_word_embeddings", family.tied),
        attention_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        dtype=_dtype(top),
        bos_token_id=ids["bos_token_id"][0] if ids["bos_token_id"] else None,
        eos_token_ids=ids["eos_token_id"],
        sliding_window=sliding_window,
        full_attention_layers=full_attention_layers,
        nope_layers=nope_layers,
        **read_rope(top, family, head_dim, max_position_embeddings)._asdict(),
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
