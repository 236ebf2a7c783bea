"""The exit rule alone, and in the engine."""

import math

import pytest
import torch
from tiny_model import demo_model, random_model, random_prompt

from river_ext.engine.exit_rule import ExitRule
from river_ext.errors import RiverError

LAYERS = random_model().config.num_hidden_layers


def rule(thresholds, min_layers=None, active=None):
    return ExitRule.of(thresholds, min_layers or [1] * len(thresholds), limit=4, active=active)


def test_exit_is_strictly_above_the_threshold():
    assert rule([0.5]).exits(1, [0.5]) == [False]
    assert rule([0.5]).exits(1, [math.nextafter(0.5, 1)]) == [True]
    assert rule([1.0]).exits(1, [1.0]) == [False]


def test_thresholds_are_compared_as_fp32():
    similarity = torch.tensor(0.9).item()  # fp32 0.9 is below 0.9; fp32 0.1 above 0.1
    assert rule([0.9]).exits(1, [similarity]) == [False]
    assert rule([0.1]).exits(1, [torch.tensor(0.1).item()]) == [False]
    assert rule([0.1]).thresholds == (torch.tensor(0.1).item(),)


def test_min_layers():
    assert [rule([-2], [3]).exits(depth, [0.0]) for depth in (1, 2, 3, 4)] == [
        [False],
        [False],
        [True],
        [True],
    ]
    assert [rule([-2], [3]).can_exit(depth) for depth in (1, 2, 3)] == [False, False, True]


def test_one_strict_row_holds_back_the_batch():
    assert rule([0.5, 0.5]).exits(1, [0.9, 0.6]) == [True, True]
    assert rule([0.5, 0.7]).exits(1, [0.9, 0.6]) == [False, False]
    assert rule([0.5, 0.5], [1, 2]).exits(1, [0.9, 0.9]) == [False, False]
    assert not rule([-2, math.inf]).can_exit(4)


def test_inactive_rows_take_no_part():
    some = rule([0.5, math.inf], active=[True, False])
    assert some.can_exit(1)
    assert some.exits(1, [0.9, -1.0]) == [True, False]
    assert some.exits(1, [0.1, 1.0]) == [False, False]


def test_keep_selects_rows():
    kept = rule([0.1, 0.2, 0.3], [1, 2, 3], active=[True, False, True]).keep([2, 1])
    assert kept == rule([0.3, 0.2], [3, 2], active=[True, False])


def test_infinite_thresholds_need_no_similarity():
    assert not rule([math.inf]).can_exit(4)
    assert not rule([1.0]).can_exit(4)
    assert rule([-math.inf]).can_exit(1)
    assert rule([-math.inf]).exits(1, [-1.0]) == [True]


def test_nan_threshold_is_refused():
    with pytest.raises(RiverError, match="NaN"):
        rule([0.5, math.nan])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_infinite_threshold_is_bit_equal_to_the_full_model(dtype):
    model, prompts = random_model(dtype=dtype), [random_prompt(n, n) for n in (1, 6, 11)]
    full = model.generate(prompts, max_new_tokens=12, mode="full", return_logits=True)
    never = model.generate(prompts, max_new_tokens=12, threshold=math.inf, return_logits=True)
    for a, b in zip(full, never, strict=True):
        assert a.tokens == b.tokens
        assert torch.equal(a.logits, b.logits)
        assert a.similarities == b.similarities
        assert a.exit_depths == b.exit_depths == [LAYERS] * 12
        assert all(len(s) == LAYERS for s in a.similarities)


@pytest.mark.parametrize("depth", range(1, LAYERS + 1))
def test_exit_at_every_depth(depth):
    out = random_model().generate(random_prompt(6), max_new_tokens=8, threshold=-2, min_layers=depth)
    assert out.exit_depths == [LAYERS] + [depth] * 7  # the first new token is the prefill's
    assert [len(s) for s in out.similarities] == out.exit_depths


def test_decisions_follow_from_the_reported_similarities():
    threshold = 0.75
    out = random_model().generate(random_prompt(6), max_new_tokens=40, threshold=threshold, min_layers=2)
    for depth, similarities in zip(out.exit_depths[1:], out.similarities[1:], strict=True):
        met = [i + 1 for i, s in enumerate(similarities) if s > threshold and i + 1 >= 2]
        assert depth == (met[0] if met else LAYERS)
    assert len(set(out.exit_depths[1:])) > 1, "a threshold at which depths vary"


def test_batch_rows_exit_together_when_all_may():
    prompts = [random_prompt(n, n) for n in (3, 6, 9)]
    thresholds = [0.6, 0.75, 0.7]
    outputs = random_model().generate(prompts, max_new_tokens=20, threshold=thresholds, min_layers=[1, 2, 1])
    by_step = zip(*(list(zip(o.exit_depths, o.similarities, strict=True))[1:] for o in outputs), strict=True)
    for rows in by_step:
        depths = {depth for depth, _ in rows}
        assert len(depths) == 1
        (depth,) = depths
        may = [
            all(similarities[d - 1] > t for (_, similarities), t in zip(rows, thresholds, strict=True))
            and d >= 2
            for d in range(1, depth + 1)
        ]
        assert may.index(True) == depth - 1 if any(may) else depth == LAYERS


def test_one_request_that_never_exits_keeps_the_batch_at_full_depth():
    prompts = [random_prompt(4, 1), random_prompt(4, 2)]
    held = random_model().generate(prompts, max_new_tokens=8, threshold=[-2, math.inf])
    full = random_model().generate(prompts, max_new_tokens=8, mode="full")
    for a, b in zip(held, full, strict=True):
        assert (a.tokens, a.exit_depths) == (b.tokens, b.exit_depths)


def test_a_finished_request_holds_nothing_back():
    prompts = [random_prompt(4, 1), random_prompt(4, 2)]
    full = random_model().generate(prompts, max_new_tokens=8, mode="full")
    stop = next(t for t in full[1].tokens[1:4] if t not in full[0].tokens)
    n = full[1].tokens.index(stop) + 1
    outputs = random_model().generate(prompts, max_new_tokens=8, threshold=[-2, math.inf], stop_tokens=stop)
    assert outputs[1].tokens == full[1].tokens[:n]
    assert outputs[0].exit_depths[:n] == [LAYERS] * n
    assert set(outputs[0].exit_depths[n:]) == {1}


def test_demo_model_exits_early_and_deeper_with_a_higher_threshold():
    model = demo_model()
    prompt = "Question: Ana has 21 coins and buys 12 more at the fair. How many coins does Ana have?\nAnswer:"
    tokens = [*model.text.encode(prompt), *model.text.encode(" 21 + 12 = 33. #### 33")]
    depths = [
        sum(model.score(tokens, prompt_length=len(tokens) - 20, threshold=t).exit_depths[1:]) / 19
        for t in (-2.0, 0.5, 0.99, 1.0)
    ]
    assert depths == sorted(depths)
    assert depths[0] == 1 and depths[1] < depths[3] == model.config.num_hidden_layers
