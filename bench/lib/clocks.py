"""Clocks, temperature and power of the GPU while it works, by nvidia-smi; {} where they cannot be read."""

import subprocess
import time

import torch

from bench.lib import gpu
from bench.lib.weights import dense_weight
from river_ext import ops

FIELDS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw"


def streaming_graph() -> torch.cuda.CUDAGraph:
    """Work to read the clocks under: a large weight, again and again."""
    weight, x = dense_weight(28672, 4096), torch.randn(1, 4096, dtype=torch.bfloat16)
    return gpu.capture(lambda: ops.linear(x, weight))


def under_load(graph: torch.cuda.CUDAGraph) -> dict:
    """Clocks (MHz), temperature and power (W), read while the graph runs again and again."""
    command = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return {}
    end = time.perf_counter() + 10
    while process.poll() is None and time.perf_counter() < end:
        for _ in range(10):
            graph.replay()
        torch.cuda.synchronize()
    if process.poll() != 0:
        process.kill()
        return {}
    return read(process.stdout.read())


def read(text: str) -> dict:
    """One line of nvidia-smi's answer; a value that it does not give is None."""
    values = (text.strip().splitlines() or [""])[0].split(",")
    names = FIELDS.split(",")
    if len(values) != len(names):
        return {}
    return {name.replace(".", "_"): _number(value) for name, value in zip(names, values, strict=True)}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
