"""One decoding step: rows, inactive rows, batch invariance, and what is refused."""

import pytest
import torch
from tiny_model import random_model, random_prompt

from river_ext.engine.cache import KVCache
from river_ext.engine.exit_rule import ExitRule
from river_ext.engine.prefill import PrefillPolicy, prefill
from river_ext.engine.sampling import Sampling
from river_ext.engine.step import Rows, decode_step
from river_ext.errors import RiverError

GREEDY, LAYERS = Sampling(), 4
PROMPTS = [random_prompt(n, n) for n in (3, 7, 5)]


def filled_cache(network, slots=3, max_len=16):
    cache = KVCache(network.config, slots, max_len, network.dtype)
    for part in (cache.k, cache.v):
        part.fill_(float("nan"))
    for slot, prompt in enumerate(PROMPTS[:slots]):
        rule = ExitRule.of([0.5], [1], limit=LAYERS)
        prefill(network, cache, slot, prompt, rule, PrefillPolicy(LAYERS), GREEDY)
    return cache


def rows_of(cache, slots, rule, tokens=(11, 22, 33)):
    positions = [len(PROMPTS[slot]) if slot >= 0 else 0 for slot in slots]
    return Rows.of([tokens[slot] for slot in slots], slots, positions, [0] * len(slots), rule, cache)


def rule_of(rows, threshold=float("inf"), min_layers=1, limit=LAYERS):
    return ExitRule.of([threshold] * rows, [min_layers] * rows, limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [0, 1, 3, 4])
def test_a_row_is_the_same_in_any_batch(dtype, depth):
    network = random_model(dtype=dtype).network
    start = filled_cache(network)

    def run(slots):
        cache = KVCache(network.config, 3, 16, dtype)
        cache.k.copy_(start.k)
        cache.v.copy_(start.v)
        rule = rule_of(len(slots), -2, max(depth, 1), limit=0 if depth == 0 else LAYERS)
        step = decode_step(network, cache, rows_of(cache, slots, rule), GREEDY, return_logits=True)
        assert step.exit_depths == [depth] * len(slots)
        return {
            s: (step.logits[i], step.similarities[i], cache.k[:, s], cache.v[:, s])
            for i, s in enumerate(slots)
            if s >= 0
        }

    alone = {slot: run([slot])[slot] for slot in range(3)}
    for slots in ([0, 1, 2], [2, 0], [-1, 1, -1], [1, -1, 2, -1, 0], [-1] * 7 + [2]):
        for slot, (logits, similarities, k, v) in run(slots).items():
            assert torch.equal(logits, alone[slot][0])
            assert similarities == alone[slot][1]
            assert torch.equal(k.view(torch.uint8), alone[slot][2].view(torch.uint8))
            assert torch.equal(v.view(torch.uint8), alone[slot][3].view(torch.uint8))


def test_inactive_rows_write_nothing_and_decide_nothing():
    network = random_model().network
    cache = filled_cache(network)
    before = cache.k.clone()
    rule = ExitRule.of([-2.0, float("inf"), -2.0], [1, 1, 1], LAYERS)
    step = decode_step(network, cache, rows_of(cache, [0, -1, 2], rule), GREEDY)
    assert step.exit_depths == [1, 1, 1], "the inactive row's threshold does not count"
    assert torch.equal(cache.k[:, 1].isnan(), before[:, 1].isnan())
    assert torch.equal(cache.k[:, 1].nan_to_num(), before[:, 1].nan_to_num())


def test_rows_of_one_sequence_in_one_step_equal_one_after_the_other():
    """All rows' K and V are written before any row attends: three tokens of a slot in one step."""
    network, tokens = random_model().network, [11, 22, 33]
    together, apart = filled_cache(network, 1), filled_cache(network, 1)
    start = len(PROMPTS[0])
    rows = Rows.of(tokens, [0] * 3, [start, start + 1, start + 2], [0] * 3, rule_of(3), together)
    step = decode_step(network, together, rows, GREEDY, return_logits=True)
    for i, token in enumerate(tokens):
        rows = Rows.of([token], [0], [start + i], [0], rule_of(1), apart)
        single = decode_step(network, apart, rows, GREEDY, return_logits=True)
        assert torch.equal(single.logits[0], step.logits[i])
    assert torch.equal(together.k.nan_to_num(), apart.k.nan_to_num())


def test_advance_and_keep():
    network = random_model().network
    cache = filled_cache(network)
    rows = rows_of(cache, [0, 1, 2], rule_of(3))
    later = rows.advance(torch.tensor([7, 8, 9])).keep([2, 0])
    assert later.tokens.tolist() == [9, 7]
    assert later.slots.tolist() == [2, 0]
    assert later.positions.tolist() == [len(PROMPTS[2]) + 1, len(PROMPTS[0]) + 1]
    assert later.positions.dtype == later.slots.dtype == torch.int32
    assert rows.positions.tolist() == [len(p) for p in PROMPTS]


@pytest.mark.parametrize(
    ("slots", "positions", "message"),
    [
        ([0, 0], [3, 3], "same slot and position"),
        ([3], [0], "slot 3"),
        ([0], [16], "position 16"),
        ([0], [-1], "position -1"),
        ([], [], "0 rows"),
        ([0] * 9, list(range(9)), "9 rows"),
    ],
)
def test_rows_outside_the_cache_are_refused(slots, positions, message):
    cache = KVCache(random_model().config, 3, 16, torch.float32)
    with pytest.raises(RiverError, match=message):
        Rows.of([1] * len(slots), slots, positions, [0] * len(slots), rule_of(len(slots)), cache)


def test_two_inactive_rows_are_no_duplicates():
    cache = KVCache(random_model().config, 3, 16, torch.float32)
    assert Rows.of([1] * 2, [-1, -1], [0, 0], [0, 0], rule_of(2), cache).rule.active == (False, False)
