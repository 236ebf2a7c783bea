"""The rows of the tables: shares, KL, agreement, speed, and the demo's tasks."""

import json
import math
import statistics
from dataclasses import fields

import pytest
import torch
from rich.console import Console
from tiny_model import demo_model

from river_ext.engine.sequence import GenerationOutput, Stats
from river_ext.evaluation.measure import (
    FUNCTIONS,
    PROBLEMS,
    Item,
    Row,
    Setting,
    Share,
    demo_items,
    evaluate,
    kl_divergence,
    result_table,
    settings_of,
)

NEW_TOKENS = 24
STRICT_INF = Setting("River inf", {"mode": "river", "threshold": math.inf})


@pytest.fixture(scope="module")
def evaluated():
    """Rows of four settings on three prompts, and the outputs behind them."""
    items, outputs = demo_items(2, 1), []
    settings = [*settings_of(demo_model(), [-2.0]), STRICT_INF]
    rows = evaluate(
        demo_model(),
        [[item] for item in items],
        settings,
        max_new_tokens=NEW_TOKENS,
        on_batch=lambda batch, found: outputs.append([of_setting[0] for of_setting in found]),
    )
    return items, rows, outputs


def test_share():
    share = Share(3, 4)
    assert share.value == 0.75
    assert share.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert Share(0, 7).standard_error == Share(7, 7).standard_error == 0
    assert str(share) == "3 of 4"
    assert str(Share(270, 300)) == "90.0 ± 1.7 %"
    flags = [1.0] * 270 + [0.0] * 30
    assert Share(270, 300).standard_error == pytest.approx(statistics.pstdev(flags) / math.sqrt(300))


def test_kl_divergence():
    p, q = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[5.0, 5.0]])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl_divergence(p, q).item() == pytest.approx(expected, rel=1e-5)
    logits = torch.randn(5, 300)
    assert kl_divergence(logits, logits).tolist() == [0.0] * 5
    assert kl_divergence(logits, logits + 3).abs().max() < 1e-6


def test_settings():
    settings = settings_of(demo_model(), [0.5, 0.95], min_layers=2)
    assert [setting.name for setting in settings] == [
        "full bf16",
        "lossless",
        "full W4",
        "River 0.5",
        "River 0.95",
    ]
    assert [setting.options for setting in settings[:3]] == [
        {"mode": mode} for mode in ("full", "lossless", "full_w4")
    ]
    assert settings[4].options == {"mode": "river", "threshold": 0.95, "min_layers": 2}


def test_demo_items():
    items = demo_items(3, 2)
    assert [list(item.checks) for item in items] == [[PROBLEMS]] * 3 + [[FUNCTIONS]] * 2
    assert [item.prompt for item in items] == [item.prompt for item in demo_items(3, 2)]
    assert items[0].prompt != demo_items(3, 2, seed=1)[0].prompt
    assert not any(item.is_right("") for item in items)


def test_the_reference_row(evaluated):
    items, rows, outputs = evaluated
    row = rows[0]
    assert (row.name, row.kl, row.mean_exit_depth) == ("full bf16", 0.0, 16.0)
    assert row.equal_sequences == Share(3, 3)
    assert row.equal_tokens.value == 1
    assert row.equal_exited_tokens is None
    assert row.new_tokens == sum(len(of_settings[0].tokens) for of_settings in outputs)
    rates = [of_settings[0].stats.tokens_per_second for of_settings in outputs]
    assert row.tokens_per_second == pytest.approx(statistics.median(rates))
    for task, count in ((PROBLEMS, 2), (FUNCTIONS, 1)):
        rights = [i.is_right(o[0].text) for i, o in zip(items, outputs, strict=True) if task in i.checks]
        assert row.accuracy[task] == Share(sum(rights), count)


def test_rows_are_the_modes(evaluated):
    items, _, outputs = evaluated
    modes = [
        {"mode": "full"},
        {"mode": "lossless"},
        {"mode": "full_w4"},
        {"threshold": -2},
        {"threshold": math.inf},
    ]
    for item, of_settings in zip(items, outputs, strict=True):
        for mode, output in zip(modes, of_settings, strict=True):
            alone = demo_model().generate(item.prompt, max_new_tokens=NEW_TOKENS, **mode)
            assert output.tokens == alone.tokens
            assert output.exit_depths == alone.exit_depths


def test_a_model_does_not_diverge_from_itself(evaluated):
    """Nor in lossless mode; and a threshold that nothing exceeds is full depth."""
    _, rows, _ = evaluated
    for row in (rows[1], rows[4]):
        assert row.kl == 0.0 and row.mean_exit_depth == 16
        assert row.equal_sequences == Share(3, 3)


def test_divergence_follows_the_sequence_of_the_reference(evaluated):
    """Also where a setting generates something else by itself."""
    items, rows, outputs = evaluated
    for index, mode in ((2, {"mode": "full_w4"}), (3, {"threshold": -2})):
        found = []
        for item, of_settings in zip(items, outputs, strict=True):
            tokens = demo_model().text.encode(item.prompt)
            fed = demo_model().score(tokens + of_settings[0].tokens, prompt_length=len(tokens), **mode)
            found += kl_divergence(of_settings[0].logits, fed.logits).tolist()
        assert rows[index].kl == pytest.approx(statistics.fmean(found), rel=1e-6)
        assert rows[index].kl > 0


def test_depths_and_agreement(evaluated):
    _, rows, outputs = evaluated
    full_w4, river = rows[2], rows[3]
    assert full_w4.mean_exit_depth == 0
    depths = [depth for of_settings in outputs for depth in of_settings[3].exit_depths]
    assert river.mean_exit_depth == pytest.approx(statistics.fmean(depths))
    assert set(depths) == {1, 16}, "16 for the first tokens, which the prefill gives"
    assert river.equal_exited_tokens.total == len(depths) - 3
    for row in (full_w4, river):
        index = rows.index(row)
        equal = [o[index].tokens == o[0].tokens for o in outputs]
        assert row.equal_sequences == Share(sum(equal), 3)


class Scripted:
    """A model that gives prepared outputs."""

    def __init__(self, outputs):
        self.config, self.outputs = demo_model().config, outputs

    def generate(self, prompts, *, max_new_tokens=None, name, **_):
        return [self.outputs[name][prompt] for prompt in prompts]


def scripted(tokens, depths, seconds):
    unseen = {field.name: 0 for field in fields(Stats)}
    rate = (len(tokens) - 1) / seconds if seconds else 0.0
    stats = Stats(**unseen | {"decode_seconds": seconds, "tokens_per_second": rate})
    text, drafted = "".join(map(str, tokens)), [False] * len(tokens)
    return GenerationOutput(
        text, tokens, depths, similarities=[], drafted=drafted, finish_reason="stop", stats=stats
    )


def test_tokens_are_compared_place_by_place():
    model = Scripted(
        {
            "full": {"a": scripted([1, 2, 3, 4], [16] * 4, 1.0), "b": scripted([5], [16], 0.0)},
            "other": {"a": scripted([1, 9, 3], [16, 2, 3], 0.5), "b": scripted([5], [16], 0.0)},
        }
    )
    items = [
        Item("a", {"starts": lambda text: text[:2] == "12", "ends": lambda text: text[-1] == "3"}),
        Item("b"),
    ]
    settings = [Setting(name, {"name": name}) for name in ("full", "other")]
    for batches in ([items], [[item] for item in items]):
        full, other = evaluate(model, batches, settings, divergence=False)
        assert full.accuracy == {"starts": Share(1, 1), "ends": Share(0, 1)}
        assert other.accuracy == {"starts": Share(0, 1), "ends": Share(1, 1)}
        assert [other.tokens_by_depth[depth] for depth in (2, 3, 16)] == [1, 1, 2]
        assert len(other.tokens_by_depth) == 17 and sum(other.tokens_by_depth) == other.new_tokens
        assert other.equal_sequences == Share(1, 2)
        assert other.equal_tokens == Share(3, 5)
        assert other.equal_exited_tokens == Share(1, 2)
        assert (full.tokens_per_second, other.tokens_per_second) == (3.0, 4.0)
        assert other.mean_exit_depth == (16 + 2 + 3 + 16) / 4
        assert other.kl is None


def test_divergence_needs_single_prompts():
    with pytest.raises(ValueError, match="batches of one"):
        evaluate(demo_model(), [demo_items(2, 0)], settings_of(demo_model(), []))


def printed(rows) -> list[str]:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(result_table(rows))
    return capture.get().splitlines()


def test_table_and_json(evaluated):
    _, rows, _ = evaluated
    lines = printed(rows)
    assert len(lines) == 1 + len(rows)
    for head in ("problems", "functions", "same output", "KL, nats", "exit depth", "tokens/s", "speed"):
        assert head in lines[0]
    assert lines[1].startswith("full bf16") and "16.00" in lines[1] and "1.00 x" in lines[1]
    document = rows[3].as_dict()
    assert json.loads(json.dumps(document)) == document
    assert document["name"] == "River -2" and document["options"]["threshold"] == -2
    assert document["accuracy"][PROBLEMS].keys() == {"count", "total", "value", "standard_error"}


def test_columns_without_values_are_left_out():
    row = Row("one", {}, {}, Share(1, 1), Share(1, 1), None, None, 1, 16.0, [0] * 16 + [1], None)
    heads = printed([row])[0]
    assert "exit depth" in heads and "tokens/s" not in heads and "KL" not in heads and "speed" not in heads
