"""Prefill: the same numbers as feeding tokens one at a time, its depth policies, long prompts in chunks."""

import math

import pytest
import torch
from tiny_model import demo_model, random_model, random_prompt

from river_ext import ops, prefill
from river_ext.cache import KVCache
from river_ext.errors import RiverError
from river_ext.exit import ExitRule
from river_ext.prefill import PrefillPolicy
from river_ext.sampling import Sampling
from river_ext.step import Rows, decode_step

GREEDY, LAYERS = Sampling(), 4


def prefilled(network, prompt, policy="full", threshold=0.5, min_layers=1):
    cache = KVCache(network.config, 2, len(prompt), network.dtype)
    rule = ExitRule.of([threshold], [min_layers], network.config.num_hidden_layers)
    policy = PrefillPolicy.parse(policy, network.config.num_hidden_layers)
    step = prefill.prefill(network, cache, 1, prompt, rule, policy, GREEDY, return_logits=True)
    return step, cache


def one_at_a_time(network, prompt, depth):
    cache = KVCache(network.config, 2, len(prompt), network.dtype)
    rule = ExitRule.of([math.inf], [1], limit=depth)
    for position, token in enumerate(prompt):
        rows = Rows.of([token], [1], [position], [0], rule, cache)
        step = decode_step(network, cache, rows, GREEDY, return_logits=True)
    return step, cache


def difference(a, b):
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


SHAPES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "biases": {"biases": True},
    "q and k norms": {"qk_norm": True},
    "partial rotary": {"rotary_dim": 8},
    "sliding window": {"sliding_window": 5},
    "odd sizes": {"intermediate_size": 77, "vocab_size": 81, "head_dim": 20, "rotary_dim": 20},
    "linear scaling": {"rope_scaling": (("rope_type", "linear"), ("factor", 4.0))},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("depth", [0, 2, LAYERS])
def test_prefill_equals_one_token_at_a_time(shape, depth):
    network, prompt = random_model(**shape).network, random_prompt(13)
    many, cache = prefilled(network, prompt, f"depth:{depth}")
    single, expected = one_at_a_time(network, prompt, depth)
    assert many.exit_depths == single.exit_depths == [depth]
    assert difference(many.logits, single.logits) < 1e-5
    assert difference(cache.k[:, 1], expected.k[:, 1]) < 1e-5
    assert difference(cache.v[:, 1], expected.v[:, 1]) < 1e-5
    assert many.similarities[0] == pytest.approx(single.similarities[0], abs=1e-5)
    assert torch.equal(many.tokens, single.tokens)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.04), (torch.float16, 0.005)])
@pytest.mark.parametrize("depth", [0, LAYERS])
def test_prefill_equals_one_token_at_a_time_in_16_bits(dtype, tolerance, depth):
    """A sum in another order may round differently, and what rounds differently spreads."""
    network, prompt = random_model(dtype=dtype).network, random_prompt(13)
    many, cache = prefilled(network, prompt, f"depth:{depth}")
    single, expected = one_at_a_time(network, prompt, depth)
    assert difference(many.logits, single.logits) < tolerance
    assert difference(cache.k[:, 1], expected.k[:, 1]) < tolerance
    # the first layer's K and V come from the same rounded values
    equal = (cache.k[0, 1] == expected.k[0, 1]).float().mean()
    assert equal > 0.99


def test_demo_model_prefill_equals_one_token_at_a_time():
    network = demo_model().network
    prompt = demo_model().text.encode("Question: Ana has 21 coins and buys 12 more. How many coins?\nAnswer:")
    many, _ = prefilled(network, prompt)
    single, _ = one_at_a_time(network, prompt, 16)
    assert torch.equal(many.tokens, single.tokens)
    assert difference(many.logits, single.logits) < 0.04


def test_dynamic_scaling_gives_a_long_prompt_the_angles_of_its_length():
    scaling = (("rope_type", "dynamic"), ("factor", 4.0))
    network = random_model(rope_scaling=scaling, max_position_embeddings=16).network
    assert network.config.max_length == 64
    for length in (16, 17, 40):
        cos, _ = network.prompt_rope(length)
        same_as_decoding = torch.equal(cos[:length], network.rope(64)[0][:length])
        assert same_as_decoding == (length <= 16)
    short, _ = prefilled(network, random_prompt(16))
    assert difference(short.logits, one_at_a_time(network, random_prompt(16), LAYERS)[0].logits) < 1e-5


@pytest.mark.parametrize("sliding_window", [None, 5])
def test_chunks_change_nothing(monkeypatch, sliding_window):
    network, prompt = random_model(sliding_window=sliding_window).network, random_prompt(40)
    whole, cache = prefilled(network, prompt)
    monkeypatch.setattr(prefill, "CHUNK_ROWS", 7)
    monkeypatch.setattr(prefill, "CHUNK_SCORES", 4 * 40 * 3)
    parts, cache_of_parts = prefilled(network, prompt)
    assert difference(parts.logits, whole.logits) < 1e-5
    assert difference(cache_of_parts.k[:, 1], cache.k[:, 1]) < 1e-5


def test_attention_memory_is_bounded(monkeypatch):
    largest = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: largest.append(x.numel()) or softmax(x, dim=dim))
    monkeypatch.setattr(prefill, "CHUNK_SCORES", 1000)
    prefilled(random_model().network, random_prompt(60))
    assert largest and max(largest) <= 1000


def test_prefill_writes_its_slot_only():
    _, cache = prefilled(random_model().network, random_prompt(6))
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    network = random_model().network
    rule = ExitRule.of([-2], [1], LAYERS)
    prefill.prefill(network, cache, 1, random_prompt(4), rule, PrefillPolicy(LAYERS, "min"), GREEDY)
    for part in (cache.k, cache.v):
        assert part[:, 0].isnan().all()
        assert part[:, 1, :, :4].isfinite().all()
        assert part[:, 1, :, 4:].isnan().all()


def similarities_of_all_tokens(network, prompt):
    """[layers][tokens], by feeding one token at a time through the backbone."""
    cache = KVCache(network.config, 1, len(prompt), network.dtype)
    rule = ExitRule.of([math.inf], [1], LAYERS)
    steps = [
        decode_step(network, cache, Rows.of([token], [0], [p], [0], rule, cache), GREEDY)
        for p, token in enumerate(prompt)
    ]
    return list(zip(*(step.similarities[0] for step in steps), strict=True))


@pytest.mark.parametrize("policy", ["min", "last"])
@pytest.mark.parametrize("min_layers", [1, 2])
def test_policies_apply_the_rule_to_the_prompt(policy, min_layers):
    network, prompt = random_model().network, random_prompt(9)
    by_layer = similarities_of_all_tokens(network, prompt)
    judged = [min(s) if policy == "min" else s[-1] for s in by_layer]
    for threshold in [-2.0, math.inf, *(s - 1e-4 for s in judged), *(s + 1e-4 for s in judged)]:
        step, _ = prefilled(network, prompt, policy, threshold, min_layers)
        met = [d for d, s in enumerate(judged, start=1) if s > threshold and d >= min_layers]
        assert step.exit_depths == [met[0] if met else LAYERS]
        assert len(step.similarities[0]) == step.exit_depths[0]


def test_fixed_depth_ignores_the_rule():
    network, prompt = random_model().network, random_prompt(9)
    for depth in range(LAYERS + 1):
        for threshold in (-2, math.inf):
            assert prefilled(network, prompt, f"depth:{depth}", threshold)[0].exit_depths == [depth]
    assert prefilled(network, prompt, "full", -2)[0].exit_depths == [LAYERS]


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
