"""The exit rule alone, and in the engine."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_model import demo_model, random_model, random_prompt

from river_ext.engine.exit_rule import BATCH_POLICIES, ExitRule, next_decision, still_staying
from river_ext.errors import RiverError

LAYERS = random_model().config.num_hidden_layers


def rule(threshold, min_layers=1, limit=LAYERS):
    return ExitRule((threshold,) * LAYERS, min_layers, limit)


def test_exit_is_strictly_above_the_threshold():
    assert not rule(0.5).leaves(1, 0.5)
    assert rule(0.5).leaves(1, math.nextafter(0.5, 1))
    assert not rule(1.0).leaves(1, 1.0)


def test_thresholds_are_compared_as_fp32():
    similarity = torch.tensor(0.9).item()  # fp32 0.9 is below 0.9; fp32 0.1 above 0.1
    assert not rule(0.9).leaves(1, similarity)
    assert not rule(0.1).leaves(1, torch.tensor(0.1).item())
    assert rule(0.1).thresholds == (torch.tensor(0.1).item(),) * LAYERS


def test_min_layers():
    assert [rule(-2, 3).leaves(depth, 0.0) for depth in (1, 2, 3, 4)] == [False, False, True, True]
    assert [rule(-2, 3).may_leave(depth) for depth in (1, 2, 3)] == [False, False, True]


def test_a_row_leaves_at_its_limit():
    for depth, leaves in ((0, False), (1, False), (2, True), (3, True)):
        assert rule(math.inf, 3, limit=2).leaves(depth, -1.0) == leaves
        assert rule(math.inf, 3, limit=2).may_leave(depth) == leaves
    assert rule(math.inf, limit=0).leaves(0, -math.inf)


def test_each_layer_has_its_own_threshold():
    by_layer = ExitRule((0.9, 1.0, 0.5, -2), 1, LAYERS)
    assert [by_layer.leaves(depth, 0.7) for depth in (1, 2, 3, 4)] == [False, False, True, True]
    assert [by_layer.may_leave(depth) for depth in range(LAYERS)] == [False, True, False, True]
    assert next_decision([by_layer], 1, [True], False, LAYERS) == 3
    assert not by_layer.never_leaves
    assert not replace(by_layer, limit=0).never_leaves
    for only_last in ((1, 2, math.inf, -2), (1, 2, -2, -2)):  # what the last one says decides nothing
        rule = ExitRule(only_last, 1, LAYERS)
        assert rule.never_leaves == (only_last[2] == math.inf)
    assert replace(by_layer, thresholds=(-2, 1, 1, 1), min_layers=2).never_leaves


def test_infinite_thresholds_need_no_similarity():
    assert not any(rule(math.inf).may_leave(depth) for depth in range(LAYERS))
    assert not any(rule(1.0).may_leave(depth) for depth in range(LAYERS))
    assert rule(-math.inf).may_leave(1)
    assert rule(-math.inf).leaves(1, -1.0)


def test_nan_threshold_is_refused():
    with pytest.raises(RiverError, match="NaN"):
        rule(math.nan)


def test_rows_leave_on_their_own():
    rules = [rule(0.5), rule(0.7), rule(0.5, 2)]
    assert still_staying(rules, 1, [True] * 3, [0.9, 0.6, 0.9], together=False) == [False, True, True]
    assert still_staying(rules, 2, [False, True, True], [-1.0, 0.6, 0.9], together=False) == [
        False,
        True,
        False,
    ]
    assert still_staying(rules, 4, [False, True, False], [-1.0] * 3, together=False) == [False] * 3


def test_together_one_strict_row_holds_back_the_batch():
    both = [True, True]
    assert still_staying([rule(0.5), rule(0.5)], 1, both, [0.9, 0.6], together=True) == [False, False]
    assert still_staying([rule(0.5), rule(0.7)], 1, both, [0.9, 0.6], together=True) == both
    assert still_staying([rule(0.5), rule(0.5, 2)], 1, both, [0.9, 0.9], together=True) == both
    assert still_staying([rule(-2), rule(math.inf)], 3, both, [1.0, 1.0], together=True) == both


@pytest.mark.parametrize("together", [False, True])
def test_who_has_left_is_asked_no_more_and_stays_away(together):
    rules = [rule(0.5), rule(math.inf), rule(0.5)]
    assert still_staying(rules, 2, [True, False, True], [0.9, -1.0, 0.9], together) == [False] * 3
    assert still_staying(rules, 2, [True, False, True], [0.1, 1.0, 0.1], together) == [True, False, True]
    assert still_staying(rules, 3, [False] * 3, [0.0] * 3, together) == [False] * 3


@pytest.mark.parametrize("together", [False, True])
def test_rows_of_limit_0_run_no_layer(together):
    """Together, they hold nobody else back, and others do not hold them."""
    never = [-math.inf] * 2
    assert still_staying([rule(0.5, limit=0)] * 2, 0, [True] * 2, never, together) == [False] * 2
    mixed = still_staying([rule(0.5, limit=0), rule(0.5)], 0, [True] * 2, never, together)
    assert mixed == ([True] * 2 if together else [False, True])


def test_the_next_decision_is_where_a_row_that_stays_may_leave():
    rules = [rule(0.5, 3), rule(math.inf), rule(0.5, 2)]

    def decisions(stays, together):
        return [next_decision(rules, depth, stays, together, LAYERS) for depth in range(LAYERS)]

    assert decisions([True] * 3, together=False) == [2, 2, 3, 4]
    assert decisions([True, True, False], together=False) == [3, 3, 3, 4]
    assert decisions([False, True, False], together=False) == [4] * 4
    assert decisions([True] * 3, together=True) == [4] * 4, "one of them never leaves"
    assert decisions([True, False, True], together=True) == [3, 3, 3, 4]


# --- in the engine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", BATCH_POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_infinite_threshold_is_bit_equal_to_the_full_model(dtype, policy):
    model, prompts = random_model(dtype=dtype), [random_prompt(n, n) for n in (1, 6, 11)]
    options = {"max_new_tokens": 12, "return_logits": True, "batch_policy": policy}
    full = model.generate(prompts, mode="full", **options)
    never = model.generate(prompts, threshold=math.inf, **options)
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


def test_decisions_by_layer_follow_from_the_reported_similarities():
    thresholds = [0.6, 0.8, 0.85, -2]
    for control in ("host", "device"):
        out = random_model().generate(
            random_prompt(6), max_new_tokens=40, threshold=thresholds, exit_control=control
        )
        for depth, similarities in zip(out.exit_depths[1:], out.similarities[1:], strict=True):
            met = [i + 1 for i, s in enumerate(similarities[:3]) if s > thresholds[i]]
            assert depth == (met[0] if met else LAYERS)
        assert set(out.exit_depths[1:]) == {1, 2, 3, 4}


def test_equal_thresholds_of_all_layers_are_one_threshold():
    prompts = [random_prompt(4, 1), random_prompt(5, 2)]
    options = {"max_new_tokens": 20, "return_logits": True}
    for policy in BATCH_POLICIES:
        one = random_model().generate(prompts, threshold=0.7, batch_policy=policy, **options)
        listed = random_model().generate(
            prompts, threshold=[[0.7] * LAYERS] * 2, batch_policy=policy, **options
        )
        for a, b in zip(one, listed, strict=True):
            assert (a.tokens, a.similarities) == (b.tokens, b.similarities) and torch.equal(
                a.logits, b.logits
            )


def test_batch_rows_exit_together_when_all_may():
    prompts = [random_prompt(n, n) for n in (3, 6, 9)]
    thresholds = [0.6, 0.75, 0.7]
    options = {"max_new_tokens": 20, "threshold": thresholds, "min_layers": [1, 2, 1], "batch_policy": "min"}
    outputs = random_model().generate(prompts, **options)
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


def test_batch_rows_exit_each_on_its_own():
    """And get what they get alone: tokens, depths, similarities and logits, bit for bit."""
    prompts = [random_prompt(n, n) for n in (3, 6, 9, 1)]
    options = {"max_new_tokens": 20, "return_logits": True}
    own = {"threshold": [0.6, 0.75, 0.5, math.inf], "min_layers": [1, 2, 1, 1]}
    outputs = random_model().generate(prompts, **options, **own)
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        mine = {name: values[number] for name, values in own.items()}
        alone = random_model().generate(prompt, **options, **mine)
        assert (output.tokens, output.exit_depths) == (alone.tokens, alone.exit_depths)
        assert output.similarities == alone.similarities
        assert torch.equal(output.logits, alone.logits)
        for depth, similarities in zip(output.exit_depths[1:], output.similarities[1:], strict=True):
            met = [i + 1 for i, s in enumerate(similarities) if s > mine["threshold"]]
            met = [d for d in met if d >= mine["min_layers"]]
            assert depth == (met[0] if met else LAYERS)
    by_step = list(zip(*(output.exit_depths[1:] for output in outputs), strict=True))
    assert max(len(set(depths)) for depths in by_step) > 2, "rows of a step at different depths"


def test_one_request_that_never_exits_keeps_the_batch_at_full_depth():
    prompts = [random_prompt(4, 1), random_prompt(4, 2)]
    options = {"max_new_tokens": 8, "threshold": [-2, math.inf]}
    held = random_model().generate(prompts, batch_policy="min", **options)
    full = random_model().generate(prompts, max_new_tokens=8, mode="full")
    for a, b in zip(held, full, strict=True):
        assert (a.tokens, a.exit_depths) == (b.tokens, b.exit_depths)
    free, own = random_model().generate(prompts, **options)
    assert free.exit_depths == [LAYERS] + [1] * 7, "by default, each row leaves on its own"
    assert (own.tokens, own.exit_depths) == (full[1].tokens, full[1].exit_depths)


def test_a_finished_request_holds_nothing_back():
    prompts = [random_prompt(4, 1), random_prompt(4, 2)]
    full = random_model().generate(prompts, max_new_tokens=8, mode="full")
    stop = next(t for t in full[1].tokens[1:4] if t not in full[0].tokens)
    n = full[1].tokens.index(stop) + 1
    options = {"max_new_tokens": 8, "threshold": [-2, math.inf], "batch_policy": "min"}
    outputs = random_model().generate(prompts, stop_tokens=stop, **options)
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
