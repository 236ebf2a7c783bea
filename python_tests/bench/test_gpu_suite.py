"""The flow of the GPU suite on a pretended GPU: the real driver, a fake nvidia-smi, parts that misbehave."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu import check, suite_parts, suite_summary
from bench.gpu import suite as gpu_suite
from bench.lib import record_tests, records

BENCH = Path(__file__).resolve().parents[2] / "bench"

DEVICE = "NVIDIA H100 80GB HBM3"
REAL = [
    "gpu_suite.sh", "gpu/suite.py", "gpu/suite_parts.py", "gpu/suite_summary.py", "lib/records.py",
    "lib/record_tests.py",
]  # fmt: skip
ILLEGAL = "CUDA error: an illegal memory access was encountered"
HEAD = """
import os, sys, time
from pathlib import Path
from bench.lib import records

def add(part, record, **fields):
    records.append(Path(os.environ["RIVER_RECORDS"]), part, record, **fields)

def step(us=900.0, variant="", depth=16, **more):
    add(Path(sys.argv[0]).stem, "step", model="1B", depth=depth, layers=16, context=1024, rows=1,
        variant=variant, floor_us=840.0, x_floor=us / 840, goal=1.08, best_public="none",
        device={"us": us, "spread_percent": 0.2}, kernels={"us": us - 4}, control_us=4.0, **more)
"""
FAKES = {
    "setup.py": "print('compiled')",
    "bench/gpu/warm.py": "print('torch is warm')",
    "bench/gpu/check.py": "name = sys.argv[1]; "
    "add('check', 'check', check=name, text=f'{name} as it should be')",
    "bench/gpu/chain.py": "add('chain', 'ceiling', gb_s=3012.4)",
    "bench/gpu/steps.py": "step(); step(985.0, 'late_trigger=0', beside_us=901.0); "
    "step(899.0, 'early_attention=0', beside_us=900.0)",
    "bench/gpu/kernels.py": "add('kernels', 'kernel', kernel='linear', shape='8B o', rows=1, variant='', "
    "x_torch=1.2, percent_of_ceiling=93.0)",
    "bench/gpu/sanitizer_cases.py": "print('all cases ran')",
    "bench/gpu/ring.py": "", "bench/gpu/peers.py": "",
    "python_tests/cuda/test_gpu.py": "def test_a(): pass\ndef test_b(): pass\n",
} | {
    f"python_tests/cuda/{file}": "import pytest\n@pytest.mark.parametrize('kernels', ['emulated', 'cuda'])\n"
    "def test_c(kernels): assert kernels == 'cuda'\n"
    for file in suite_parts.TESTS["kernels"]
}  # fmt: skip


class Checkout:
    """A copy of the driver around parts of a test's own."""

    def __init__(self, root: Path, **changes: str):
        self.root, self.out = root / "checkout", root / "out"
        fakes = FAKES | {name.replace("__", "/") + ".py": text for name, text in changes.items()}
        for name, text in fakes.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            head = "" if "python_tests" in name else HEAD
            path.write_text(head + text + "\n")
        for name in REAL:
            path = self.root / "bench" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(BENCH / name, path)
        tools = self.root / "bin"
        tools.mkdir()
        for name, text in (
            ("nvidia-smi", f"echo '{DEVICE}, 9.0, 580.159.04'"),
            (
                "compute-sanitizer",
                'while [ "$1" != "'
                + sys.executable
                + '" ]; do shift; done; "$@"; echo "========= ERROR SUMMARY: 0 errors"',
            ),
        ):
            (tools / name).write_text(f"#!/bin/sh\n{text}\n")
            (tools / name).chmod(0o755)

    def __call__(self, *arguments: str, **environment: str):
        variables = {
            "PYTHON": sys.executable, "PATH": f"{self.root / 'bin'}:/usr/bin:/bin", "OUT": str(self.out),
            "RIVER_COMMIT": "abc1234",
        }  # fmt: skip
        command = ["bash", str(self.root / "bench" / "gpu_suite.sh"), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, env=variables | environment, timeout=120
        )

    def lines(self, record: str = "", **wanted) -> list[dict]:
        found = [line for path in self.out.glob("*.jsonl") for line in records.read(path)]
        return [
            line for line in found
            if record in ("", line["record"]) and all(line[key] == value for key, value in wanted.items())
        ]  # fmt: skip

    def status(self) -> dict[str, str]:
        return {f"{line['part']} {line['run']}": line["status"] for line in self.lines("run")}


def summary_of(done) -> list[str]:
    text = done.stdout[done.stdout.index("==== summary") :]
    assert len(text) < 8000
    return text.splitlines()


# ---- the whole of it --------------------------------------------------------------------------------


def test_the_first_command(tmp_path):
    """Everything passes: two files come back, and the last lines say in order what is to be read first."""
    checkout = Checkout(tmp_path)
    done = checkout("first")
    assert done.returncode == 0, done.stdout + done.stderr
    slug = "gpu_nvidia_h100_80gb_hbm3"
    assert sorted(path.name for path in checkout.out.iterdir()) == [f"{slug}.jsonl", f"{slug}.log"]
    assert (checkout.out / f"{slug}.log").read_text() == done.stdout
    lines = summary_of(done)
    assert lines[1].startswith("late_trigger=0: +9.3 % time of a 1B step at depth 16 (985 us, default 901")
    assert lines[2].startswith("early_attention=0: -0.1 %")
    order = [line.split(":")[0] for line in lines[3:9]]
    assert order == ["ring", "edges", "runtime", "stream", "magic", "tests"]
    assert (
        lines[4] == "edges: ok: edges as it should be" and lines[8] == "tests: 6 passed, 0 failed, 0 skipped"
    )
    parts = [line.split()[0] for line in lines[10:15]]
    assert parts == list(suite_parts.GROUPS["first"].parts)
    assert any("| 1B, exit depth 16 of 16 | 840 | 900 | 1.071 | 1.08 met |" in line for line in lines)
    assert lines.index("failures: none") > max(i for i, line in enumerate(lines) if line.startswith("|"))
    start = checkout.lines("start")[0]
    assert (start["name"], start["commit"], start["names"]) == (DEVICE, "abc1234", ["first"])
    assert {line["test"] for line in checkout.lines("test")} == {
        "cuda/test_gpu.py::test_a", "cuda/test_gpu.py::test_b",
        *(f"cuda/{file}::test_c[cuda]" for file in suite_parts.TESTS["kernels"]),
    }  # fmt: skip


def test_all_groups_write_no_more_than_eight_files(tmp_path):
    checkout = Checkout(tmp_path)
    done = checkout()
    assert done.returncode == 0 and set(checkout.status().values()) == {"passed"}
    parts = suite_parts.PARTS.items()
    assert set(checkout.status()) == {f"{name} {run}" for name, part in parts for run in part.runs}
    assert len(list(checkout.out.rglob("*"))) <= 8


def test_a_part_that_is_killed_keeps_its_lines(tmp_path):
    """Of a suite whose time runs out: what is left is not run, and the tables are made of what there is."""
    hangs = "step(); step(700.0, depth=3)\nprint('still at it', flush=True)\ntime.sleep(100)"
    checkout = Checkout(tmp_path, bench__gpu__steps=hangs)
    start = time.monotonic()
    done = checkout("second", "--seconds", "8")
    assert time.monotonic() - start < 12 and done.returncode == 1
    assert len(checkout.lines("step")) == 2
    assert checkout.status() == {
        "build extension": "passed", "build torch": "passed", "steps steps": "failed",
        "kernels kernels": "not run", "memcheck memcheck": "not run",
    }  # fmt: skip
    lines = summary_of(done)
    assert any("| 1B, exit depth 3 of 16 |" in line and "MISSED" not in line for line in lines)
    assert any(line.startswith("kernels    not run") and "no time left" in line for line in lines)
    assert lines[-1].startswith("steps steps: failed: stopped after ") and "failures: 1" in lines


def test_the_suite_itself_may_be_killed(tmp_path):
    checkout = Checkout(tmp_path, bench__gpu__steps="step()\nprint('measured', flush=True)\ntime.sleep(100)")
    command = ["bash", str(checkout.root / "bench" / "gpu_suite.sh"), "second"]
    environment = {
        "PYTHON": sys.executable,
        "PATH": f"{checkout.root / 'bin'}:/usr/bin:/bin",
        "OUT": str(checkout.out),
    }
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while process.stdout.readline() != "measured\n":
            pass
        process.kill()
    assert len(checkout.lines("step")) == 1 and checkout.status()["build extension"] == "passed"


def test_a_build_that_fails_ends_the_run(tmp_path):
    checkout = Checkout(tmp_path, setup="sys.exit('river_ext: x.cu did not compile')")
    done = checkout("first")
    assert done.returncode == 1
    assert checkout.status() == {"build extension": "failed", "build torch": "passed"}
    assert summary_of(done)[-1] == "build extension: failed: exit 1: river_ext: x.cu did not compile"


def test_an_illegal_access_in_a_check_leaves_the_others_alone(tmp_path):
    bad = f"name == 'stream' and sys.exit('{ILLEGAL}')"
    checkout = Checkout(
        tmp_path, bench__gpu__check=f"name = sys.argv[1]; {bad}; add('check', 'check', check=name, text='')"
    )
    done = checkout("check", "chain")
    states = checkout.status()
    assert states.pop("check stream") == "failed" and set(states.values()) == {"passed"} and len(states) == 5
    assert f"stream: FAILED: exit 1: {ILLEGAL}" in summary_of(done)


POISON = f"""
import os
import pytest
lost = []

@pytest.mark.parametrize("number", range(12))
def test_it(number):
    if number == 2 or lost:
        lost.append(number)
        raise RuntimeError("{ILLEGAL}")
"""


def test_an_illegal_access_in_a_test_file_leaves_the_other_alone(tmp_path):
    checkout = Checkout(tmp_path, python_tests__cuda__test_gpu=POISON)
    done = checkout("tests")
    assert checkout.status() == {"tests engine": "failed", "tests kernels": "passed"}
    tests = {line["test"]: line["outcome"] for line in checkout.lines("test", outcome="passed")}
    assert "cuda/test_cuda_kernels.py::test_c[cuda]" in tests
    assert any(
        line.startswith("cuda/test_gpu.py::test_it[2]: ") and ILLEGAL in line for line in summary_of(done)
    )


@pytest.mark.skipif(not importlib.util.find_spec("xdist"), reason="needs pytest-xdist, which GPU hosts have")
def test_with_workers_only_the_test_itself_is_lost(tmp_path):
    checkout = Checkout(tmp_path, python_tests__cuda__test_gpu=POISON)
    done = checkout("tests")
    passed = {line["test"] for line in checkout.lines("test", outcome="passed")}
    assert {f"cuda/test_gpu.py::test_it[{n}]" for n in range(12) if n != 2} <= passed
    failures = [line for line in summary_of(done) if line.startswith("cuda/test_gpu.py")]
    assert len(failures) == 1 and ILLEGAL in failures[0]


def test_what_is_printed_last_is_short(tmp_path):
    """However much parts print, and however much fails."""
    noise = "for i in range(3000): print('x' * 200)\n"
    many = "\n".join(f"def test_{i}(): raise RuntimeError('{i} {'y' * 400}')" for i in range(120))
    steps = noise + "\n".join(f"step(depth={depth})" for depth in range(60))
    checkout = Checkout(
        tmp_path,
        bench__gpu__steps=steps,
        python_tests__cuda__test_gpu=many,
        bench__gpu__chain=noise + "sys.exit(1)",
    )
    done = checkout("first")
    lines = summary_of(done)
    assert len(done.stdout) > 1_000_000 and lines[0] == "==== summary"
    assert any("more lines in the log" in line for line in lines)
    assert "failures: 122" in lines and lines[-2].startswith("cuda/test_gpu.py::test_")
    assert sum(line.startswith("cuda/test_gpu.py::test_") for line in lines) > 5


def test_the_build_and_the_first_import_of_torch_run_at_the_same_time(tmp_path):
    """Each waits for the other to have begun."""
    meet = "Path({0!r}).touch()\nwhile not Path({1!r}).exists(): time.sleep(0.01)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    checkout = Checkout(tmp_path, setup=meet.format(a, b), bench__gpu__warm=meet.format(b, a))
    assert checkout("build", "--seconds", "20").returncode == 0


def test_a_second_run_adds_to_the_file_and_sums_up_itself_alone(tmp_path):
    checkout = Checkout(tmp_path)
    checkout("quick")
    done = checkout("kernels")
    assert [line["names"] for line in checkout.lines("start")] == [["quick"], ["kernels"]]
    assert not any("late_trigger" in line for line in summary_of(done))
    assert any(
        "linear" in line and "93 to 93 % of the ring, 1.20 to 1.20 x torch" in line
        for line in summary_of(done)
    )


# ---- its parts --------------------------------------------------------------------------------------


def suite_script(*arguments):
    command = ["bash", str(BENCH / "gpu_suite.sh"), *arguments]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_list_help_and_unknown_names():
    assert subprocess.run(["bash", "-n", str(BENCH / "gpu_suite.sh")]).returncode == 0
    listed = suite_script("--list")
    assert listed.returncode == 0
    words = [line.split()[0] for line in listed.stdout.splitlines()]
    assert words == [*suite_parts.GROUPS, *suite_parts.PARTS]
    unknown = suite_script("benchmarks")
    assert unknown.returncode == 2 and "no part 'benchmarks'; accepted: first, second" in unknown.stderr


def test_groups_name_real_parts_and_fit_their_commands():
    named = [name for group in suite_parts.GROUPS.values() for name in group.parts]
    assert set(named) == set(suite_parts.PARTS)
    assert all(group.parts[0] == "build" for group in suite_parts.GROUPS.values())
    seconds = {name: group.seconds for name, group in suite_parts.GROUPS.items()}
    assert seconds["first"] <= 280 and seconds["second"] <= 240
    assert suite_parts.GROUPS["second"].parts[-1] == "memcheck"  # the first sanitizer, after all else
    assert suite_parts.GROUPS["third"].parts[-2:] == ("racecheck", "initcheck")
    files = {BENCH.parent / f"{word.replace('.', '/')}.py"
             for part in suite_parts.PARTS.values() for run in part.runs.values() for word in run
             if word.startswith("bench.")}  # fmt: skip
    assert len(files) > 5 and all(path.exists() for path in files)
    root = BENCH.parent
    assert all(
        (root / "python_tests" / "cuda" / name).exists()
        for files in suite_parts.TESTS.values()
        for name in files
    )
    assert suite_parts.CHECKS[0] == "edges" and all(
        hasattr(check, f"check_{name}") for name in suite_parts.CHECKS
    )


def test_chosen_parts_keep_their_order_and_come_once():
    parts, seconds = gpu_suite.chosen(["check", "second", "check"])
    assert [part.name for part in parts] == ["check", *suite_parts.GROUPS["second"].parts]
    assert seconds > suite_parts.GROUPS["second"].seconds
    assert gpu_suite.chosen([])[1] == sum(group.seconds for group in suite_parts.GROUPS.values())


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "ask", lambda command: None)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.sh"])
    assert gpu_suite.main() == 2
    assert capsys.readouterr().err == "gpu_suite: no CUDA device: nvidia-smi names none here\n"


def test_results_go_where_they_come_back_from(monkeypatch):
    monkeypatch.setenv("OUT", "/somewhere")
    assert records.folder() == Path("/somewhere")
    monkeypatch.delenv("OUT")
    assert records.folder() == BENCH / "results"
    assert records.path_of(Path("x"), DEVICE) == Path("x/gpu_nvidia_h100_80gb_hbm3.jsonl")


def test_records(tmp_path):
    path = tmp_path / "new" / "gpu.jsonl"
    records.append(path, "ring", "ceiling", gb_s=float("nan"), all=[1.0, float("inf")], text="ä\n")
    start = path.stat().st_size
    records.append(path, "ring", "copy", gb_s=2900.5)
    with path.open("a") as file:
        file.write('{"part": "ring", "rec')  # a kill in the middle of a line
    first, second = records.read(path)
    assert first == {"part": "ring", "record": "ceiling", "gb_s": None, "all": [1.0, None], "text": "ä\n"}
    assert records.read(path, start) == [second] and records.read(tmp_path / "none") == []
    json.dumps(first, allow_nan=False)


def test_a_lost_process_is_left_by_workers_only(monkeypatch):
    """The plugin's hooks, as pytest calls them."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)

    class Item:
        def __init__(self, **config):
            self.stash, self.config = {}, type("Config", (), config)()

    def report(failed, text):
        return type("Report", (), {"failed": failed, "longreprtext": text})()

    def run(item, result):
        making = record_tests.pytest_runtest_makereport(item, None)
        running = record_tests.pytest_runtest_protocol(item)
        next(running)
        next(making)
        for hook, value in ((making, result), (running, True)):
            with pytest.raises(StopIteration):
                hook.send(value)

    run(Item(workerinput={}), report(True, "assert 1 == 2"))
    run(Item(workerinput={}), report(False, ILLEGAL))
    run(Item(), report(True, ILLEGAL))
    assert ended == []
    run(Item(workerinput={}), report(True, f"RuntimeError: {ILLEGAL}"))
    assert ended == [1]


SUMMARY = "========= ERROR SUMMARY: "
RACES = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"
REFUSED = f"========= COMPUTE-SANITIZER\n========= Error: Device not supported\n{SUMMARY}1 error"
MISSING = "ModuleNotFoundError: No module named 'torch'"


@pytest.mark.parametrize(
    "status, output, expected, reason",
    [
        (0, f"all cases ran\n{SUMMARY}0 errors", "passed", ""),
        (9, f"========= Invalid __global__ write\n{SUMMARY}3 errors", "failed", "3 errors"),
        (9, f"all cases ran\n{RACES}", "failed", "2 errors"),
        (1, REFUSED, "not run", "Error: Device not supported"),
        (None, "similarity", "not run", "stopped after 30 s"),
        (1, MISSING, "failed", MISSING),
        (0, f"{SUMMARY}0 errors", "failed", "no output"),
    ],
)
def test_sanitizer_outcomes(status, output, expected, reason):
    assert gpu_suite.read_sanitizer(status, output, 30.0) == (expected, reason)


def test_a_missing_tool_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(suite_parts, "find_sanitizer", lambda: None)
    suite = gpu_suite.Suite(tmp_path, {"name": DEVICE, "compute_cap": "9.0"}, seconds=60)
    assert not suite.part(suite_parts.PARTS["memcheck"])
    (run,) = suite.lines()
    assert (run["status"], run["reason"]) == ("not run", "compute-sanitizer is not installed")


def test_an_unfinished_summary():
    """Whatever is missing: no variants, no checks, a step alone."""
    assert suite_summary.summary([]).endswith("failures: none\n")
    assert "trigger" not in suite_summary.summary([])
