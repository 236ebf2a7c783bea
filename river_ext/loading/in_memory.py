"""A model of transformers in memory as a checkpoint: its weights are used where they are, none is copied.

Its config is what `save_pretrained` would write, and is read by the same rules as a file.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import RiverError
from .checkpoint import (
    HEAD,
    Checkpoint,
    assemble,
    check_gpu_kernels,
    check_tensors,
    tensor_shapes,
    text_tensors,
)
from .config import ModelConfig, parse_dtype, read_config_objects
from .json_object import Reader
from .stored import STORED_DTYPES, StoredTensor

EMBEDDING = "model.embed_tokens.weight"
SAMPLES = 64  # of a weight
DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


class HeldTensors(dict[str, Tensor]):
    """The tensors of a model by their names, with what is used of an open safetensors file."""

    get_tensor = dict.__getitem__


def checkpoint_in_memory(
    module: nn.Module, dtype: torch.dtype | str, device: torch.device, resident_layers: int | None = None
) -> Checkpoint:
    """The checkpoint that a model is, one with a head: LlamaForCausalLM, say.

    All of its weights must be contiguous, on the device, and of one dtype: that which is asked for, or any
    that is accepted if `dtype` is "auto".
    """
    where = Path(f"{type(module).__name__} in memory")
    if resident_layers is not None:
        raise RiverError(f"resident_layers={resident_layers} for a model in memory; accepted: None")
    config = _config(module, where)
    stored = _stored(module, where)
    if config.multimodal:
        stored = text_tensors(stored)
    check_tensors(stored, tensor_shapes(config), where)
    wanted = stored[EMBEDDING].dtype if dtype == "auto" else parse_dtype(dtype, "load")
    config = replace(config, dtype=wanted)
    for name in [*tensor_shapes(config), *({HEAD} & stored.keys())]:
        _check_is_usable(stored[name], wanted, device)
    if device.type == "cuda":
        check_gpu_kernels(config)
    return assemble(None, config, stored, device, tokenizer=None)


def device_of(module: nn.Module) -> torch.device:
    """Where a model's first weight is."""
    weights = module.state_dict().values()
    return next((weight.device for weight in weights if isinstance(weight, Tensor)), torch.device("cpu"))


def state_of(module: nn.Module) -> list[tuple]:
    """Something that differs once a weight is replaced or changed in place.

    torch does not count the changes by fused optimisers, in inference mode or by way of `.data`: these show
    in a sample of the values, unless they are of a few.
    """
    return [
        (
            name, weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version,
            _sample(weight),
        )
        for name, weight in module.state_dict().items()
        if type(weight) is Tensor
    ]  # fmt: skip


def _sample(weight: Tensor) -> bytes:
    if weight.is_meta:
        return b""
    values = weight.flatten()[:: max(1, weight.numel() // SAMPLES)]
    return values.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _config(module: nn.Module, where: Path) -> ModelConfig:
    config = getattr(module, "config", None)
    if not hasattr(config, "to_json_string"):
        raise RiverError(f"{where}: it has no config of transformers; accepted: LlamaForCausalLM, say")
    values = json.loads(config.to_json_string()) | {"architectures": [type(module).__name__]}
    generation = getattr(module, "generation_config", None)
    ids = {key: getattr(generation, key, None) for key in ("bos_token_id", "eos_token_id")}
    return read_config_objects(Reader(where, values), Reader(where, ids))


def _stored(module: nn.Module, where: Path) -> dict[str, StoredTensor]:
    held = HeldTensors(module.state_dict())
    for name, weight in held.items():
        if type(weight) is not Tensor:
            raise RiverError(f"{where}: {name} is a {type(weight).__name__}; accepted: plain tensors")
    return {
        name: StoredTensor(where, held, name, tuple(t.shape), DTYPE_NAMES.get(t.dtype, str(t.dtype)))
        for name, t in held.items()
    }


def _check_is_usable(stored: StoredTensor, dtype: torch.dtype, device: torch.device) -> None:
    """Refuses a tensor of which a copy would be needed."""
    tensor = stored.file.get_tensor(stored.name)
    found = None
    if tensor.dtype != dtype:
        found, accepted = tensor.dtype, dtype
    elif tensor.device.type != device.type or device.index not in (None, tensor.device.index):
        found, accepted = tensor.device, device
    elif not tensor.is_contiguous():
        found, accepted = "not contiguous", "contiguous weights"
    elif tensor.data_ptr() % tensor.itemsize:
        found, accepted = "at an odd address", "aligned weights"
    if found is not None:
        raise RiverError(
            f"{stored.path}: tensor {stored.name} is {found}, and would be copied; accepted: {accepted}, "
            "for all weights of a model"
        )
