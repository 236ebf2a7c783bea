"""What the benchmarks share: the machine, timing, the read they are measured against, the results file."""

import argparse
import ctypes
import functools
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median

import torch
from torch.utils.cpp_extension import load

from river_ext import benchmark

RESULTS = Path(__file__).parent.parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file (default: %(default)s)")
    p.add_argument("--force", action="store_true", help="replace the results that are there")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    return p


def machine() -> dict:
    """The processor and everything that the numbers depend on."""
    return benchmark.machine() | {"commit": _commit()}


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


TURNS = 16  # per pass over a list of weights


def interleaved(calls: dict, passes: int) -> dict[str, list[list[float]]]:
    """Seconds of calls, turn by turn, for {name: (weights, call)}. In a turn each of them, in random order,
    calls on the next sixteenth of its weights (one at least), so that a slow moment of the machine hits all
    alike. Names that share a list share the place in it: none finds in a cache what another has just left.
    Turns of single calls would time each in what the one before left behind: 10 to 30 % there."""
    seconds = {name: [] for name in calls}
    place = {id(weights): 0 for weights, _ in calls.values()}
    order, shuffle = list(calls), random.Random(0).shuffle
    for turn in range(TURNS * passes + 1):
        shuffle(order)
        for name in order:
            weights, call = calls[name]
            turn_seconds = []
            for _ in range(math.ceil(len(weights) / TURNS)):
                weight = weights[place[id(weights)] % len(weights)]
                place[id(weights)] += 1
                start = time.perf_counter()
                call(weight)
                turn_seconds.append(time.perf_counter() - start)
            if turn > 0:  # the first one warms up
                seconds[name].append(turn_seconds)
    return seconds


def times(seconds: dict[str, list[list[float]]], name: str, other: str) -> float:
    """How many times as long a call of `other` takes as one of `name`: the median over the turns."""
    return median(fmean(b) / fmean(a) for a, b in zip(seconds[name], seconds[other], strict=True))


@functools.cache
def reader():
    """A function that reads all bytes of a contiguous tensor as fast as torch's threads can: read.cpp, which
    beats torch's best reduction; that one (amax) where no C++ compiler is found."""
    flags = ["-O3", "-march=native"]
    try:
        built = load("river_bench_read", [str(Path(__file__).parent / "read.cpp")], extra_cflags=flags,
                     is_python_module=False, build_directory=tempfile.mkdtemp())  # fmt: skip
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"read.cpp was not compiled, amax is the denominator: {str(error).splitlines()[0]}")
        return lambda tensor: tensor.view(torch.uint8).flatten().view(torch.float32).amax()
    read_bytes = ctypes.CDLL(built).read_bytes
    read_bytes.argtypes, read_bytes.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_int64
    return lambda tensor: read_bytes(tensor.data_ptr(), tensor.nbytes)


def results_path(name: str, args: argparse.Namespace) -> Path:
    """Where a run saves, asked before it: NAME_<device>.json. Ends with one line if results are there."""
    device = "".join(c if c.isalnum() else "_" for c in machine()["processor"]).strip("_").lower()
    path = args.out / f"{name}_cpu_{device}_{args.threads}t.json"
    if path.exists() and not args.force:
        print(f"{name}.py: {path} exists; accepted: another folder for --out, or --force", file=sys.stderr)
        raise SystemExit(2)
    return path


def save(path: Path, result: dict) -> Path:
    """Through a temporary file: a stopped run leaves nothing half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
    return path
