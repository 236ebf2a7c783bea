"""Runs a program that a model wrote, in a process of its own, with little time and memory and without files.

The limits are the kernel's: processor time and memory by resource limits, files and the network by Landlock,
which grants reading Python's own files and nothing else. Programs that start others, which neither bounds for
the user root, are refused by a hook in sandbox_worker.py: it holds what a model writes by mistake.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from ..errors import RiverError

WORKER = Path(__file__).with_name("sandbox_worker.py")
PASSED = "passed"
FAILED = "failed"  # it raised, wanted what it may not, or ended before its end
TIMED_OUT = "timed out"
CPU_SECONDS = 3  # the limit that the harness has on the clock
WALL_SECONDS = 20  # for programs that sleep; generous, as the machine may be busy
MEMORY = 1 << 30  # bytes of address space
NO_LANDLOCK = 3  # the worker's exit code


def run(program: str) -> str:
    """PASSED where the program runs to its end, else FAILED or TIMED_OUT.

    Where the kernel cannot keep it from files (Linux before 5.13, or without Landlock) nothing runs.
    """
    settings = {"cpu_seconds": CPU_SECONDS, "memory": MEMORY, "program": program}
    worker = subprocess.Popen(
        [sys.executable, "-I", str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={},
        start_new_session=True,
    )
    try:
        said, _ = worker.communicate(json.dumps(settings).encode(), timeout=WALL_SECONDS)
    except subprocess.TimeoutExpired:
        return TIMED_OUT
    finally:
        with suppress(ProcessLookupError):  # whatever it started ends with it
            os.killpg(worker.pid, signal.SIGKILL)
        worker.communicate()
    if worker.returncode == NO_LANDLOCK:
        raise RiverError("programs need a kernel with Landlock (Linux 5.13 or later), and this one has none")
    if worker.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return TIMED_OUT
    return PASSED if said == PASSED.encode() else FAILED
