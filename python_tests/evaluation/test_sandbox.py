"""Programs in the sandbox: what they may, and what is kept from them."""

import time
from pathlib import Path

import pytest

from river_ext.errors import RiverError
from river_ext.evaluation import sandbox
from river_ext.evaluation.sandbox import FAILED, PASSED, TIMED_OUT, run
from river_ext.evaluation.tasks import TASKS

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    "program, verdict",
    [
        ("x = 1\nassert x == 1", PASSED),
        ("import collections, hashlib, math, random, re, typing\nhashlib.md5(b'x').hexdigest()", PASSED),
        ("print('x' * 10**6)", PASSED),
        ("assert __name__ == '__main__'", PASSED),
        ("", PASSED),
        ("assert 1 == 2", FAILED),
        ("def f(:", FAILED),
        ("print('passed')\nraise ValueError", FAILED),
        ("raise SystemExit(0)", FAILED),
        ("import os\nos._exit(0)", FAILED),
        ("input()", FAILED),
        ("def f(): return f()\nf()", FAILED),
        ("x = bytearray(3 << 30)", FAILED),
        ("x = '\\0'\neval(x)", FAILED),
    ],
)
def test_verdicts(program, verdict):
    assert run(program) == verdict


@pytest.mark.parametrize(
    "program",
    [
        "open(PATH).read()",
        "open(PATH, 'w')",
        "open(PATH, 'a').write('x')",
        "open(PATH + '.new', 'x')",
        "import os\nos.remove(PATH)",
        "import os\nos.rename(PATH, PATH + '.new')",
        "import os\nos.mkdir(PATH + '.new')",
        "import os\nos.chmod(PATH, 0)",
        "import os\nos.listdir(os.path.dirname(PATH))",
        "import pathlib\npathlib.Path(PATH).unlink()",
        "import _io\n_io.FileIO(PATH, 'w')",
        "import posix\nposix.truncate(PATH, 0)",
        "import posix\nposix.open(PATH, posix.O_RDONLY)",
    ],
)
def test_files_are_out_of_reach(program, tmp_path):
    path = tmp_path / "file"
    path.write_text("kept")
    mode = path.stat().st_mode
    assert run(f"PATH = {str(path)!r}\n{program}") == FAILED
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert (path.read_text(), path.stat().st_mode) == ("kept", mode)


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['/bin/true'])",
        "import os\nos.system('true')",
        "import os\nos.execv('/bin/true', ['true'])",
        "import socket\nsocket.create_connection(('127.0.0.1', 9))",
        "import ctypes\nctypes.CDLL(None)",
        "import os\nos.kill(os.getppid(), 0)",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (9, 9))",
    ],
)
def test_other_processes_and_the_network_are_out_of_reach(program):
    assert run(program) == FAILED


def test_a_program_that_computes_for_ever_ends(monkeypatch):
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    assert run("while True: pass") == TIMED_OUT


def test_a_program_that_sleeps_ends(monkeypatch):
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 1)
    start = time.monotonic()
    assert run("import time\ntime.sleep(60)") == TIMED_OUT
    assert time.monotonic() - start < 30


def test_without_landlock_nothing_runs(monkeypatch, tmp_path):
    """A kernel that has none has no such system calls, as this one has none of such a number."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        sandbox.WORKER.read_text().replace(
            "CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444", "CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 4444"
        )
    )
    monkeypatch.setattr(sandbox, "WORKER", worker)
    with pytest.raises(RiverError, match="Landlock"):
        run("x = 1")


def test_the_published_solutions_pass():
    if not DATA.exists():
        pytest.skip("the published documents are not beside the checkout")
    from river_ext.evaluation.documents import read_documents

    fields = ("prompt", "entry_point", "test", "canonical_solution")
    documents = read_documents(DATA, "humaneval", "HumanEval", fields)
    items = TASKS["humaneval"].items(DATA, None, False)
    for document, item in list(zip(documents, items, strict=True))[::16]:
        assert item.is_right(document["canonical_solution"]), document["entry_point"]
        assert not item.is_right("    pass\n"), document["entry_point"]
