"""Runs the parts of the GPU suite, each in its own process and within its time; started by gpu_suite.sh.

Parts come shortest first, behind the build and the checks. Their output goes to the screen and to one log;
the measuring parts write a JSON file each, and this script suite_<device>.json: what passed, failed or was
not run, and why. What the time left does not allow is not run. Only the standard library: it runs before the
build.
"""

import argparse
import contextlib
import datetime
import glob
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
SECONDS = 530  # of the whole suite
SANITIZERS = ("memcheck", "racecheck", "initcheck")
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


@dataclass(frozen=True)
class Part:
    name: str
    expected: int  # seconds, roughly; nobody waits longer than `limit`
    limit: int
    does: str
    arguments: tuple[str, ...] = field(default=())


PARTS = [
    Part("build", 75, 200, "the extension in place, offline, for the present GPU alone"),
    Part("check", 30, 60, "static runtime, streams, ring, boundaries, exactness of W4 sums"),
    Part("chain", 20, 50, "cost of a boundary between dependent kernels in a graph"),
    Part("ring", 30, 60, "read-only bandwidth of the ring: stages, depths, copy engines"),
    Part("tests", 60, 120, "the GPU tests"),
    Part("steps", 70, 120, "whole steps against the budgets"),
    Part("kernels", 70, 120, "every kernel against torch, torch's int4 and Triton"),
    Part("sanitizer", 75, 150, "memcheck, racecheck and initcheck on small cases"),
    Part("peers", 90, 120, "torch in a graph, compiled transformers", ("--contexts=1024", "--seconds=85")),
]
NAMES = [part.name for part in PARTS]


@dataclass
class Outcome:
    status: str
    reason: str | None = None
    details: dict = field(default_factory=dict)


class Suite:
    def __init__(self, out: Path, device: str, capability: str, quick: bool, seconds: float):
        self.out, self.quick, self.end = out, quick, time.monotonic() + seconds
        slug = "_".join("".join(c if c.isalnum() else " " for c in device).lower().split())
        self.device, self.json = device, out / f"suite_{slug}.json"
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / f"suite_{slug}.log").open("w")
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1", "RIVER_REQUIRE_CUDA": "1", "RIVER_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or capability,
        }  # fmt: skip

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, command: list[str], limit: float) -> tuple[int | None, str]:
        """(exit status, output); status None: stopped at the limit, with all that it had started."""
        limit = min(limit, self.left())
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(max(limit, 0.1), stop)
        timer.start()
        lines = []
        try:
            for line in process.stdout:
                lines.append(line)
                self.say(line.rstrip("\n"))
            status = process.wait()
        finally:
            timer.cancel()
        return None if stopped.is_set() else status, "".join(lines)

    def part(self, part: Part) -> Outcome:
        if self.left() < 10:
            return Outcome(NOT_RUN, "no time left")
        special = {"build": self.build, "tests": self.tests, "sanitizer": self.sanitizer}
        if part.name in special:
            return special[part.name](part)
        command = [sys.executable, str(BENCH / f"{part.name}.py"), "--out", str(self.out), *part.arguments]
        return self.outcome(*self.run([*command, *(["--quick"] if self.quick else [])], part.limit))

    @staticmethod
    def outcome(status: int | None, output: str) -> Outcome:
        if status == 0:
            return Outcome(PASSED)
        last = (output.strip().splitlines() or ["no output"])[-1]
        return Outcome(
            FAILED, "stopped at its time limit" if status is None else f"exit {status}: {last[:300]}"
        )

    def build(self, part: Part) -> Outcome:
        return self.outcome(
            *self.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], part.limit)
        )

    def tests(self, part: Part) -> Outcome:
        if not importlib.util.find_spec("pytest"):
            return Outcome(NOT_RUN, "pytest is not installed")
        # test_gpu.py is the name of a file; emulated variants of the same tests need no GPU
        wanted = "(cuda or test_gpu) and not emulated"
        command = [sys.executable, "-m", "pytest", "python_tests", "-q", "-k", wanted]
        command += ["-p", "no:cacheprovider"]
        command += ["--ignore-glob=*test_emulat*", "--ignore-glob=*test_compile_gate*", "--durations=5"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", "6"]
        status, output = self.run(command, part.limit)
        found = self.outcome(status, output)
        found.details = {
            word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", output)
        }
        return found

    def sanitizer(self, part: Part) -> Outcome:
        tool = find_sanitizer()
        if not tool:
            return Outcome(NOT_RUN, "compute-sanitizer is not installed")
        found = {}
        end = time.monotonic() + part.limit
        for name in SANITIZERS:
            command = [tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "20"]
            command += [sys.executable, str(BENCH / "sanitizer_cases.py")]
            found[name] = read_sanitizer(*self.run(command, min(end - time.monotonic(), self.left())))
        states = {entry["status"] for entry in found.values()}
        status = FAILED if FAILED in states else NOT_RUN if NOT_RUN in states else PASSED
        reasons = [f"{name}: {entry['reason']}" for name, entry in found.items() if entry["reason"]]
        return Outcome(status, "; ".join(reasons) or None, found)

    def record(self, entries: dict[str, dict]) -> None:
        """Adds to what the file has: a part run alone leaves the others as they are."""
        old = json.loads(self.json.read_text())["parts"] if self.json.exists() else {}
        parts = {name: (old | entries)[name] for name in NAMES if name in old | entries}
        temporary = self.json.with_suffix(".tmp")
        temporary.write_text(json.dumps({"device": self.device, "parts": parts}, indent=1) + "\n")
        temporary.replace(self.json)


def find_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *sorted(glob.glob("/usr/local/cuda*"))]
    paths = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    paths += [f"{home}/compute-sanitizer" for home in homes if home]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(paths))


def read_sanitizer(status: int | None, output: str) -> dict:
    """Status and reason of one tool. It counts as run only if it watched all cases, or found something."""
    ran = "all cases ran" in output
    errors = [int(n) for n in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)]
    if status is None:
        return {"status": NOT_RUN, "reason": "stopped at its time limit", "errors": None}
    if errors and max(errors) > 0 and "not supported" not in output:
        return {"status": FAILED, "reason": f"{max(errors)} errors", "errors": max(errors)}
    if ran and status == 0:
        return {"status": PASSED, "reason": None, "errors": 0}
    said = [
        line.strip("= ") for line in output.splitlines() if line.startswith("=========")
    ] or output.splitlines()
    said = [line for line in said if line and not line.startswith(("COMPUTE-SANITIZER", "ERROR SUMMARY"))]
    refused = "not supported" in output or "nable to" in output
    return {
        "status": NOT_RUN if refused else FAILED, "errors": None,
        "reason": (said[0] if refused and said else (said or ["no output"])[-1])[:300],
    }  # fmt: skip


def ask(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
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
    p = argparse.ArgumentParser(prog="gpu_suite.sh", description=__doc__.splitlines()[0])
    p.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(NAMES)} (default: all)")
    p.add_argument(
        "--out", type=Path, default=BENCH / "results", help="folder of JSON and log (default: %(default)s)"
    )
    p.add_argument("--quick", action="store_true", help="fewer cases in the measuring parts")
    p.add_argument(
        "--seconds", type=float, default=SECONDS, help="for all parts together (default: %(default)s)"
    )
    p.add_argument("--list", action="store_true", help="name the parts and end")
    args = p.parse_args()
    if unknown := [name for name in args.parts if name not in NAMES]:
        p.error(f"no part {unknown[0]!r}; accepted: {', '.join(NAMES)}")
    return args


def main() -> int:
    args = arguments()
    if args.list:
        for part in PARTS:
            print(f"{part.name:<10} about {part.expected:>3} s, at most {part.limit:>3}  {part.does}")
        return 0
    facts = gpu_facts()
    if not facts:
        print("gpu_suite: no CUDA device: nvidia-smi names none here", file=sys.stderr)
        return 2
    suite = Suite(args.out.resolve(), facts["name"], facts["compute_cap"], args.quick, args.seconds)
    suite.say(f"{facts['name']}, driver {facts['driver_version']}, commit {commit()}")
    entries = {}
    for part in PARTS:
        if args.parts and part.name not in args.parts:
            continue
        suite.say(f"---- {part.name}: {part.does}")
        start = time.monotonic()
        outcome = suite.part(part)
        entries[part.name] = {
            "status": outcome.status, "reason": outcome.reason, "details": outcome.details,
            "seconds": round(time.monotonic() - start, 1), "quick": args.quick, "commit": commit(),
            "driver": facts["driver_version"],
            "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }  # fmt: skip
        suite.record(entries)  # after every part: a run that is cut off keeps what it has
        if part.name == "build" and outcome.status != PASSED:
            break
    suite.say("----")
    for name, entry in entries.items():
        suite.say(f"{name:<10} {entry['status']:<8} {entry['seconds']:6.1f} s  {entry['reason'] or ''}")
    return 1 if any(entry["status"] == FAILED for entry in entries.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
