"""Runs the parts of the GPU suite, each in processes of its own and within its time; started by gpu_suite.sh.

    gpu_suite.sh first     build, checks, tests, quick measurements
    gpu_suite.sh second    steps and kernels, every variant against the other, memcheck
    gpu_suite.sh third     the 8B model, the ring, peers, the other sanitizers

Each is one command on a lent machine. The output goes to the screen and to gpu_<device>.log, results as they
come to gpu_<device>.jsonl, and a summary to the end of both. What the time left does not allow is not run.
Only the standard library: it runs before the build.
"""

import argparse
import contextlib
import datetime
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.gpu.suite_parts import GROUPS, PARTS, ROOT, SANITIZER, Part, command, missing
from bench.gpu.suite_summary import summary
from bench.lib import records

LEAST = 5.0  # seconds left with which a run is begun
RESERVE = 2.0  # seconds for the summary
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


class Suite:
    def __init__(self, out: Path, facts: dict, seconds: float):
        out.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + seconds - RESERVE
        self.records = records.path_of(out, facts["name"])
        self.start = self.records.stat().st_size if self.records.exists() else 0
        self.log = self.records.with_suffix(".log").open("a")
        paths = [str(ROOT), os.environ.get("PYTHONPATH")]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1",
            "RIVER_RECORDS": str(self.records), "RIVER_REQUIRE_CUDA": "1", "RIVER_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or facts["compute_cap"],
        }  # fmt: skip

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def left(self) -> float:
        return self.end - time.monotonic()

    def lines(self) -> list[dict]:
        """What this suite's parts have recorded so far."""
        return records.read(self.records, self.start)

    def run(self, words: list[str], limit: float) -> tuple[int | None, str]:
        """(exit status, output); status None: stopped at the limit. Nothing that it started outlives it."""
        process = subprocess.Popen(
            words, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        output = []

        def read() -> None:
            for line in process.stdout:
                output.append(line)
                self.say(line.rstrip("\n"))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of them have ended
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(2.0)  # a process that left the group may hold the pipe for longer
        return status, "".join(output)

    def part(self, part: Part) -> bool:
        """Whether all its runs passed."""
        self.say(f"---- {part.name}: {part.does}")
        with ThreadPoolExecutor(len(part.runs) if part.at_once else 1) as pool:
            return all(list(pool.map(lambda name: self.recorded(part, name), part.runs)))

    def recorded(self, part: Part, name: str) -> bool:
        start, limit = time.monotonic(), min(part.limit, self.left())
        if reason := missing(part) or ("" if limit >= LEAST else "no time left"):
            status = NOT_RUN
        else:
            read = read_sanitizer if part.tool == SANITIZER else outcome
            status, reason = read(*self.run(command(part, name), limit), limit)
        records.append(
            self.records, part.name, "run", run=name, status=status, reason=reason,
            seconds=round(time.monotonic() - start, 1), at=now(),
        )  # fmt: skip
        return status == PASSED


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def outcome(status: int | None, output: str, limit: float) -> tuple[str, str]:
    """Status and reason of a run."""
    if status == 0:
        return PASSED, ""
    last = (output.strip().splitlines() or ["no output"])[-1]
    return FAILED, f"stopped after {limit:.0f} s" if status is None else f"exit {status}: {last[:300]}"


def read_sanitizer(status: int | None, output: str, limit: float) -> tuple[str, str]:
    """The same of a sanitizer. It counts as run only if it watched all cases, or found something."""
    errors = [int(n) for n in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)]
    if status is None:
        return NOT_RUN, f"stopped after {limit:.0f} s"
    if errors and max(errors) > 0 and "not supported" not in output:
        return FAILED, f"{max(errors)} errors"
    if "all cases ran" in output and status == 0:
        return PASSED, ""
    said = [line.strip("= ") for line in output.splitlines() if line.startswith("=========")]
    said = [
        line
        for line in said or output.splitlines()
        if line and not line.startswith(("COMPUTE-SANITIZER", "ERROR SUMMARY"))
    ] or ["no output"]
    refused = "not supported" in output or "nable to" in output
    return NOT_RUN if refused else FAILED, said[0 if refused else -1][:300]


def ask(words: list[str]) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
        return done.stdout.strip() or None if done.returncode == 0 else None
    except (OSError, subprocess.SubprocessError):
        return None


def gpu_facts() -> dict | None:
    """Of the first GPU; None: there is none."""
    fields = ["name", "compute_cap", "driver_version"]
    answer = ask(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"])
    values = [value.strip() for value in (answer or "").partition("\n")[0].split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


def commit() -> str | None:
    return os.environ.get("RIVER_COMMIT") or ask(["git", "-C", str(ROOT), "describe", "--always", "--dirty"])


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="gpu_suite.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("names", nargs="*", metavar="NAME", help="groups or parts (default: all groups)")
    p.add_argument("--out", type=Path, default=records.folder(),
                   help="folder of results and log (default: $OUT, or %(default)s)")  # fmt: skip
    p.add_argument("--seconds", type=float, help="for all of it (default: the groups' own)")
    p.add_argument("--list", action="store_true", help="name groups and parts, and end")
    args = p.parse_args()
    if unknown := [name for name in args.names if name not in [*GROUPS, *PARTS]]:
        p.error(f"no part {unknown[0]!r}; accepted: {', '.join([*GROUPS, *PARTS])}")
    return args


def chosen(names: list[str]) -> tuple[list[Part], float]:
    """Parts in order, each once, and the seconds for all of them."""
    names = names or list(GROUPS)
    parts = [part for name in names for part in (GROUPS[name].parts if name in GROUPS else (name,))]
    alone = [PARTS[name] for name in names if name in PARTS]
    seconds = sum(GROUPS[name].seconds for name in names if name in GROUPS)
    seconds += sum(part.limit * (1 if part.at_once else len(part.runs)) for part in alone)
    return [PARTS[name] for name in dict.fromkeys(parts)], seconds


def main() -> int:
    args = arguments()
    if args.list:
        for name, group in GROUPS.items():
            print(f"{name:<10} {group.seconds:>3} s at most: {', '.join(group.parts)}")
        for part in PARTS.values():
            print(f"{part.name:<10} {part.limit:>3} s at most, each of {len(part.runs)}: {part.does}")
        return 0
    facts = gpu_facts()
    if not facts:
        print("gpu_suite: no CUDA device: nvidia-smi names none here", file=sys.stderr)
        return 2
    parts, seconds = chosen(args.names)
    suite = Suite(args.out.resolve(), facts, args.seconds or seconds)
    suite.say(f"{facts['name']}, driver {facts['driver_version']}, commit {commit()}")
    suite.environment["RIVER_COMMIT"] = commit() or ""
    records.append(suite.records, "suite", "start", **facts, commit=commit(), names=args.names, at=now())
    for part in parts:
        passed = suite.part(part)
        if part.name == "build" and not passed:
            break  # nothing else can run
    suite.say(summary(suite.lines()))
    return 1 if any(line.get("status") == FAILED for line in suite.lines()) else 0


if __name__ == "__main__":
    sys.exit(main())
