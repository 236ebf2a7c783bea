"""The CPU benchmarks as far as nothing is measured: arguments, refusals, and results that stay."""

import json
import subprocess
import sys

import pytest

from bench.cpu import attention, decode, linear, peers, peers_text, prefill
from bench.lib import common
from river_ext.model import DEMO

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


@pytest.mark.parametrize("arguments", [[], ["--model", "x"], ["--model", "x", "--prompts", "a", "b"]])
def test_peers_need_a_model_and_prompts(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peers_text", *arguments])
    with pytest.raises(SystemExit) as end:
        peers_text.main()
    assert end.value.code == 2 and "accepted: a model and one file" in capsys.readouterr().err


def test_ways_of_transformers(tmp_path, monkeypatch):
    """What may only be faster has the tokens of full depth, by either library."""
    pytest.importorskip("transformers")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "def add(a, b):"}\n{"text": "Question: Ana has 3 coins."}\n')
    monkeypatch.setattr("torch.compile", lambda model, fullgraph: model)  # takes minutes
    command = ["peers_text", "--model", DEMO, "--prompts", prompts, "--count", "2", "--new-tokens", "12"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--threads", "1", "--out", str(tmp_path)])
    peers_text.main()
    (path,) = tmp_path.glob("peers_text_cpu_*_1t.json")
    found = json.loads(path.read_text())
    lines = {line.pop("runner"): line for line in found["peers"]}
    same = {name: line["same"] for name, line in lines.items()}
    assert list(same) == [
        "river_ext, full bf16", "river_ext, lossless", "river_ext, River 0.9", "river_ext, full W4",
        "transformers, eager", "transformers, compiled", "transformers, prompt lookup",
        "transformers, early exit",
    ]  # fmt: skip
    exact = [name for name in same if name not in ("river_ext, River 0.9", "river_ext, full W4")]
    assert all(same[name] == 2 for name in exact)
    counts = {lines[name]["new_tokens"] for name in exact}
    assert len(counts) == 1 and 2 < counts.pop() <= 24
    assert (
        all(rate > 0 for line in lines.values() for rate in line["all"]) and len(found["prompt_tokens"]) == 2
    )


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
