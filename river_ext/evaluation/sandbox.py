"""Runs a program that a model wrote, in a process of its own, with little time and memory and without files.

The limits are the kernel's: processor time and memory by resource limits, files by Landlock, which grants
reading Python's own files and nothing else, processes and sockets by a seccomp filter. What none of them
bounds, such as the mode of files, is refused by a hook in sandbox_worker.py: it holds what a model writes by
mistake. No more can be said of verdicts: a program that searches the interpreter for its secret finds it.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from ..errors import RiverError

WORKER = Path(__file__).with_name("sandbox_worker.py")
PASSED = "passed"
FAILED = "failed"  # it raised, wanted what it may not, or ended before its end
TIMED_OUT = "timed out"
CPU_SECONDS = 3  # the limit that the harness has on the clock
WALL_SECONDS = 20  # for programs that sleep; generous, as the machine may be busy
MEMORY = 1 << 30  # bytes of address space
NO_SANDBOX = 3  # the worker's exit code


def run(program: str) -> str:
    """PASSED where the program runs to its end, else FAILED or TIMED_OUT.

    Where the kernel cannot keep it from files (Linux before 5.13, or without Landlock) nothing runs.
    """
    secret = secrets.token_hex()  # what the worker answers for a pass: the program cannot just write it
    settings = {"cpu_seconds": CPU_SECONDS, "memory": MEMORY, "program": program, "secret": secret}
    with TemporaryFile() as answer:  # a file has an end, whoever may still have it open
        code = _ended(json.dumps(settings).encode(), answer)
        answer.seek(0)
        passed = code == 0 and answer.read() == secret.encode()
    if code == NO_SANDBOX:
        raise RiverError(
            "programs need a kernel with Landlock (Linux 5.13 or later) and seccomp, and this one lacks one"
        )
    if code in (None, -signal.SIGXCPU, -signal.SIGKILL):
        return TIMED_OUT
    return PASSED if passed else FAILED


def _ended(settings: bytes, answer: BinaryIO) -> int | None:
    """The worker's exit code; None if it had to be ended."""
    worker = subprocess.Popen(
        [sys.executable, "-I", str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=answer,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={"OMP_NUM_THREADS": "1"},  # for numpy, which may start no threads
        start_new_session=True,
    )
    try:
        worker.communicate(settings, timeout=WALL_SECONDS)
        return worker.returncode
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):  # whatever it started ends with it
            os.killpg(worker.pid, signal.SIGKILL)
        worker.communicate()
