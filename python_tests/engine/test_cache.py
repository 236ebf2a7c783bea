"""The cache object, and the promise that everything else keeps: each place is written once, and all are."""

import pytest
import torch
from decoding import one_at_a_time
from tiny_model import demo_model, random_model, random_prompt

from river_ext import ops
from river_ext.engine import graph
from river_ext.engine.cache import KVCache
from river_ext.engine.exit_rule import BATCH_POLICIES

LAYERS = random_model().config.num_hidden_layers


def test_shapes_and_views():
    config = random_model().config
    cache = KVCache(config, slots=3, max_len=10, dtype=torch.bfloat16)
    assert cache.k.shape == cache.v.shape == (LAYERS, 3, 2, 10, 16)
    assert cache.k.dtype == torch.bfloat16
    assert (cache.slots, cache.max_len) == (3, 10)
    k, v = cache.layer(2)
    k.fill_(1)
    v.fill_(2)
    assert (cache.k[2] == 1).all() and (cache.v[2] == 2).all()
    assert k.is_contiguous() and v.is_contiguous()


class Ledger:
    """A cache that starts as NaN, and counts how often each (layer, slot, position) is written, by bits."""

    def __init__(self, monkeypatch):
        self.caches = []
        monkeypatch.setattr(graph, "KVCache", self.new_cache)
        for name in ("decoder_block", "exit_layer", "dual_layer"):
            monkeypatch.setattr(ops, name, self.watched(getattr(ops, name)))

    def new_cache(self, *args, **options):
        cache = KVCache(*args, **options)
        cache.k.fill_(float("nan"))
        cache.v.fill_(float("nan"))
        self.caches.append(cache)
        self.writes = torch.zeros(cache.k.shape[:2] + cache.k.shape[3:4], dtype=torch.int64)
        return cache

    def watched(self, function):
        def call(*args, **options):
            cache = self.caches[-1]
            before = [part.view(torch.int32).clone() for part in (cache.k, cache.v)]
            result = function(*args, **options)
            after = [part.view(torch.int32) for part in (cache.k, cache.v)]
            # any dim of any KV head counts; K and V have to agree
            k, v = ((x != y).any(-1).any(2) for x, y in zip(before, after, strict=True))
            assert torch.equal(k, v)
            assert k.any(-1).any(-1).sum() <= 1, "one call writes one layer"
            self.writes += k
            return result

        return call


OPTIONS = {
    "river": {"threshold": 0.8},
    "no exit": {"threshold": float("inf")},
    "full": {"mode": "full"},
    "full_w4": {"mode": "full_w4"},
    "prefill depth:0": {"threshold": -2, "prefill": "depth:0"},
    "prefill depth:2": {"threshold": 0.8, "prefill": "depth:2"},
    "prefill min": {"threshold": 0.5, "prefill": "min"},
    "prefill last": {"threshold": 0.8, "prefill": "last"},
    "each its own": {"threshold": [0.6, float("inf"), -2], "min_layers": [1, 1, 2]},
    "one slot stops early": {"threshold": 0.8, "stop_tokens": list(range(0, 80, 3))},
    **{f"exit depth {d}": {"threshold": -2, "min_layers": d} for d in range(1, LAYERS + 1)},
}


@pytest.mark.parametrize("policy", BATCH_POLICIES)
@pytest.mark.parametrize("control", ["host", "device"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_place_is_written_exactly_once(monkeypatch, uncaptured, options, control, policy):
    ledger, model = Ledger(monkeypatch), random_model()
    model._engines.idle.clear()  # whose cache the ledger does not see
    prompts = [random_prompt(5, 1), random_prompt(1, 2), random_prompt(9, 3)]
    outputs = model.generate(prompts, max_new_tokens=7, exit_control=control, batch_policy=policy, **options)
    assert len(ledger.caches) == 1
    for slot, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        used = len(prompt) + len(output.tokens) - 1  # the last new token is not fed back
        assert (ledger.writes[:, slot, :used] == 1).all()
        assert (ledger.writes[:, slot, used:] == 0).all()
        cache = ledger.caches[0]
        for part in (cache.k, cache.v):
            assert part[:, slot, :, :used].isfinite().all()
            assert part[:, slot, :, used:].isnan().all()


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_the_river_keeps_the_cache_close_to_the_backbone(depth):
    """What makes sharing the cache work: K and V of exit layers point where the backbone's do."""
    model, text = demo_model(), "Question: Ana has 21 coins and buys 12 more. How many coins?\nAnswer: 33"
    layers, tokens = model.config.num_hidden_layers, model.text.encode(text)
    river, backbone = (one_at_a_time(model.network, tokens, to)[1].cache for to in (depth, layers))
    for name in ("k", "v"):
        a, b = (getattr(cache, name)[:, 1].float() for cache in (river, backbone))
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).mean((1, 2)).tolist()
        print(f"exit depth {depth}, {name}, cosine by layer: {' '.join(f'{c:.4f}' for c in cosine)}")
        assert cosine[:depth] == pytest.approx([1.0] * depth)
        # measured at exit depth 0: K 0.944, V 0.875; 0.996 and 0.991 without the outlier channels that the
        # model card explains. The paper: above 0.97, in models a thousand times larger.
        assert min(cosine) > {"k": 0.93, "v": 0.86}[name]


@pytest.mark.parametrize(
    ("prompts", "new_tokens", "slots", "max_len"),
    [(1, 7, 1, 256), (2, 7, 2, 256), (3, 248, 4, 256), (2, 249, 2, 512), (9, 7, 8, 256), (1, 520, 1, 600)],
)
def test_the_cache_is_as_large_as_needed(monkeypatch, prompts, new_tokens, slots, max_len):
    """In powers of two, as the next call is likely to fit such a one; no longer than what the model has."""
    ledger, model = Ledger(monkeypatch), random_model(max_position_embeddings=600)
    model._engines.idle.clear()
    model.generate(
        [random_prompt(9, n) for n in range(prompts)], max_new_tokens=new_tokens, stop_tokens=list(range(80))
    )
    (cache,) = ledger.caches
    assert (cache.slots, cache.max_len) == (slots, max_len)
