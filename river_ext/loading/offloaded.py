"""Offloaded backbone layers on a CPU: views of the mapped file, whose pages need not be in memory."""

import mmap
from collections.abc import Iterable
from ctypes import CDLL, c_int, c_size_t, c_void_p
from pathlib import Path

from ..checks import integer
from .config import ModelConfig
from .weights import DecoderBlockWeights

MAPPINGS = Path("/proc/self/maps")


def checked_resident_layers(value, config: ModelConfig) -> int | None:
    """Checks the argument of `load`. Layer 0 is always resident: every token begins there."""
    return None if value is None else integer("resident_layers", value, 1, config.num_hidden_layers)


def give_back_pages(layers: Iterable[DecoderBlockWeights]) -> None:
    """Takes the pages of layers out of this process; they come back from the file when they are next used.

    Nobody may have written to the tensors. One that is no view of a mapped file is left alone.
    """
    files = _mapped_files()
    madvise = CDLL(None).madvise
    madvise.argtypes = c_void_p, c_size_t, c_int
    for tensor in (tensor for layer in layers for tensor in vars(layer).values() if tensor is not None):
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        size = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if size > 0 and any(low <= start and end <= high for low, high in files):
            madvise(first, size, mmap.MADV_DONTNEED)  # a wish: where it fails, the pages stay


def _mapped_files() -> list[tuple[int, int]]:
    """First address and end of every mapping of a file; none where the system does not say."""
    if not MAPPINGS.exists():
        return []
    mappings = (line.split(maxsplit=5) for line in MAPPINGS.read_text(errors="replace").splitlines())
    return [
        tuple(int(address, 16) for address in addresses.split("-"))
        for addresses, _, _, _, inode, *_ in mappings
        if inode != "0"
    ]
