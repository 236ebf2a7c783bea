"""A prompt through matrix products: the same numbers as through the ops, in bounded memory."""

import pytest
import torch
from decoding import asked
from test_prefill import LAYERS, SHAPES, prefilled
from tiny_model import demo_model, random_model, random_prompt

from river_ext.engine import matmul, prefill
from river_ext.engine.cache import KVCache


@pytest.fixture
def by_matmul(monkeypatch):
    """prefilled(...) through matrix products."""

    def call(*args):
        with monkeypatch.context() as patch:
            patch.setattr(prefill, "OpsPrompt", matmul.MatmulPrompt)
            return prefilled(*args)

    return call


def difference(a, b):
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


def differences(many, by_ops):
    (new, cache), (expected, expected_cache) = many, by_ops
    assert new.exit_depth == expected.exit_depth
    assert new.similarities == pytest.approx(expected.similarities, abs=1e-2)
    pairs = [(new.logits, expected.logits)]
    pairs += [(getattr(cache, name)[:, 1], getattr(expected_cache, name)[:, 1]) for name in ("k", "v")]
    return [difference(*pair) for pair in pairs]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("depth", [0, 2, LAYERS])
def test_equals_the_ops(by_matmul, shape, depth):
    args = (random_model(**shape).network, random_prompt(21), f"depth:{depth}")
    many, by_ops = by_matmul(*args), prefilled(*args)
    assert max(differences(many, by_ops)) < 1e-5
    assert many[0].token == by_ops[0].token


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.04), (torch.float16, 0.005)])
@pytest.mark.parametrize("depth", [0, LAYERS])
def test_equals_the_ops_in_16_bits(by_matmul, dtype, tolerance, depth):
    """A sum in another order may round differently, and what rounds differently spreads."""
    args = (random_model(dtype=dtype).network, random_prompt(21), f"depth:{depth}")
    many, by_ops = by_matmul(*args), prefilled(*args)
    assert max(differences(many, by_ops)) < tolerance
    # the first layer's K and V come from the same rounded values
    equal = (many[1].k[0, 1] == by_ops[1].k[0, 1]).float().mean()
    assert equal > 0.99


@pytest.mark.parametrize("policy", ["full", "depth:4", "min", "last"])
def test_demo_model(by_matmul, policy):
    network = demo_model().network
    prompt = demo_model().text.encode("Question: Ana has 21 coins and buys 12 more. How many coins?\nAnswer:")
    many, by_ops = by_matmul(network, prompt, policy), prefilled(network, prompt, policy)
    assert max(differences(many, by_ops)) < 0.04


def test_dynamic_scaling(by_matmul):
    scaling = (("rope_type", "dynamic"), ("factor", 4.0))
    args = (random_model(rope_scaling=scaling, max_position_embeddings=16).network, random_prompt(40))
    assert max(differences(by_matmul(*args), prefilled(*args))) < 1e-5


@pytest.mark.parametrize("sliding_window", [None, 5])
@pytest.mark.parametrize("rows", [7, 16])
def test_blocks_of_rows_change_nothing(monkeypatch, by_matmul, sliding_window, rows):
    args = (random_model(sliding_window=sliding_window).network, random_prompt(40))
    monkeypatch.setattr(matmul.MatmulPrompt, "rows_at_a_time", rows)
    monkeypatch.setattr(matmul, "SCORES_AT_A_TIME", 4 * 40 * 3)
    assert max(differences(by_matmul(*args), prefilled(*args))) < 1e-5


def test_attention_memory_is_bounded(monkeypatch, by_matmul):
    largest = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: largest.append(x.numel()) or softmax(x, dim=dim))
    monkeypatch.setattr(matmul, "SCORES_AT_A_TIME", 1000)
    by_matmul(random_model().network, random_prompt(60))
    assert largest and max(largest) <= 1000


def test_it_writes_its_slot_only(by_matmul):
    network = random_model().network
    cache = KVCache(network.config, 3, 8, network.dtype)
    for part in (cache.k, cache.v):
        part.fill_(float("nan"))
    prompt = matmul.MatmulPrompt(network, cache, slot=1, start=0, length=5)
    prompt.exit_layer(2)(0, prompt.decoder_block(0)(0, network.embed(torch.arange(5))))
    for part in (cache.k, cache.v):
        assert part[[0, 2], 1, :, :5].isfinite().all()
        part[[0, 2], 1, :, :5] = float("nan")
        assert part.isnan().all()


@pytest.mark.parametrize("policy", ["full", "depth:0", "depth:3"])
def test_positions_that_are_there_are_not_computed(monkeypatch, policy):
    """In blocks of rows as well: attention sees what was there, what an earlier block wrote, and itself."""
    network, prompt, start = random_model().network, random_prompt(40), 11
    expected, cache = prefilled(network, prompt, policy)
    again = KVCache(network.config, 2, len(prompt), network.dtype)
    for part in ("k", "v"):
        getattr(again, part).fill_(float("nan"))
        getattr(again, part)[:, 1, :, :start] = getattr(cache, part)[:, 1, :, :start]
    monkeypatch.setattr(matmul.MatmulPrompt, "rows_at_a_time", 7)
    monkeypatch.setattr(prefill, "OpsPrompt", matmul.MatmulPrompt)
    request = asked(network, prompt, prefill=policy, return_logits=True)
    new = prefill.Prefill(network, again, 1, request, start).advance()
    assert max(differences((new, again), (expected, cache))) < 1e-5
