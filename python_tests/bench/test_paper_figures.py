"""The paper's figures: caches and drift, on the bundled model, and their drawings."""

import json
import sys

import numpy
import pytest
from tiny_model import demo_model

from bench import report
from bench.cpu import thresholds
from bench.figures import caches, drift, front, paper

PROMPTS = ["Question: Ana has 21 coins and buys 12 more. How many coins does Ana have?\nAnswer:", "def f"]
LAYERS, NEW_TOKENS = 16, 8


@pytest.fixture(scope="module")
def texts():
    return thresholds.full_depth(demo_model(), PROMPTS, NEW_TOKENS)


def test_the_cache_is_what_generation_leaves(texts):
    """Of tokens that leave after layer 5: the backbone's up to there, and no longer after it."""
    full = caches.cache_of(demo_model(), texts[0], {"mode": "full"})
    river = caches.cache_of(demo_model(), texts[0], {"threshold": -2.0, "min_layers": 5})
    config = demo_model().config
    tokens = len(texts[0].tokens) - 1
    assert full.shape == (2, LAYERS, tokens, config.num_key_value_heads, config.head_dim)
    assert full.abs().amax(-1).min() > 0, "nothing is missing"
    assert river[:, :5].equal(full[:, :5])
    assert (river[:, 5:] != full[:, 5:]).flatten(2).any(-1).all()
    engine = demo_model().engine(slots=1, max_len=256)
    engine.submit(texts[0].prompt, mode="full", max_new_tokens=NEW_TOKENS)
    list(engine)
    k, _ = engine._memory.cache.layer(7)
    first = len(texts[0].prompt)
    assert k[0, :, first : first + tokens].transpose(0, 1).double().equal(full[0, 7])


def test_percentiles_and_correlations(texts):
    result = caches.measure(demo_model(), texts, [2, 5], [5])
    assert result["tokens"] == sum(len(text.tokens) - 1 for text in texts)
    full = [caches.cache_of(demo_model(), text, {"mode": "full"}).numpy() for text in texts]
    options = {"threshold": -2.0, "min_layers": 5}
    river = [caches.cache_of(demo_model(), text, options).numpy() for text in texts]

    def cosine(a, b):
        return (a * b).sum(-1) / numpy.linalg.norm(a, axis=-1) / numpy.linalg.norm(b, axis=-1)

    (line,) = result["kv"]
    for part, name in enumerate("kv"):
        cosines = numpy.concatenate([cosine(a[part], b[part]) for a, b in zip(full, river, strict=True)], 1)
        for percentile in (5, 50):
            expected = numpy.percentile(cosines.reshape(LAYERS, -1), percentile, axis=1)
            assert line[name][str(percentile)] == pytest.approx(expected, abs=1e-4)
    last = [
        cosine(a[1, -1].reshape(len(a[1, -1]), -1), b[1, -1].reshape(len(b[1, -1]), -1))
        for a, b in zip(full, river, strict=True)
    ]
    similarities = [row[4] for text in texts for row in text.similarities[1:]]
    values = {line["depth"]: line for line in result["values"]}
    assert list(values) == [2, 5]
    assert values[5]["r"] == pytest.approx(numpy.corrcoef(similarities, numpy.concatenate(last))[0, 1])
    assert values[5]["points"][0] == pytest.approx([similarities[0], last[0][0]], abs=1e-4)


def test_drift_is_of_the_text_at_full_depth(texts, monkeypatch):
    monkeypatch.setattr(drift, "SETTINGS", {"never": {"threshold": 2.0}, "full W4": {"mode": "full_w4"}})
    monkeypatch.setattr(drift, "STRETCH", 4)
    result = drift.measure(demo_model(), texts)
    never, w4 = result["settings"]
    assert result["lengths"] == [len(text.tokens) for text in texts]
    assert set(never["same"]) == {1} and never["first_difference"] == [None, None]
    assert never["kl"] == pytest.approx([0] * len(never["kl"]), abs=1e-6) and max(w4["kl"]) > 0
    for text, place in zip(texts, w4["first_difference"], strict=True):
        free = demo_model().generate(text.prompt, mode="full_w4", max_new_tokens=NEW_TOKENS).tokens
        differs = [i for i, (a, b) in enumerate(zip(free, text.tokens, strict=False)) if a != b]
        assert place == (differs[0] if differs else None)


def test_stretches():
    assert drift.stretches([[1.0] * 32 + [3.0], [5.0] * 40]) == [3.0, pytest.approx((3 + 8 * 5) / 9)]
    assert drift.first_difference([True, False, False]) == 1 and drift.first_difference([True]) is None


def test_the_front():
    result = {
        "forced": [{"setting": "River 0.5", "same": 0.9}, {"setting": "full W4", "same": 0.8}],
        "free": [
            {"setting": "full W4", "x_full_depth": 2.3},
            {"setting": "full depth", "x_full_depth": 1.0},
            {"setting": "River 0.5", "x_full_depth": 2.1},
        ],
    }
    assert front.points(result) == [("full depth", 1.0, 1.0), ("River 0.5", 2.1, 0.9), ("full W4", 2.3, 0.8)]


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["paper", "--threads", "1", *map(str, arguments)])
    paper.main()


def test_a_run_and_its_figures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    monkeypatch.setattr(paper.river_ext, "load", lambda *arguments, **options: demo_model())
    monkeypatch.setattr(paper, "DEPTHS", [2, 3])
    sizes = "--count", 2, "--new-tokens", 5, "--long-tokens", 5
    run(monkeypatch, "--model", "demo", "--prompts", prompts, "--out", tmp_path, *sizes)
    (path,) = tmp_path.glob("paper_cpu_*_1t.json")
    result = json.loads(path.read_text())
    assert result["layers"] == LAYERS and [line["depth"] for line in result["values"]] == [2, 3]
    assert [line["depth"] for line in result["kv"]] == [2, 4, 8] and result["files"] == {"prompts.jsonl": 2}
    of_thresholds = report.RESULTS / report.FILES["thresholds"]
    run(monkeypatch, "--plot", path, of_thresholds, tmp_path / "figures")
    drawn = sorted(figure.stem for figure in (tmp_path / "figures").iterdir())
    assert drawn == sorted(paper.DRAWN)


def test_nothing_to_measure_on_is_said(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch)
    assert end.value.code == 2 and "accepted: --model DIR --prompts FILE" in capsys.readouterr().err
