"""What the GPU benchmarks share: the device, cold timing in CUDA graphs, random data, and the results file.

A time is that of one launch out of a graph of many. The launches rotate over copies of their weights that no
cache holds together; the graph is replayed between events, in two series. A result is the median of all
replays, and its spread what the medians of the two series differ by: smaller differences are noise.
"""

import argparse
import contextlib
import functools
import gc
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.lib import records
from river_ext import ops

DEVICE = "cuda"
WORKING_SET = 1.0e9  # bytes that launches rotate over, or 4 x L2 where that is more
GRAPH_BYTES = 4.0e9  # read by one replay: about a millisecond, so that its start does not count
MAX_LAUNCHES = 2048


# ---- command line and device ------------------------------------------------------------------------


def parser(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--out", type=Path, default=records.folder(),
                   help="folder of the results (default: $OUT, or %(default)s)")  # fmt: skip
    p.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    return p


def refuse(reason: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
    raise SystemExit(2)


def require_cuda(warm: bool = True) -> None:
    """Ends with one line where there is nothing to measure."""
    if not torch.cuda.is_available():
        refuse(f"no CUDA device is visible to torch {torch.__version__}; this benchmark measures one")
    info = ops._C.build_info()
    if not info["cuda"]:
        refuse(f"river_ext has no CUDA kernels: {info['cuda_note']}")
    torch.manual_seed(0)
    ops._C.set_overlap("prefetch")  # as in captured steps
    if warm:
        warm_up()


def warm_up(seconds: float = 0.3) -> None:
    """Brings the clocks up."""
    x = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(20):
            x @ x
        torch.cuda.synchronize()


def sm_count() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def machine() -> dict:
    """The device and everything that the numbers depend on; None: could not be read."""
    properties = torch.cuda.get_device_properties(0)
    info = ops._C.build_info()
    return {
        "device": properties.name,
        "sm_count": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size / 2**20,
        "driver": driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": ".".join(map(str, sys.version_info[:3])),
        "river_ext": info["version"],
        "cuda_archs": info["cuda_archs"],
        "variants": variants(),
        "commit": commit(),
    }


def commit() -> str | None:
    """RIVER_COMMIT, for a copy of the tree without its history, or what git says."""
    if os.environ.get("RIVER_COMMIT"):
        return os.environ["RIVER_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return _output(command)


def variants() -> dict[str, int]:
    """Every switch of this build between two designs, and what it is set to."""
    return ops._C.variants()


def driver() -> str | None:
    file = Path("/proc/driver/nvidia/version")  # at once; nvidia-smi takes a second
    found = re.search(r"\b(\d{3,}\.[\d.]+)", file.read_text()) if file.exists() else None
    return (
        found[1] if found else _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    )


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


# ---- timing -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Time:
    us: float  # of one launch, median
    spread_percent: float  # between the medians of two series of the same
    launches: int  # in a replay

    def fields(self) -> dict:
        return {"us": self.us, "spread_percent": self.spread_percent, "launches": self.launches}


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """One for all captures: the ops keep a workspace per stream."""
    return torch.cuda.Stream()


def capture(run: Callable[[], None], keep_graph: bool = False) -> torch.cuda.CUDAGraph:
    """Runs once to warm up, then captures, both on one stream of their own."""
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph(keep_graph=True) if keep_graph else torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        gc.disable()  # nothing may be freed while a capture is on
        try:
            graph.capture_begin()
            try:
                run()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # that the capture is void: why it is says more
                    graph.capture_end()
                raise
            graph.capture_end()
        finally:
            gc.enable()
    torch.cuda.synchronize()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, repeats: int) -> list[float]:
    """The time of each of several replays, back to back."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in events]


def nothing() -> None:
    pass


def time_graph(
    graph: torch.cuda.CUDAGraph, launches: int, repeats: int = 10, reset: Callable[[], None] = nothing
) -> Time:
    """The time of one of the launches; `reset` runs before each series."""
    return time_together({"": (graph, launches, reset)}, repeats)[""]


def time_together(graphs: dict[str, tuple], repeats: int) -> dict[str, Time]:
    """The times of several (graph, launches, reset), series by series in turns, there and back."""
    order, series = list(graphs), {name: [] for name in graphs}
    for names, count in ((order, 2), (order, repeats), (order[::-1], repeats)):  # the first one warms up
        for name in names:
            graph, _, reset = graphs[name]
            reset()
            series[name].append(replay_us(graph, count))
    return {name: time_of(*series[name][1:], graphs[name][1]) for name in order}


def time_of(first: list[float], second: list[float], launches: int) -> Time:
    medians = [statistics.median(series) for series in (first, second)]
    spread = 100 * abs(medians[0] - medians[1]) / min(medians)
    return Time(statistics.median(first + second) / launches, spread, launches)


def time_rotated(call: Callable, items: list, size: float, repeats: int = 10) -> Time:
    """The time of call(item) in a graph that goes over the items, of `size` bytes each, several times."""
    graph, launches = capture_rotated(call, items, size)
    return time_graph(graph, launches, repeats)


def capture_rotated(call: Callable, items: list, size: float) -> tuple[torch.cuda.CUDAGraph, int]:
    passes = max(1, min(int(GRAPH_BYTES // (len(items) * size)), MAX_LAUNCHES // len(items)))

    def run():
        for _ in range(passes):
            for item in items:
                call(item)

    return capture(run), passes * len(items)


def copies(size: float) -> int:
    """How many tensors of `size` bytes make a working set that is cold whenever its turn comes."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(MAX_LAUNCHES, int(-(-max(WORKING_SET, 4 * l2) // size))))


def rotation(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor and copies of it elsewhere in memory."""
    return [tensor] + [tensor.clone() for _ in range(copies(size_of(tensor)) - 1)]


def size_of(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@contextlib.contextmanager
def overlap(mode: str):
    """How much of a kernel may happen before the kernels ahead of it end: none, launch or prefetch."""
    before = ops._C.set_overlap(mode)
    try:
        yield
    finally:
        ops._C.set_overlap(before)


# ---- data -------------------------------------------------------------------------------------------


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """|out - expected| / |expected| in double precision; NaN stays NaN."""
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


# ---- results ----------------------------------------------------------------------------------------


class Results:
    """Every result of a part goes to the file at once, and what is to be read to the screen."""

    def __init__(self, part: str, args: argparse.Namespace):
        facts = machine()
        self.part, self.path, self.lines = part, records.path_of(args.out, facts["device"]), []
        settings = {name: value for name, value in vars(args).items() if name != "out"}
        self("start", machine=facts, settings=settings)

    def __call__(self, record: str, text: str = "", /, **fields) -> None:
        self.lines.append(records.append(self.path, self.part, record, **fields))
        if text:
            print(text, flush=True)
