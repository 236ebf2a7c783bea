"""The command `river` as a process, and the prompt that its tests give it."""

import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Question: Ana has 21 coins and buys 12 more at the fair. How many coins does Ana have?\nAnswer:"
SHORT = ["--max-new-tokens", "6"]


def subprocess_river(*arguments, environment=None, **options):
    """Runs the program itself; its outputs are bytes."""
    command = [sys.executable, "-m", "river_cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (environment or {})
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, env=environment, timeout=300, **streams)


def limited(megabytes: int):
    """For subprocess: an address space that is no larger."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
