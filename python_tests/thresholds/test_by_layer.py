"""Thresholds by layer: the table against the model, the search against its neighbours, and calibration."""

from itertools import pairwise

import pytest
import torch
from tiny_model import random_model, random_prompt

from river_ext.errors import RiverError
from river_ext.thresholds.by_layer import (
    ALWAYS,
    NEVER,
    PRICES,
    SHARES,
    ExitTable,
    candidates,
    exit_table,
    search,
)
from river_ext.thresholds.calibrate import calibrate, split, steps
from river_ext.thresholds.choice import Targets
from river_ext.thresholds.curve import full_depth

NEW_TOKENS, LAYERS, SINGLE = 10, random_model().config.num_hidden_layers, (0.9, 0.6, -2.0)


def random_table(seed: int, depths=5, tokens=64, first=2, right=0.6) -> ExitTable:
    g = torch.Generator().manual_seed(seed)
    similarities = torch.rand(depths, tokens, generator=g)
    wrong = (
        torch.rand(depths, tokens, generator=g) > right + 0.5 * similarities
    )  # the less similar, the more often
    return ExitTable(first + depths, first, similarities, wrong)


def exits_of(table: ExitTable, thresholds) -> list[tuple[int, bool]]:
    """Token by token, as the exit rule is written."""
    found = []
    for token in range(table.similarities.shape[1]):
        for index, threshold in enumerate(thresholds):
            if table.similarities[index, token] > threshold:
                found.append((table.first + index, bool(table.different[index, token])))
                break
        else:
            found.append((table.layers, False))
    return found


def cost(table: ExitTable, thresholds, price: float) -> float:
    return sum(depth + price * different for depth, different in exits_of(table, thresholds))


def own(table: ExitTable, rule) -> list[float]:
    """A rule's thresholds at the depths of the table."""
    assert len(rule) == table.layers
    assert set(rule[: table.first - 1]) | {rule[-1]} <= {NEVER}
    return list(rule[table.first - 1 : -1])


@pytest.mark.parametrize("seed", range(3))
def test_exits_of_a_table(seed):
    table, g = random_table(seed), torch.Generator().manual_seed(seed)
    for thresholds in (
        torch.rand(5, generator=g).tolist(),
        [NEVER] * 5,
        [ALWAYS] * 5,
        [0.9, NEVER, 0.5, 0.9, 1.0],
    ):
        depths, different = table.exits(thresholds)
        assert list(zip(depths.tolist(), different.tolist(), strict=True)) == exits_of(table, thresholds)


@pytest.mark.parametrize("price", [0.5, 3, 20, 500])
def test_no_other_threshold_of_one_layer_is_better(price):
    for seed in range(4):
        table = random_table(seed)
        found = own(table, search(table, price))
        least = cost(table, found, price)
        assert least <= cost(table, [NEVER] * 5, price)
        for index in range(5):
            falling = table.similarities[index].sort(descending=True)[0].tolist() + [ALWAYS]
            for threshold in [NEVER] + [falling[count * 64 // SHARES] for count in range(1, SHARES + 1)]:
                other = [*found[:index], threshold, *found[index + 1 :]]
                assert cost(table, other, price) >= least - 1e-6, (seed, index, threshold)


def test_what_is_planted_is_found():
    """Depth 2 is right where it is similar, depth 3 never, depth 4 always."""
    similarities = torch.rand(3, 160, generator=torch.Generator().manual_seed(1))
    wrong = torch.stack([similarities[0] <= similarities[0].median(), torch.ones(160), torch.zeros(160)])
    table = ExitTable(5, 2, similarities, wrong.bool())
    median = float(similarities[0].median())
    assert search(table, price=10) == (NEVER, median, NEVER, ALWAYS, NEVER)


def test_candidates_come_from_the_fewest_different_tokens_on():
    table = random_table(0, tokens=1600, right=0.9)
    found = candidates(table, [0.3, 0.95])
    rules = [rule for rule in found if isinstance(rule, tuple)]
    assert set(found) - set(rules) == {0.3, 0.95}
    assert set(rules) == {search(table, price * table.layers) for price in PRICES} and len(rules) > 1

    def counted(candidate):
        thresholds = own(table, candidate) if isinstance(candidate, tuple) else [candidate] * 5
        return sum(different for _, different in exits_of(table, thresholds))

    assert all(counted(strict) <= counted(relaxed) for strict, relaxed in pairwise(found))


# --- on a model -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts():
    return [random_prompt(3 + seed % 5, seed=seed) for seed in range(8)]


def test_the_table_is_what_the_model_does(prompts):
    model, calls = random_model(), []
    answers = full_depth(model, prompts[:3], NEW_TOKENS, lambda: None)
    table = exit_table(model, answers, lambda: calls.append(None), min_layers=2, river_head="model")
    assert (table.layers, table.first, len(calls)) == (LAYERS, 2, 3 * (LAYERS - 2))
    assert table.similarities.shape == table.different.shape == (LAYERS - 2, 3 * (NEW_TOKENS - 1))
    similarities, different = [], []
    for answer in answers:
        out = model.generate(answer.prompt, mode="full", max_new_tokens=NEW_TOKENS)
        similarities += [row[1:-1] for row in out.similarities[1:]]
        logits = [
            model.score(
                answer.prompt + answer.tokens,
                prompt_length=len(answer.prompt),
                threshold=-2,
                min_layers=depth,
            ).logits
            for depth in range(2, LAYERS)
        ]
        for number in range(1, NEW_TOKENS):
            different.append([int(rows[number].argmax()) != answer.tokens[number] for rows in logits])
    assert torch.equal(table.similarities, torch.tensor(similarities).T)
    assert torch.equal(table.different, torch.tensor(different).T)
    assert 0 < table.different.sum() < table.different.numel()


def test_calibration_learns_from_some_prompts_and_measures_on_others(prompts):
    model, calls = random_model(), []
    options = {"max_new_tokens": NEW_TOKENS, "timed": 1, "per_layer": True}
    found = calibrate(model, prompts, Targets(0.9), SINGLE, advance=lambda: calls.append(None), **options)
    assert found.learnt == found.as_dict()["learnt"] == 4
    assert 0 < len(calls) <= steps(len(prompts), len(SINGLE), 1, LAYERS - 1)
    rules = [point.threshold for point in found.points]
    assert set(SINGLE) < set(rules) and any(isinstance(rule, tuple) for rule in rules)
    full = model.generate(prompts[::2], mode="full", max_new_tokens=NEW_TOKENS)
    for point in found.points:
        again = [
            model.generate(prompt, threshold=point.threshold, max_new_tokens=NEW_TOKENS).tokens
            for prompt in prompts[::2]
        ]
        assert point.answers == 4
        assert point.different == sum(a != b.tokens for a, b in zip(again, full, strict=True))
    others = [random_prompt(6, seed=100 + number) for number in range(4)]
    mixed = [prompt for pair in zip(others, prompts[1::2], strict=True) for prompt in pair]
    again = calibrate(model, mixed, Targets(0.9), SINGLE, **options)
    assert [point.threshold for point in again.points] == rules, "the measured prompts have no say in these"


def test_copies_of_what_was_learnt_from_are_not_measured_on():
    assert split(["a", "b", "b", "c", "d"], True) == (range(1, 5, 2), [0, 4])
    assert split(["a", "b", "b"], False) == ((), range(3))
    for few in (["a"], ["a", "a"]):
        with pytest.raises(RiverError, match="1 prompts for thresholds by layer.*accepted: 2 or more"):
            split(few, True)
    with pytest.raises(RiverError, match="58 prompts are too few to promise"):
        calibrate(
            random_model(),
            [random_prompt(4, n) for n in range(116)],
            Targets(guarantee=0.05),
            SINGLE,
            per_layer=True,
        )


def test_where_nothing_can_be_learnt(prompts):
    for options in ({"max_new_tokens": 1}, {"min_layers": LAYERS, "max_new_tokens": 4}):
        with pytest.raises(
            RiverError, match=r"thresholds by layer with min_layers=\d and \d+ decoded tokens"
        ):
            calibrate(random_model(), prompts, Targets(0.9), SINGLE, per_layer=True, **options)
