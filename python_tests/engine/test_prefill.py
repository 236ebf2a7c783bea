"""Prefill: the same bits as feeding tokens one at a time, and its depth policies."""

import math

import pytest
import torch
from decoding import asked, one_at_a_time
from tiny_model import MULTIPLIERS, demo_model, random_model, random_prompt

from river_ext import ops, progress
from river_ext.engine import prefill
from river_ext.engine.cache import KVCache
from river_ext.engine.exit_rule import PrefillPolicy
from river_ext.errors import RiverError

LAYERS = 4


def prefilled(network, prompt, policy="full", threshold=0.5, min_layers=1):
    """The first new token, and the cache."""
    cache = KVCache(network.config, 2, len(prompt), network.dtype)
    request = asked(
        network, prompt, prefill=policy, threshold=threshold, min_layers=min_layers, return_logits=True
    )
    return prefill.Prefill(network, cache, 1, request).advance(), cache


SHAPES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "biases": {"biases": True},
    "q and k norms": {"qk_norm": True},
    "partial rotary": {"rotary_dim": 8},
    "sliding window": {"sliding_window": 5},
    "multipliers": MULTIPLIERS,
    "layers of their own": {"sliding_window": 5, "full_attention_layers": (0, 2), "nope_layers": (1, 2)},
    "query scale": {"query_scaling": (0.5, 4)},
    "odd sizes": {"intermediate_size": 77, "vocab_size": 81, "head_dim": 20, "rotary_dim": 20},
    "linear scaling": {"rope_scaling": (("rope_type", "linear"), ("factor", 4.0))},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("depth", [0, 2, LAYERS])
def test_prefill_equals_one_token_at_a_time(shape, depth):
    network, prompt = random_model(**shape).network, random_prompt(21)
    assert_same_bits(network, prompt, depth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("length", [1, 8, 9, 40])
def test_prefill_equals_one_token_at_a_time_in_16_bits(dtype, depth, length):
    assert_same_bits(random_model(dtype=dtype).network, random_prompt(length), depth)


def test_demo_model_prefill_equals_one_token_at_a_time():
    prompt = demo_model().text.encode("Question: Ana has 21 coins and buys 12 more. How many coins?\nAnswer:")
    assert_same_bits(demo_model().network, prompt, demo_model().config.num_hidden_layers)


def assert_same_bits(network, prompt, depth):
    many, cache = prefilled(network, prompt, f"depth:{depth}")
    (*_, single), memory = one_at_a_time(network, prompt, depth)
    assert many.exit_depth == single.exit_depth == depth
    assert many.similarities == single.similarities
    assert many.token == single.token
    assert torch.equal(many.logits, single.logits)
    assert torch.equal(cache.k[:, 1], memory.cache.k[:, 1])
    assert torch.equal(cache.v[:, 1], memory.cache.v[:, 1])


def test_dynamic_scaling_gives_a_long_prompt_the_angles_of_its_length():
    scaling = (("rope_type", "dynamic"), ("factor", 4.0))
    network = random_model(rope_scaling=scaling, max_position_embeddings=16).network
    assert network.config.max_length == 64
    for length in (16, 17, 40):
        cos = network.prompt_rope(length, 64).cos
        assert torch.equal(cos[:length], network.rope(64)[0][:length]) == (length <= 16)
    assert_same_bits(network, random_prompt(16), LAYERS)
    long, _ = prefilled(network, random_prompt(40))
    (*_, single), _ = one_at_a_time(network, random_prompt(40), LAYERS)
    assert not torch.allclose(long.logits, single.logits, atol=1e-3)


def test_prefill_writes_its_slot_only():
    _, cache = prefilled(random_model().network, random_prompt(6))
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    network = random_model().network
    request = asked(network, random_prompt(4), threshold=-2, prefill="min")
    prefill.Prefill(network, cache, 1, request).advance()
    for part in (cache.k, cache.v):
        assert part[:, 0].isnan().all()
        assert part[:, 1, :, :4].isfinite().all()
        assert part[:, 1, :, 4:].isnan().all()


def similarities_of_all_tokens(network, prompt):
    """[layers][tokens], by feeding one token at a time through the backbone."""
    news, _ = one_at_a_time(network, prompt, LAYERS)
    return list(zip(*(new.similarities for new in news), strict=True))


@pytest.mark.parametrize("policy", ["min", "last"])
@pytest.mark.parametrize("min_layers", [1, 2])
def test_policies_apply_the_rule_to_the_prompt(policy, min_layers):
    network, prompt = random_model().network, random_prompt(9)
    by_layer = similarities_of_all_tokens(network, prompt)
    judged = [min(s) if policy == "min" else s[-1] for s in by_layer]
    for threshold in [-2.0, math.inf, *(s - 1e-4 for s in judged), *(s + 1e-4 for s in judged)]:
        new, _ = prefilled(network, prompt, policy, threshold, min_layers)
        met = [d for d, s in enumerate(judged, start=1) if s > threshold and d >= min_layers]
        assert new.exit_depth == (met[0] if met else LAYERS)
        assert len(new.similarities) == new.exit_depth


def test_fixed_depth_ignores_the_rule():
    network, prompt = random_model().network, random_prompt(9)
    for depth in range(LAYERS + 1):
        for threshold in (-2, math.inf):
            assert prefilled(network, prompt, f"depth:{depth}", threshold)[0].exit_depth == depth
    assert prefilled(network, prompt, "full", -2)[0].exit_depth == LAYERS


def test_depth_l_is_full():
    network, prompt = random_model().network, random_prompt(9)
    a, b = prefilled(network, prompt, "full")[0], prefilled(network, prompt, f"depth:{LAYERS}")[0]
    assert torch.equal(a.logits, b.logits)


@pytest.mark.parametrize(
    "text", ["", "Full", "depth", "depth:", "depth:5", "depth:-1", "depth:1.5", "depth:²", "min:2", None, 3]
)
def test_other_policies_are_refused(text):
    with pytest.raises(RiverError, match="accepted: 'full', 'depth:k', 'min' or 'last' with k from 0 to 4"):
        PrefillPolicy.parse(text, LAYERS)


def test_only_the_last_token_goes_through_the_head(monkeypatch):
    rows = []
    lm_head = ops.lm_head
    monkeypatch.setattr(
        ops, "lm_head", lambda hidden, *a, **k: rows.append(len(hidden)) or lm_head(hidden, *a, **k)
    )
    prefilled(random_model().network, random_prompt(20))
    assert rows == [1]


# --- a part of the work -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"prefill": "depth:2"}, {"prefill": "min", "threshold": 0.5}], ids=str
)
@pytest.mark.parametrize("rows", [0.01, 2.5, 8, 30])
def test_pieces_give_what_a_whole_prefill_gives(options, rows, monkeypatch):
    monkeypatch.setattr(prefill.OpsPrompt, "rows_at_a_time", 8)
    network, prompt = random_model().network, random_prompt(21)
    request = asked(network, prompt, return_logits=True, **options)
    caches = [KVCache(network.config, 2, len(prompt), network.dtype) for _ in range(2)]
    whole, pieces = (prefill.Prefill(network, cache, 1, request) for cache in caches)
    expected, times = whole.advance(), 1
    while (new := pieces.advance(rows)) is None:
        times += 1
    assert new[:3] == expected[:3] and torch.equal(new.logits, expected.logits)
    for part in ("k", "v"):
        a, b = (getattr(cache, part)[:, 1] for cache in caches)
        assert torch.equal(a, b)
    blocks = LAYERS * math.ceil(len(prompt) / 8)  # which are not cut
    assert times == {0.01: blocks, 30: 1}.get(rows, times) and (times > 1) == (rows < len(prompt))


@pytest.mark.parametrize("policy", ["full", "depth:0", "depth:3"])
@pytest.mark.parametrize("start", [1, 8, 13, 20])
def test_positions_that_are_there_are_not_computed(monkeypatch, policy, start):
    network, prompt = random_model().network, random_prompt(21)
    expected, cache = prefilled(network, prompt, policy)
    again = KVCache(network.config, 2, len(prompt), network.dtype)
    for part in ("k", "v"):
        getattr(again, part).fill_(float("nan"))
        getattr(again, part)[:, 1, :, :start] = getattr(cache, part)[:, 1, :, :start]
    seen = []
    for name in ("decoder_block", "exit_layer"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda op=op, **a: seen.extend(a["positions"].tolist()) or op(**a))
    request = asked(network, prompt, prefill=policy, return_logits=True)
    new = prefill.Prefill(network, again, 1, request, start).advance()
    assert sorted(seen) == sorted(list(range(start, len(prompt))) * LAYERS)
    assert new[:3] == expected[:3] and torch.equal(new.logits, expected.logits)
    for part in ("k", "v"):
        assert torch.equal(getattr(again, part)[:, 1], getattr(cache, part)[:, 1])


def test_a_long_prompt_shows_how_far_it_is(monkeypatch, capsys):
    """Every piece of work counts once; elsewhere than on a terminal in plain lines."""
    monkeypatch.setattr(prefill.OpsPrompt, "rows_at_a_time", 8)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    model = random_model()
    model.generate(random_prompt(20), max_new_tokens=2, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"prompt: {done} of {3 * LAYERS}" for done in range(1, 3 * LAYERS + 1)]
    model.generate(random_prompt(20), max_new_tokens=2)
    list(model.stream(random_prompt(20), max_new_tokens=2))
    assert capsys.readouterr().err == ""
