"""The tensors of safetensors files: which files of a directory hold them, and views of the mapped memory."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import RiverError
from .files import is_regular
from .json_object import read_json_object

STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open safetensors file, or in a model in memory; `read` gives a view."""

    path: Path
    file: safe_open  # or another object with its get_tensor
    name: str
    shape: tuple[int, ...]
    dtype_name: str

    @property
    def dtype(self) -> torch.dtype:
        return STORED_DTYPES[self.dtype_name]

    def read(self) -> Tensor:
        tensor = self.file.get_tensor(self.name)
        # headers of an odd length misplace the data; kernels may count on the alignment of an element
        return tensor.clone() if tensor.data_ptr() % tensor.itemsize else tensor

    def check_is_view(self, dtype: torch.dtype) -> None:
        """Refuses an offloaded tensor that could only be used as a copy in memory."""
        if self.dtype != dtype:
            wanted, accepted = (str(t).removeprefix("torch.") for t in (dtype, self.dtype))
            raise RiverError(
                f"{self.path}: tensor {self.name} is stored as {self.dtype_name}, and in dtype {wanted} it "
                f"would be in memory whatever resident_layers says; accepted on the CPU: dtype={accepted!r}"
            )
        if self.file.get_tensor(self.name).data_ptr() % dtype.itemsize:
            raise RiverError(
                f"{self.path}: tensor {self.name} lies at an odd place of the file, and would be in memory "
                "whatever resident_layers says; accepted on the CPU: a file that safetensors has written"
            )


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory, from model.safetensors or from the shards that its index names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if is_regular(single):
        return _open_safetensors(single)
    if not is_regular(index):
        raise RiverError(f"{single}: missing; {_what_else(directory)}")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RiverError(
            f"{index}: weight_map is missing or no object; accepted: tensor names to shard names"
        )
    stored: dict[str, StoredTensor] = {}
    for shard in dict.fromkeys(_shard_name(index, name, shard) for name, shard in weight_map.items()):
        if not is_regular(directory / shard):
            raise RiverError(f"{directory / shard}: missing; {index.name} names it")
        for name, tensor in _open_safetensors(directory / shard).items():
            if name in stored:
                raise RiverError(f"{tensor.path}: tensor {name} is also in {stored[name].path.name}")
            stored[name] = tensor
    for name, shard in weight_map.items():
        if name not in stored or stored[name].path.name != shard:
            raise RiverError(f"{directory / shard}: tensor {name} is missing; {index.name} says it is there")
    return stored


def _shard_name(index: Path, tensor: str, shard) -> str:
    plain = isinstance(shard, str) and shard == Path(shard).name and not {"\\", "\0"} & set(shard)
    if not plain or not shard.endswith(".safetensors"):
        raise RiverError(
            f"{index}: shard name {str(shard)[:80]!r} of tensor {tensor[:80]}: "
            f"accepted are names of *.safetensors files in the same directory"
        )
    return shard


def _what_else(directory: Path) -> str:
    """What to say about a directory without safetensors."""
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        return f"the directory cannot be read ({error.strerror})"
    pickled = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    other = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    if pickled:
        return f"{pickled[0]} is a pickle, which can run code and is not read: convert it to safetensors"
    needed = "model.safetensors or model.safetensors.index.json with its shards is needed"
    return f"{needed}, {other[0]} is not read" if other else needed


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        file = safe_open(path, framework="pt", device="cpu")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        return {
            name: StoredTensor(path, file, name, tuple(s.get_shape()), s.get_dtype())
            for name, s in slices.items()
        }
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        raise RiverError(f"{path}: not a complete safetensors file ({str(error)[:160]})") from None
