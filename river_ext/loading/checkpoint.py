"""Hugging Face checkpoint directories: config.json, safetensors (single or sharded), tokenizer.json.

Tensors are views of the memory-mapped files: where the stored dtype is the wanted one and the device is
the CPU, nothing is copied, and a tied head is the embedding itself. Only safetensors are read, never
pickle, and nothing in a checkpoint is executed. Whatever does not fit config.json is refused with one
line that names the file and the tensor.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..errors import RiverError
from ..progress import progress_bar
from .config import ModelConfig, checkpoint_directory, parse_device, parse_dtype, read_config
from .families import FAMILIES
from .files import is_regular, path_of
from .offloaded import checked_resident_layers
from .stored import PICKLE_SUFFIXES, STORED_DTYPES, StoredTensor, stored_tensors
from .tokenizer import load_tokenizer
from .weights import BlockShape, DecoderBlockWeights, ModelWeights

HEAD = "lm_head.weight"
# what older files hold beside the weights, and what the model computes itself
HARMLESS = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached", ".attn.masked_bias")
# of a multimodal checkpoint: names before those of its text model, and what else it holds
TEXT_MODEL = re.compile(r"^(model\.)?language_model\.(model\.)?")
NOT_TEXT = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")
FUSED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj") | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".gguf", *PICKLE_SUFFIXES)
FINGERPRINT_BLOCK = 4096  # bytes


@dataclass
class Checkpoint:
    directory: Path | None  # None: of a model in memory
    config: ModelConfig
    weights: ModelWeights
    tokenizer: Tokenizer | None  # None: the directory has no tokenizer.json
    fingerprint: str  # names the weights whatever their sharding and the dtype they were loaded in


def load_checkpoint(
    directory: str | Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    check_finite: bool = True,
    resident_layers: int | None = None,
) -> Checkpoint:
    """Loads a checkpoint directory.

    Args:
        directory: holds config.json, model.safetensors or its shards, and tokenizer.json.
        dtype: the model dtype or its name; "auto" takes config.json's, or else the stored one. Tensors
            stored in another dtype are converted, a copy each; the others stay views of the file.
        device: where the weights go.
        check_finite: refuse weights with NaN or Inf. This reads every byte once, so a mapped file is in
            memory afterwards; without it, weights are read when they are first used.
        resident_layers: matrices of the backbone layers from this one on are not to be in the device's
            memory: for a GPU they go to pinned memory of the host, on the CPU they must be views of the file.
    """
    directory = checkpoint_directory(directory)
    config = read_config(directory)
    stored = _checked_tensors(directory, config)
    auto = config.dtype or stored["model.embed_tokens.weight"].dtype
    config = replace(
        config,
        dtype=parse_dtype(auto if dtype == "auto" else dtype, "load"),
        resident_layers=checked_resident_layers(resident_layers, config),
    )
    device = parse_device(device)
    if device.type == "cpu":
        for name in _offloaded(config):
            stored[name].check_is_view(config.dtype)
    if device.type == "cuda":
        check_gpu_kernels(config)
    return assemble(directory, config, stored, device, load_tokenizer(directory), check_finite)


def assemble(
    directory: Path | None,
    config: ModelConfig,
    stored: dict[str, "StoredTensor"],
    device: torch.device,
    tokenizer: Tokenizer | None,
    check_finite: bool = True,
) -> Checkpoint:
    """The checkpoint of tensors that fit the config: their values in config.dtype, on the device."""
    offloaded = _offloaded(config)

    def load(name: str) -> Tensor:
        pinned = name in offloaded and device.type == "cuda"
        tensor = stored[name].read().to(device="cpu" if pinned else device, dtype=config.dtype)
        if check_finite and not _all_finite(tensor):
            raise RiverError(f"{stored[name].path}: tensor {name} holds NaN or Inf in {config.dtype}")
        advance()
        return tensor.pin_memory() if pinned else tensor

    with progress_bar("loading", len(tensor_shapes(config)), wanted=check_finite) as advance:
        embed_tokens = load("model.embed_tokens.weight")
        lm_head = load(HEAD) if HEAD in stored else embed_tokens
        layers = [
            DecoderBlockWeights(
                **{
                    field: part
                    for name, fields in layer_tensors(config, layer).items()
                    for field, part in _split(load(name), fields)
                }
            )
            for layer in range(config.num_hidden_layers)
        ]
        norm = load("model.norm.weight")
    # a head that is stored in spite of tie_word_embeddings counts, as in transformers: it may have been tuned
    tied = config.tie_word_embeddings and (lm_head is embed_tokens or torch.equal(lm_head, embed_tokens))
    config = replace(config, tie_word_embeddings=tied)
    weights = ModelWeights(embed_tokens, layers, norm, embed_tokens if tied else lm_head)
    used = {name: stored[name] for name in tensor_shapes(config)}
    return Checkpoint(directory, config, weights, tokenizer, _fingerprint(used))


def lone_config(path: str | Path) -> Path | None:
    """The config.json that a path names, or that a directory without weights holds; None: there are some."""
    path = path_of(path, "checkpoint")
    if path.suffix == ".json" and is_regular(path):
        return path
    if not is_regular(path / "config.json"):
        return None
    weights = any(name.endswith(WEIGHT_SUFFIXES) for name in os.listdir(path))
    return None if weights else path / "config.json"


def check_gpu_kernels(config: ModelConfig) -> None:
    """Refuses a model that the CUDA kernels cannot run, before its weights go to the GPU."""
    if config.dtype == torch.float32:
        raise RiverError("dtype float32 on cuda; accepted there: dtype='bfloat16' or 'float16'")
    for name in ("head_dim", "intermediate_size"):
        if getattr(config, name) % 8:
            raise RiverError(f"{name} {getattr(config, name)} on cuda; accepted there: multiples of 8")


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config holds."""
    shapes = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    for layer in range(config.num_hidden_layers):
        for name, fields in layer_tensors(config, layer).items():
            rows = sum(shape[0] for shape in fields.values())
            shapes[name] = (rows, *next(iter(fields.values()))[1:])
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def layer_tensors(config: ModelConfig, layer: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Tensors of one layer: the fields of DecoderBlockWeights whose rows each holds, and their shapes."""
    tensors = {}
    for field, shape in BlockShape.of(config).tensors().items():
        if _has(config, field):
            name = tensor_name(layer, field, FAMILIES[config.model_type].fused)
            tensors.setdefault(name, {})[field] = shape
    return tensors


def _split(tensor: Tensor, fields: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """The fields that lie in a tensor, as views of it."""
    return zip(fields, tensor.split([shape[0] for shape in fields.values()]), strict=True)


def _offloaded(config: ModelConfig) -> list[str]:
    """Names of the matrices of offloaded layers. Norms and biases are small, and the river's as well."""
    layers = range(config.num_hidden_layers)[config.resident_layers or config.num_hidden_layers :]
    return [
        name
        for layer in layers
        for name, fields in layer_tensors(config, layer).items()
        if fields.keys() & BlockShape.of(config).projections().keys()
    ]


def _has(config: ModelConfig, field: str) -> bool:
    """Whether the blocks of a model have a tensor that others may lack."""
    family = FAMILIES[config.model_type]
    if field.endswith("_bias"):
        return config.attention_bias and (field != "o_bias" or family.o_bias)
    return family.qk_norm or field not in ("q_norm", "k_norm")


def tensor_name(layer: int, field: str, fused: bool = False) -> str:
    """What a field of DecoderBlockWeights is called in a checkpoint."""
    prefix = f"model.layers.{layer}"
    if field.endswith("_layernorm"):
        return f"{prefix}.{field}.weight"
    if field.endswith("_bias"):
        return f"{prefix}.self_attn.{field.removesuffix('_bias')}_proj.bias"
    part = "mlp" if field in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"{prefix}.{part}.{FUSED.get(field, field) if fused else field}.weight"


def text_tensors(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Those of the text model in a multimodal checkpoint, by the names that they would have alone."""
    text: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if NOT_TEXT.match(name):
            continue
        plain = TEXT_MODEL.sub("model.", name)
        plain = HEAD if plain == f"model.{HEAD}" else plain
        if plain in text:
            raise RiverError(f"{tensor.path}: tensor {name} is also there as {text[plain].name}")
        text[plain] = tensor
    return text


def _checked_tensors(directory: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Those of the text model, which have the names and shapes that its config says."""
    stored = stored_tensors(directory)
    if config.multimodal:
        stored = text_tensors(stored)
    check_tensors(stored, tensor_shapes(config), directory)
    return stored


def check_tensors(stored: dict, shapes: dict[str, tuple[int, ...]], directory: Path) -> None:
    """Refuses tensors that are missing, surplus, or of another shape or dtype than config.json says."""
    files = {tensor.path for tensor in stored.values()}
    where = files.pop() if len(files) == 1 else directory
    missing = [name for name in shapes if name not in stored]
    if missing:
        raise RiverError(
            f"{where}: tensor {missing[0]} {list(shapes[missing[0]])} is missing{_more(missing)}"
        )
    optional = {HEAD: shapes["model.embed_tokens.weight"]} if HEAD in stored else {}
    for name, shape in (shapes | optional).items():
        tensor = stored[name]
        if tensor.shape != shape:
            raise RiverError(
                f"{tensor.path}: tensor {name} has shape {list(tensor.shape)}; "
                f"config.json asks for {list(shape)}"
            )
        if tensor.dtype_name not in STORED_DTYPES:
            raise RiverError(
                f"{tensor.path}: tensor {name} is stored as {tensor.dtype_name}; "
                f"accepted: {', '.join(STORED_DTYPES)}"
            )
    surplus = sorted(name for name in stored.keys() - shapes.keys() - {HEAD} if not name.endswith(HARMLESS))
    if surplus:
        raise RiverError(
            f"{stored[surplus[0]].path}: tensor {surplus[0][:120]}{_more(surplus)} has no place "
            f"in the model of config.json"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more, such as {names[-1][:120]})" if len(names) > 1 else ""


def _all_finite(tensor: Tensor) -> bool:
    # NaN and Inf show in the extremes; 20 times faster than isfinite, and without temporaries
    return all(extreme.isfinite().item() for extreme in torch.aminmax(tensor))


def fingerprint(directory: str | Path) -> str:
    """That of `load_checkpoint`, which also checks all of the weights, and so reads them."""
    directory = checkpoint_directory(directory)
    config = read_config(directory)
    stored = _checked_tensors(directory, config)
    return _fingerprint({name: stored[name] for name in tensor_shapes(config)})


def _fingerprint(tensors: dict[str, StoredTensor]) -> str:
    """sha256 over name, dtype, shape and three 4-KB blocks (start, middle, end) of every tensor, by name.

    It tells checkpoints apart and does not depend on their sharding. As it samples, it is no proof against
    tampering: two checkpoints that differ only between the blocks have the same fingerprint.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype_name} {list(tensor.shape)}\n".encode())
        data = tensor.read().flatten().view(torch.uint8)
        last = max(0, data.numel() - FINGERPRINT_BLOCK)
        for start in (0, last // 2, last):
            digest.update(data[start : start + FINGERPRINT_BLOCK].cpu().numpy().tobytes())
    return digest.hexdigest()
