"""Importing the module registers the ops of `ops.py`; what it holds itself are facts and settings."""

from collections.abc import Callable
from typing import Any, TypedDict, TypeVar

from numpy import float32, int64
from numpy.typing import NDArray

_Outputs = TypeVar("_Outputs")

MAX_ROWS: int
MAX_HEAD_DIM: int
MAX_GROUP: int  # query heads per KV head
TILE_ROWS: int
TILE_COLS: int
TILE_BYTES: int

class _BuildInfo(TypedDict):
    version: str
    cuda: bool  # whether this build has CUDA kernels
    cuda_archs: str  # as in TORCH_CUDA_ARCH_LIST
    cuda_note: str  # why there are none
    cpu_isa: str  # the instruction set that the CPU kernels use now

class _Image(TypedDict):
    device: int  # the architecture of the current GPU
    code: int | None  # that of the machine code it runs; None: this build has none for it
    ptx: int | None  # that of the PTX behind it

def build_info() -> _BuildInfo:
    """What this build is, and what it was built with."""

def cpu_isas() -> tuple[str, ...]:
    """Instruction sets that this machine can run, best first."""

def set_cpu_isa(name: str, /) -> None:
    """Chooses the instruction set of the CPU kernels, for tests and measurements; not while an op runs."""

def gumbel(seed: int, position: int, tokens: NDArray[int64]) -> NDArray[float32]:
    """The noise of `lm_head` for token ids."""

def gumbel_of(word: Any) -> Any:
    """The noise that a random word gives, or an array of words."""

def set_overlap(name: str, /) -> str:
    """How much of this thread's CUDA kernels may happen before those ahead of them end; returns what it was.

    "none"; "launch", the default, which reads nothing early; "prefetch", which reads weights early.
    """

def variants() -> dict[str, int]:
    """Designs that are compared on hardware, and which of the two each has: 0 or 1."""

def set_variant(name: str, value: int) -> int:
    """Chooses a design for the whole process, for measurements; returns what it was."""

class Graph:
    """Calls of ops on a CPU that are captured once and run again, like a CUDA graph.

    It keeps their tensors, which have to keep their memory.
    """

    def __init__(self) -> None: ...
    def capture(self, run: Callable[[], _Outputs]) -> _Outputs:
        """Calls `run` and returns what it returns. Its ops on CPU tensors go to the graph and do not run."""

    @property
    def is_capturing(self) -> bool:
        """Whether this thread is in a call of `capture`."""

    def __len__(self) -> int:
        """How many ops it has."""

    def replay(self, begin: int, end: int) -> None:
        """Runs ops begin to end - 1 on what their tensors hold now. Not by two threads at once."""

# --- only in a build with CUDA kernels: build_info()["cuda"] ---------------------------------------------

def cuda_image() -> _Image:
    """Which of the compiled kernels the current GPU runs."""

def read_ring(
    *,
    data: int,
    bytes: int,
    stage_bytes: int,
    copy_bytes: int,
    stages: int,
    blocks_per_sm: int,
    checksums: int,
    stream: int,
) -> None:
    """Reads memory of the current GPU through the ring that streams weights, for measurements.

    data, checksums and stream are addresses.
    """
