"""What a threshold costs: the numbers against the model's own, the figure, and refusals."""

import json
import math
import sys

import numpy
import pytest
import torch
from tiny_model import demo_model

from bench.cpu import thresholds
from bench.lib.prompts import read_prompts
from river_ext.evaluation.measure import kl_divergence

PROMPTS = ["Question: Ana has 21 coins and buys 12 more. How many coins does Ana have?\nAnswer:", "def f"]
LAYERS, NEW_TOKENS = 16, 6


@pytest.fixture(scope="module")
def texts():
    return thresholds.full_depth(demo_model(), PROMPTS, NEW_TOKENS)


def test_similarities_are_those_of_decoded_tokens(texts):
    found = thresholds.similarity_percentiles(texts)
    rows = [row for text in texts for row in text.similarities[1:]]
    for percentile in (5, 25, 50, 75, 95):
        expected = numpy.percentile(rows, percentile, axis=0)
        assert found[str(percentile)] == pytest.approx(expected, abs=1e-4)


def test_settings_fed_with_the_text_of_full_depth(texts, monkeypatch):
    monkeypatch.setattr(thresholds, "THRESHOLDS", (-2.0, 2.0))
    monkeypatch.setattr(thresholds, "POLICY_THRESHOLDS", (-2.0,))
    lines = {line["setting"]: line for line in thresholds.forced(demo_model(), texts)}
    policies = ("depth:4", "depth:8", "min", "last")
    assert list(lines) == ["full W4", "River -2", "River 2", *(f"River -2, {policy}" for policy in policies)]
    never = lines["River 2"]
    assert (never["exit_depth"], never["prompt_depth"], never["same"]) == (LAYERS, LAYERS, 1)
    assert never["kl"] == pytest.approx(0, abs=1e-6)
    depths = {name: (line["exit_depth"], line["prompt_depth"]) for name, line in lines.items()}
    assert depths["full W4"] == (0, 0) and depths["River -2"] == (1, LAYERS)
    assert [depths[f"River -2, {policy}"] for policy in policies] == [(1, 4), (1, 8), (1, 1), (1, 1)]
    same, kl = [], []
    for text in texts:
        tokens = text.prompt + text.tokens
        logits = demo_model().score(tokens, prompt_length=len(text.prompt), mode="full_w4").logits
        same += (logits.argmax(-1) == torch.tensor(text.tokens)).tolist()
        kl += kl_divergence(text.logits, logits).tolist()
    line = lines["full W4"]
    assert line["tokens"] == len(same) and line["same"] == pytest.approx(sum(same) / len(same))
    assert line["kl"] == pytest.approx(math.fsum(kl) / len(kl)) and line["kl"] > 0


def test_prompts_of_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({field: field}) + "\n" for field in ("question", "prompt", "text")))
    assert read_prompts(path, 2, chat=False) == ["question", "prompt"]
    assert read_prompts(path, 9, chat=True)[2] == [{"role": "user", "content": "text"}]


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["thresholds", "--threads", "1", *map(str, arguments)])
    thresholds.main()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The file of a short run on the bundled model, and the arguments of that run."""
    folder = tmp_path_factory.mktemp("run")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    arguments = [
        "--model",
        "demo",
        "--prompts",
        prompts,
        "--new-tokens",
        3,
        "--free-count",
        1,
        "--out",
        folder,
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds.river_ext, "load", lambda *arguments, **options: demo_model())
        run(patch, *arguments)
    (path,) = folder.glob("thresholds_cpu_*_1t.json")
    return path, arguments


def test_a_run(results, monkeypatch, capsys):
    path, arguments = results
    result = json.loads(path.read_text())
    assert result["files"] == {"prompts.jsonl": 2} and result["layers"] == LAYERS
    assert [line["setting"] for line in result["free"]][:2] == ["full depth", "full W4"]
    assert result["free"][0]["x_full_depth"] == 1
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    assert "exists; accepted: another folder for --out, or --force" in capsys.readouterr().err


def test_the_figure_of_a_run(results, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    figures = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for figure in figures:
        run(monkeypatch, "--plot", results[0], figure)
    first, second = (figure.read_text() for figure in figures)
    assert first == second and "prefill depth:4" in first and "mean exit depth" in first


def test_nothing_to_measure_on_is_said(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch)
    assert end.value.code == 2 and "accepted: --model DIR --prompts FILE" in capsys.readouterr().err


def test_a_figure_without_matplotlib_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--plot", tmp_path / "a.json", tmp_path / "a.svg")
    assert end.value.code == 2
    assert capsys.readouterr().err == "thresholds.py: figures need matplotlib; accepted: to install it\n"
