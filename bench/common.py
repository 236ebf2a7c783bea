"""What the benchmarks share: the machine, timing, the measured read bandwidth, and the results file."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

from river_ext import ops

RESULTS = Path(__file__).parent / "results"

# (out_features, in_features) of the linears of one layer, as the kernels see them
LAYER_SHAPES = {
    "1B qkv": (3072, 2048),
    "1B o": (2048, 2048),
    "1B gate_up": (16384, 2048),
    "1B down": (2048, 8192),
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (28672, 4096),
    "8B down": (4096, 14336),
}


def parser(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    return p


def machine() -> dict:
    """The processor and everything that the numbers depend on."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "")
    return {
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_isa": ops._C.build_info()["cpu_isa"],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch": torch.__version__,
        "river_ext": ops._C.build_info()["version"],
        "commit": _commit(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def seconds_per_call(call, weights: list, repeats: int) -> float:
    """Median over passes of the mean time of call(weight), cycling over weights larger than any cache."""
    call(weights[0])
    passes = []
    for _ in range(repeats):
        start = time.perf_counter()
        for weight in weights:
            call(weight)
        passes.append((time.perf_counter() - start) / len(weights))
    return statistics.median(passes)


def read_bandwidth(gib: float = 1.0, repeats: int = 7) -> float:
    """GB/s of the best of several streaming reductions over fp32 and int64 data: the denominator of all %."""
    data = torch.ones(int(gib * 2**28))
    reductions = [data.sum, data.amax, data.view(torch.int64).sum, data.view(torch.int64).amax]
    times = []
    for reduction in reductions:
        reduction()
        for _ in range(repeats):
            start = time.perf_counter()
            reduction()
            times.append(time.perf_counter() - start)
    return data.numel() * 4 / min(times) / 1e9


def save(name: str, folder: Path, result: dict) -> Path:
    """Writes NAME_<device>.json, to a temporary file first: a stopped run leaves nothing half-written."""
    device = "".join(c if c.isalnum() else "_" for c in result["machine"]["processor"]).strip("_").lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_cpu_{device}_{result['machine']['threads']}t.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
    return path
