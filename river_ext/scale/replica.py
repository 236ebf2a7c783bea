"""A replica: a process with a copy of the model, on cores or a GPU of its own."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import model as models
from ..checks import choice, integer
from ..engine.engine import Engine
from ..loading.calibrated import read_calibrated
from ..loading.checkpoint import fingerprint
from ..loading.config import parse_dtype, read_config
from ..quant.exit_river import read_facts

DEVICES = ("auto", "cpu", "cuda")
MOST_REPLICAS = 10_000


@dataclass(frozen=True)
class Replica:
    """What each replica loads, and what it takes of its machine. Paths are the same on all machines."""

    model: str | None  # a checkpoint's directory; None: the bundled model
    river: str | None
    device: str  # "cpu" or "cuda"
    dtype: str
    threads: int  # of the CPU, each a core
    slots: int
    max_len: int | None
    calibrated: str | None = None

    @property
    def directory(self) -> Path:
        return models.DEMO if self.model is None else Path(self.model)

    @property
    def resources(self) -> dict[str, int]:
        """In Ray's words."""
        return {"num_cpus": self.threads, "num_gpus": int(self.device == "cuda")}

    def load(self) -> tuple[models.Model, Engine]:
        """In the process that becomes the replica."""
        torch.set_num_threads(self.threads)
        model = models.load(self.model, self.device, self.dtype, self.river, calibrated=self.calibrated)
        return model, model.engine(slots=self.slots, max_len=self.max_len)


def checked_replica(
    model: str | os.PathLike | None,
    *,
    replicas: int,
    river: str | os.PathLike | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    slots: int = 8,
    max_len: int | None = None,
    calibrated: str | os.PathLike | None = None,
) -> Replica:
    """One of `replicas` that are alike; what can be refused without its weights is refused here.

    Args:
        device: "auto" is "cuda" where this machine has a GPU and this build has kernels for it.
        threads: None shares the cores of this machine out on the CPU, and is 1 beside a GPU.
    """
    choice("device", device, DEVICES)
    device = models.choose_device("auto").type if device == "auto" else device
    directory = models.DEMO if model is None else Path(model)
    config = read_config(directory)
    if max_len is not None:
        max_len = integer("max_len", max_len, 1, config.max_length)
    known_dtype = config.dtype if dtype == "auto" else parse_dtype(dtype, "load")
    if river is not None:
        read_facts(river)
    if calibrated is not None:
        found = read_calibrated(calibrated, config.num_hidden_layers)
        found.check_model(calibrated, fingerprint(directory), known_dtype)
    if threads is None:
        cores = len(os.sched_getaffinity(0))
        threads = 1 if device == "cuda" else max(1, cores // replicas)
    return Replica(
        model=_absolute(model),
        river=_absolute(river),
        device=device,
        dtype=dtype,
        threads=integer("threads", threads, 1),
        slots=integer("slots", slots, 1, 8),
        max_len=max_len,
        calibrated=_absolute(calibrated),
    )


def _absolute(path: str | os.PathLike | None) -> str | None:
    """Replicas have another working directory."""
    return None if path is None else os.path.abspath(path)
