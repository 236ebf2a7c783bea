"""The CPU benchmarks as far as nothing is measured: arguments, refusals, and results that stay."""

import subprocess
import sys

import pytest

from bench.cpu import attention, decode, linear, peers, prefill
from bench.lib import common

# the first thing that takes long
WORK = dict.fromkeys([attention, linear, peers, prefill], "measure") | {decode: "random_weights"}


class Started(Exception):
    pass


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Runs a benchmark up to its work."""

    def run(script, *arguments):
        def work(*arguments, **options):
            raise Started

        monkeypatch.setattr(script, WORK[script], work)
        monkeypatch.setattr(common, "reader", lambda: None)
        for module in (attention, linear):
            monkeypatch.setattr(module, "reader", lambda: None)
        monkeypatch.setattr(
            sys, "argv", [script.__name__, "--threads", "1", "--out", str(tmp_path), *arguments]
        )
        script.main()

    return run


@pytest.mark.parametrize("script", WORK, ids=lambda script: script.__name__)
def test_results_are_replaced_only_when_asked_to(script, start, tmp_path, capsys):
    with pytest.raises(Started):
        start(script)
    args = common.parser("").parse_args(["--threads", "1", "--out", str(tmp_path)])
    name = script.__name__.rpartition(".")[2]
    path = common.results_path(name, args)
    assert path.parent == tmp_path and path.name.startswith(name) and path.name.endswith("_1t.json")
    path.write_text("measured")
    with pytest.raises(SystemExit) as end:
        start(script)
    assert end.value.code == 2 and path.read_text() == "measured"
    written = capsys.readouterr().err
    assert f"{path} exists; accepted: another folder for --out, or --force" in written
    with pytest.raises(Started):
        start(script, "--force")


def test_a_peer_that_is_not_there(start, tmp_path):
    with pytest.raises(SystemExit, match="llama.cpp: .*nothing is no file; accepted: the path"):
        start(peers, "--llama-bench", str(tmp_path / "nothing"))


def test_save_is_whole_or_nothing(tmp_path):
    path = common.save(tmp_path / "new" / "x.json", {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}\n' and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("arguments, code", [(["--help"], 0), ([], 2)])
def test_triton_without_triton_or_a_gpu(arguments, code, tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('triton')")
    command = [sys.executable, "-m", "bench.gpu.triton_w4", *arguments]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert ("W4 GEMV in Triton" in done.stdout) if code == 0 else (done.stderr.count("\n") == 1)
