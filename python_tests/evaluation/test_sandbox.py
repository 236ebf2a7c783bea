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
        ("import numpy\nassert numpy.ones(3).sum() == 3", PASSED),
        ("input()", FAILED),
        ("def f(): return f()\nf()", FAILED),
        ("x = bytearray(3 << 30)", FAILED),
        ("x = '\\0'\neval(x)", FAILED),
    ],
)
def test_verdicts(program, verdict):
    assert run(program) == verdict


@pytest.mark.parametrize("end", ["raise ValueError", "os._exit(0)"])
def test_a_program_cannot_just_write_that_it_passed(end):
    writes = "import os\nfor file in range(10):\n  try: os.write(file, b'passed')\n  except OSError: pass\n"
    assert run(writes + end) == FAILED


def test_what_a_program_writes_to_the_verdict_has_a_limit():
    """Else all of it would be in this process's memory. The rewound file takes the verdict that follows."""
    program = """
import os
limited = False
for file in range(3, 10):
    try:
        for _ in range(9):
            os.write(file, bytes(1 << 16))
    except OSError as error:
        if error.errno == 27:  # EFBIG
            limited = True
            os.lseek(file, 0, os.SEEK_SET)
assert limited
"""
    assert run(program) == PASSED


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


def test_the_kernel_keeps_processes_and_sockets_from_a_program(monkeypatch, tmp_path):
    """Without the hook, which there are ways around."""
    worker = tmp_path / "worker.py"
    source = sandbox.WORKER.read_text()
    assert source.count("    sys.addaudithook(refuse)\n") == 1
    worker.write_text(source.replace("    sys.addaudithook(refuse)\n", ""))
    monkeypatch.setattr(sandbox, "WORKER", worker)
    assert run("import os\nos.getppid()") == PASSED
    for call in ("os.fork()", "os.forkpty()", "os.posix_spawn('/bin/true', ['true'], {})",
                 "threading.Thread(target=int).start()", "socket.socket()", "socket.socketpair()",
                 "socket.socket(type=socket.SOCK_DGRAM)"):  # fmt: skip
        program = f"import os, socket, threading\ntry:\n    {call}\nexcept (OSError, RuntimeError): pass\n"
        assert run(f"{program}else: raise ValueError") == PASSED, call


def test_what_else_python_imports_from_is_out_of_reach(monkeypatch, tmp_path):
    """Such as a checkout that a .pth file names."""
    (tmp_path / "file").write_text("kept")
    worker = tmp_path / "worker.py"
    worker.write_text(
        sandbox.WORKER.read_text().replace(
            "import sys\n", f"import sys\nsys.path.append({str(tmp_path)!r})\n", 1
        )
    )
    monkeypatch.setattr(sandbox, "WORKER", worker)
    assert run(f"import sys\nassert {str(tmp_path)!r} in sys.path") == PASSED
    assert run(f"open({str(tmp_path / 'file')!r})") == FAILED


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
