"""A GGUF file as an ordinary checkpoint directory: config.json, safetensors, tokenizer.

The values and tensors of the file become those of Hugging Face's names. Files of the architecture llama hold
the rows of q and k in another order: the two dims of a head that rotate together are neighbours there.
"""

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import RiverError
from ..progress import progress_bar
from .checkpoint import HEAD, tensor_name, tensor_shapes
from .config import ModelConfig, model_config, parse_dtype
from .families import OFF
from .files import flush
from .gguf_file import GgufFile, GgufTensor
from .json_object import Reader
from .rope import inverse_frequencies

# by general.architecture: what config.json says beside the values of the file
ARCHITECTURES = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
}
NEIGHBOURS_ROTATE, ROTATED = ("llama", "mistral"), ("q_proj", "k_proj", "q_bias", "k_bias")
READ_KEYS = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length",
    "attention.value_length", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned", "vocab_size",
}  # fmt: skip
AROUND = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    HEAD: "output.weight",
}
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q",
    "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "q_bias": "attn_q", "k_bias": "attn_k",
    "v_bias": "attn_v", "o_bias": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
FREQUENCY_FACTORS = "rope_freqs.weight"  # of Llama 3.1 and later
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SHARD_BYTES = 4 << 30


class GgufModel:
    """A GGUF file of an accepted model: its tensors by their names in a checkpoint."""

    def __init__(self, path: str | Path):
        self.file = GgufFile.open(Path(path))
        self.architecture = Reader(self.file.path, self.file.metadata).choice(
            "general.architecture", ARCHITECTURES
        )
        self.config_json = self._config_json()
        self.config: ModelConfig = model_config(Reader(self.file.path, self.config_json), Reader(Path(), {}))
        self._fields = {
            tensor_name(layer, field): (layer, field)
            for layer in range(self.config.num_hidden_layers)
            for field in LAYER
        }
        self._check_tensors()

    def stored(self, name: str) -> GgufTensor:
        """The tensor of the file that a tensor of the checkpoint is made of."""
        return self.file.tensors[self._gguf_name(name)]

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of the checkpoint, its rows in the checkpoint's order."""
        tensor = self.stored(name).read(dtype)
        _, field = self._fields.get(name, (0, ""))
        if self.architecture not in NEIGHBOURS_ROTATE or field not in ROTATED:
            return tensor
        heads = tensor.view(-1, self.config.head_dim // 2, 2, *tensor.shape[1:])
        return heads.transpose(1, 2).reshape(tensor.shape)

    def _gguf_name(self, name: str) -> str:
        if name in AROUND:
            return AROUND[name]
        layer, field = self._fields[name]
        return f"blk.{layer}.{LAYER[field]}.{'bias' if field.endswith('_bias') else 'weight'}"

    def _check_tensors(self) -> None:
        """Refuses tensors that are missing, surplus or of another shape than the values of the file say."""
        shapes = {self._gguf_name(name): shape for name, shape in tensor_shapes(self.config).items()}
        for name, shape in shapes.items():
            tensor = self.file.tensors.get(name)
            if tensor is None:
                raise RiverError(f"{self.file.path}: tensor {name} {list(shape)} is missing")
            if tensor.shape != shape:
                raise RiverError(
                    f"{self.file.path}: tensor {name} has shape {list(tensor.shape)}; the file's values ask "
                    f"for {list(shape)}"
                )
        for name in sorted(self.file.tensors.keys() - shapes.keys() - {FREQUENCY_FACTORS}):
            raise RiverError(
                f"{self.file.path}: tensor {name[:120]} has no place in a {self.architecture} model"
            )

    def _config_json(self) -> dict:
        prefix = f"{self.architecture}."
        values = {
            key.removeprefix(prefix): value
            for key, value in self.file.metadata.items()
            if key.startswith(prefix)
        }
        facts = Reader(self.file.path, values, prefix)
        for key in values.keys() - READ_KEYS:
            if values[key] not in OFF:
                facts.fail(key, f"no such key; those that are read: {', '.join(sorted(READ_KEYS))}")
        heads = facts.integer("attention.head_count", 1, 1024)
        hidden_size = facts.integer("embedding_length", 1, 1 << 16)
        head_dim = facts.integer("attention.key_length", 1, 1 << 12, default=hidden_size // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if facts.integer(key, 1, 1 << 12, default=head_dim) != head_dim:
                facts.fail(key, f"{head_dim}, the size of a head")
        tensors = self.file.tensors
        if AROUND["model.embed_tokens.weight"] not in tensors:
            raise RiverError(f"{self.file.path}: tensor token_embd.weight is missing")
        config = ARCHITECTURES[self.architecture] | {
            "vocab_size": tensors[AROUND["model.embed_tokens.weight"]].shape[0],
            "hidden_size": hidden_size,
            "intermediate_size": facts.integer("feed_forward_length", 1, 1 << 20),
            "num_hidden_layers": facts.integer("block_count", 1, 1024),
            "num_attention_heads": heads,
            "num_key_value_heads": facts.integer("attention.head_count_kv", 1, 1024, default=heads),
            "head_dim": head_dim,
            "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon", 1e-12, 1.0),
            "max_position_embeddings": facts.integer("context_length", 1, 1 << 24),
            "rope_theta": facts.number("rope.freq_base", 1.0, 1e12, default=10000.0),
            "tie_word_embeddings": AROUND[HEAD] not in tensors,
            "hidden_act": "silu",
            "dtype": "bfloat16",
        }
        if self.architecture in NEIGHBOURS_ROTATE:
            config["attention_bias"] = "blk.0.attn_output.bias" in tensors
        return config | self._rope_scaling(facts, config) | self._token_ids()

    def _rope_scaling(self, facts: Reader, config: dict) -> dict:
        if FREQUENCY_FACTORS in self.file.tensors:
            return {"rope_scaling": self._llama3(config)}
        if facts.choice("rope.scaling.type", ("none", "linear"), default="none") == "none":
            return {}
        factor = facts.number("rope.scaling.factor", 1.0, 1e4)
        return {"rope_scaling": {"rope_type": "linear", "factor": factor}}

    def _llama3(self, config: dict) -> dict:
        """The scaling whose factors the file holds: that of Llama 3, whose long waves are stretched most."""
        factors = self.file.tensors[FREQUENCY_FACTORS].read().flatten()
        unscaled = model_config(Reader(self.file.path, config), Reader(Path(), {}))
        scaling = {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3}
        scaled = model_config(Reader(self.file.path, config | {"rope_scaling": scaling}), Reader(Path(), {}))
        expected = inverse_frequencies(unscaled) / inverse_frequencies(scaled)
        if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-3):
            raise RiverError(f"{self.file.path}: tensor {FREQUENCY_FACTORS}: accepted are Llama 3's factors")
        return scaling

    def _token_ids(self) -> dict:
        """The ids of the tokens that begin and end texts; chat models may end a turn by another one."""
        facts, ids = Reader(self.file.path, self.file.metadata), {}
        for name in ("bos", "eos", "eot"):
            key = f"tokenizer.ggml.{name}_token_id"
            if key in facts.values:
                ids[name] = facts.integer(key, -1, (1 << 32) - 1)  # both of which may stand for "none"
        ends = [ids[name] for name in ("eos", "eot") if name in ids]
        found = {"bos_token_id": ids.get("bos"), "eos_token_id": list(dict.fromkeys(ends))}
        return {key: value for key, value in found.items() if value not in (None, [])}


@dataclass(frozen=True)
class Converted:
    """What was written to a directory: `kinds` counts the tensors of the GGUF file by their types."""

    config: ModelConfig
    kinds: dict[str, int]
    tokenizer: bool


def convert_gguf(
    path: str | Path, directory: str | Path, dtype: torch.dtype | str = "auto", progress: bool = True
) -> Converted:
    """Writes the checkpoint directory of a GGUF file: all of it, or nothing.

    Args:
        path: the file; architecture llama, qwen2 or qwen3, in any types that the package gguf dequantises.
        directory: new or empty.
        dtype: of the weights; "auto" is bfloat16.
        progress: show on standard error how far it is, if it takes long.
    """
    model, directory = GgufModel(path), Path(directory)
    dtype = torch.bfloat16 if dtype == "auto" else parse_dtype(dtype, "convert")
    refuse_taken(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as scratch:
            made = Path(scratch) / "checkpoint"
            made.mkdir()
            _write_weights(model, made, dtype, progress)
            name = str(dtype).removeprefix("torch.")
            text = json.dumps(model.config_json | {"dtype": name}, indent=2) + "\n"
            (made / "config.json").write_text(text, encoding="utf-8")
            tokenizer = _write_tokenizer(model.file, made)
            for file in (*made.iterdir(), made):
                flush(file)
            made.rename(directory)
            flush(directory.parent)
    except (OSError, SafetensorError) as error:
        raise RiverError(f"{directory}: cannot be written ({error})") from None
    kinds = Counter(tensor.kind for tensor in model.file.tensors.values())
    return Converted(replace(model.config, dtype=dtype), dict(kinds.most_common()), tokenizer)


def refuse_taken(directory: Path) -> None:
    if os.path.lexists(directory) and not (
        directory.is_dir() and not directory.is_symlink() and not any(directory.iterdir())
    ):
        raise RiverError(f"{directory}: exists; accepted: a new or an empty directory")


def _write_weights(model: GgufModel, directory: Path, dtype: torch.dtype, progress: bool) -> None:
    """model.safetensors, or if that were large shards and their index; a shard at a time is in memory."""
    shapes = tensor_shapes(model.config)
    shards = list(_shards({name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}))
    weight_map = {}
    with progress_bar("converting", len(shapes), progress) as advance:
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            file = "model.safetensors" if len(shards) == 1 else file
            tensors = {}
            for name in names:
                tensors[name] = model.read(name, dtype).contiguous()
                if not tensors[name].isfinite().all():
                    raise RiverError(
                        f"{model.file.path}: tensor {model.stored(name).name} holds NaN or Inf in {dtype}"
                    )
                advance()
            save_file(tensors, directory / file, metadata={"format": "pt"})
            os.chmod(directory / file, directory.stat().st_mode & 0o666)  # what the umask allows
            weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    """The names in their order, in lists of up to SHARD_BYTES where a tensor allows it."""
    names, total = [], 0
    for name, size in sizes.items():
        if names and total + size > SHARD_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _write_tokenizer(file: GgufFile, directory: Path) -> bool:
    """Writes the tokenizer that transformers makes of the file's; False where the file has none."""
    if "tokenizer.ggml.model" not in file.metadata:
        return False
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise RiverError(
            f"{file.path}: converting its tokenizer takes the package transformers; install it, or "
            "river_ext[gguf]"
        ) from None
    with tempfile.TemporaryDirectory() as alone:  # without what may lie beside the file
        (Path(alone) / "model.gguf").symlink_to(file.path.absolute())
        try:
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf", local_files_only=True)
            tokenizer.save_pretrained(directory)
        except Exception as error:
            why = f"{type(error).__name__}: {str(error)[:160]}"
            raise RiverError(f"{file.path}: transformers cannot convert its tokenizer ({why})") from None
    return True
