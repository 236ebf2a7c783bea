"""A Ray cluster on this machine for tests, and the processes that Ray starts."""

import atexit
import os
import signal
import time
from functools import cache
from pathlib import Path

import pytest

from river_ext import scale  # noqa: F401 (before Ray: it turns usage reports off)

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data,serve]'")


@cache
def start_cluster() -> None:
    """Once for all tests of this process. It has four cores, whatever the machine has: the model is small."""
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init("local", num_cpus=4, object_store_memory=100 << 20, **quiet)
    atexit.register(ray.shutdown)


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def descendants(named: str, of: int | None = None) -> list[int]:
    """Processes that a process has started, itself or through others, with a word in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line, process = (folder / "cmdline").read_bytes(), int(folder.name)
            while process > 1 and process != (of or os.getpid()):
                process = parent_of(process)
        except (OSError, ValueError):  # it has just ended
            continue
        if process > 1 and named.encode() in line:
            found.append(int(folder.name))
    return found


def kill_one(named: str) -> int:
    process = sorted(descendants(named))[0]
    os.kill(process, signal.SIGKILL)
    return process


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
