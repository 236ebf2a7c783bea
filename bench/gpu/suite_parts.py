"""The parts of the GPU suite, and the groups of them that fit one command each. Only the standard library."""

import glob
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECKS = ("edges", "runtime", "stream", "magic", "ring")  # of check.py
TESTS = {  # the files of each run
    "engine": ("test_gpu.py",),
    "kernels": (
        "test_cuda_kernels.py", "test_sample_kernel.py", "test_lossless_kernels.py", "test_slot_rows.py"
    ),
}  # fmt: skip
SANITIZER = "compute-sanitizer"


@dataclass(frozen=True)
class Part:
    """Its runs are processes of their own, so that a GPU error in one leaves the others alone."""

    name: str
    limit: int  # seconds, of each run
    does: str
    runs: dict[str, tuple[str, ...]]  # name: what Python is given
    tool: str = ""  # that must be there: a Python package, or the sanitizer
    at_once: bool = False  # the runs, not one after the other


def script(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"bench.gpu.{name}", *arguments)


def tests(files: tuple[str, ...]) -> tuple[str, ...]:
    workers = ("-n", "6") if importlib.util.find_spec("xdist") else ()
    wanted = ("-k", "test_gpu.py or [cuda")  # the others are of the emulated GPU
    plugins = ("-p", "bench.lib.record_tests", "-p", "no:cacheprovider")
    paths = [f"python_tests/cuda/{file}" for file in files]
    return ("-m", "pytest", *paths, "-q", "--tb=short", *wanted, *plugins, *workers)


def measuring(name: str, limit: int, does: str, script_name: str = "", *arguments: str) -> Part:
    return Part(name, limit, does, {name: script(script_name or name, *arguments)})


def sanitizing(name: str, limit: int, does: str) -> Part:
    return Part(name, limit, does, {name: script("sanitizer_cases")}, SANITIZER)


PARTS = {
    part.name: part
    for part in (
        Part(
            "build", 170, "the extension for the present GPU alone; torch comes from the disk meanwhile",
            {"extension": ("setup.py", "-q", "build_ext", "--inplace"), "torch": script("warm")},
            at_once=True,
        ),
        Part(
            "check", 40, "launch edges, static runtime, streams, W4 sums, the ring's ceiling",
            {name: script("check", name) for name in CHECKS},
        ),
        Part("tests", 75, "the GPU tests", {name: tests(files) for name, files in TESTS.items()}, "pytest"),
        measuring("chain", 40, "boundaries between dependent kernels", "chain", "--quick"),
        measuring("quick", 50, "1B steps, each variant against the other", "steps", "--quick"),
        measuring("steps", 110, "steps against their floors, each variant against the other", "steps",
                  "--contexts", "1024", "32", "8192", "--rows", "1", "8"),
        measuring("kernels", 65, "every kernel against the ring, torch, torch's int4 and Triton", "kernels",
                  "--rows", "1", "8", "--contexts", "1024", "8192", "--triton-rows", "1"),
        sanitizing("memcheck", 60, "every op under memcheck"),
        measuring("steps_8B", 60, "8B at exit depths 32, 4 and 0, batch 1 and 8", "steps", "--models", "8B",
                  "--contexts", "1024", "--rows", "1", "8", "--depths", "32", "4", "0", "--no-generate"),
        measuring("ring", 50, "read-only bandwidth of the ring: stages, depths, copy engines"),
        measuring("peers", 100, "torch in a graph, compiled transformers", "peers", "--contexts", "1024",
                  "--seconds", "80"),
        sanitizing("racecheck", 60, "every op under racecheck"),
        sanitizing("initcheck", 60, "every op under initcheck"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    seconds: int  # all of it takes no longer
    parts: tuple[str, ...]  # in the order in which they matter


# Each builds first: at once if nothing has changed, and a machine may be a fresh one.
GROUPS = {
    "first": Group(280, ("build", "check", "tests", "chain", "quick")),
    "second": Group(240, ("build", "steps", "kernels", "memcheck")),
    "third": Group(240, ("build", "steps_8B", "ring", "peers", "racecheck", "initcheck")),
}


def command(part: Part, run: str) -> list[str]:
    python = [sys.executable, *part.runs[run]]
    if part.tool != SANITIZER:
        return python
    return [find_sanitizer(), "--tool", part.name, "--error-exitcode", "9", "--print-limit", "20", *python]


def missing(part: Part) -> str:
    """Why it cannot run here, or ""."""
    found = (
        find_sanitizer() if part.tool == SANITIZER else not part.tool or importlib.util.find_spec(part.tool)
    )
    return "" if found else f"{part.tool} is not installed"


def find_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *sorted(glob.glob("/usr/local/cuda*"))]
    paths = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    paths += [f"{home}/compute-sanitizer" for home in homes if home]
    return shutil.which(SANITIZER, path=os.pathsep.join(paths))
