"""Tries the inputs of an area in processes of their own, and outlives what those do.

A worker prints a line before and after each input; the runner reads the lines and kills a worker that is
silent for too long. Behind an input that ended a worker, the next worker goes on.
"""

import importlib
import os
import random
import selectors
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from . import ACCEPTED, REFUSED, Finding

TESTS = Path(__file__).resolve().parent.parent
PREPARE_SECONDS = 120
MOST_FINDINGS = 20  # after so many, an area ends


@dataclass
class Report:
    refused: int = 0
    accepted: int = 0
    findings: list[tuple[int, str]] = field(default_factory=list)  # number of the input, what happened


def run(area: str, seed: int, first: int, count: int, seconds: float = 20) -> Report:
    """Inputs first .. first + count - 1 of an area."""
    report, number = Report(), first
    while number < first + count and len(report.findings) < MOST_FINDINGS:
        number = _run_worker(area, seed, number, first + count, seconds, report)
    return report


def _run_worker(area: str, seed: int, first: int, end: int, seconds: float, report: Report) -> int:
    """One worker's life; returns the first number that it did not try."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-m", "fuzz.runner", area, str(seed), str(first), str(end), folder]
        worker = subprocess.Popen(command, cwd=TESTS, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=errors, start_new_session=True)  # fmt: skip
        trying, done, buffer = None, first, b""
        with selectors.DefaultSelector() as selector, worker.stdout:
            selector.register(worker.stdout, selectors.EVENT_READ)
            while selector.select(PREPARE_SECONDS if trying is None else seconds):
                if not (data := os.read(worker.stdout.fileno(), 65536)):
                    break
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    trying, done = _read(line.decode(), trying, done, report)
            else:
                os.killpg(worker.pid, 9)
        status = worker.wait()
        if status == 0:
            return done
        errors.seek(0)
        said = (errors.read().decode(errors="replace").strip().splitlines() or ["nothing"])[-1]
        if trying is None:
            raise RuntimeError(f"the worker of {area} ended with {status} before its first input: {said}")
        what = f"no end after {seconds} s" if status == -9 else f"the process ended with {status}: {said}"
        report.findings.append((trying, what))
        return trying + 1


def _read(line: str, trying: int | None, done: int, report: Report) -> tuple[int | None, int]:
    """Takes a worker's line: `try N` or `done N OUTCOME`."""
    word, number, *rest = line.split(" ", 2)
    if word == "try":
        return int(number), done
    outcome = rest[0]
    if outcome == REFUSED:
        report.refused += 1
    elif outcome == ACCEPTED:
        report.accepted += 1
    else:
        report.findings.append((int(number), outcome))
    return trying, int(number) + 1


def work(area: str, seed: int, first: int, end: int, folder: Path) -> None:
    """The worker."""
    import torch

    torch.set_num_threads(1)
    lines = os.fdopen(os.dup(1), "w", buffering=1)  # inputs may print, and close what they print to
    os.dup2(2, 1)
    module = importlib.import_module(f"fuzz.{area}")
    state = module.prepare(folder)
    for number in range(first, end):
        lines.write(f"try {number}\n")
        try:
            outcome = module.attempt(state, random.Random(f"{area}/{seed}/{number}"))
        except Finding as finding:
            outcome = str(finding)
        except BaseException as error:  # a panic of a library in Rust is one, and so is an exit
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"
        lines.write(f"done {number} {' '.join(outcome.split())[:500] or 'no words'}\n")


if __name__ == "__main__":
    work(sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5]))
