"""The engine by the CUDA kernels on the emulated GPU: what a request gets does not depend on the others."""

import itertools
import math
import random
from dataclasses import replace
from functools import cache, partial
from os.path import commonprefix

import emulated
import emulated_ops
import pytest
import torch
from emulated import VARIANT
from kv_oracle import assert_same, sequences
from streams import Landing
from tiny_model import MULTIPLIERS, random_model, random_prompt

from river_ext import ops
from river_ext.engine import matmul, offload, prefill
from river_ext.engine.drafting import Drafting
from river_ext.engine.request import KV_STRATEGIES
from river_ext.engine.slots import Slots
from river_ext.model import Model

LAYERS, VOCAB, REQUESTS = 3, 80, 26
BY_LAYER = ([0.8, 0.5, math.inf], [0.5, 1.0, -2], [1.0, 0.6, -2])  # thresholds
BY_THE_KERNELS = (
    "decoder_block", "exit_layer", "dual_layer", "state_similarity", "lm_head", "lm_head_w4", "sample",
    "advance", "draft_advance", "accept", "linear",
)  # fmt: skip


@pytest.fixture
def on_emulated_gpu(monkeypatch, uncaptured):
    """Every launch under one of the schedules, in turns: those of one op do not agree by chance."""
    schedules = itertools.cycle(emulated.EVERY_SCHEDULE.items())
    emulate = emulated.emulate

    def under_one(*arguments, **fields):
        monkeypatch.setattr(emulated, "SCHEDULES", dict([next(schedules)]))
        return emulate(*arguments, **fields)

    monkeypatch.setattr(emulated_ops, "emulate", under_one)
    for name in BY_THE_KERNELS:
        monkeypatch.setattr(ops, name, getattr(emulated_ops, name))


def model():
    return random_model(dtype=torch.bfloat16, num_hidden_layers=LAYERS, **MULTIPLIERS)


def offloading_model(resident):
    """The same, but for where its layers are."""
    whole = model()
    return Model(replace(whole.config, resident_layers=resident), whole.weights, whole.river)


def some_requests(modes):
    generator = random.Random(5)
    for number in range(REQUESTS):
        yield (
            random_prompt(generator.randint(1, 6), number),
            {
                "max_new_tokens": generator.randint(1, 5),
                "mode": generator.choice(modes),
                "threshold": generator.choice([-2, 0.5, 0.6, 0.7, 0.8, math.inf, *BY_LAYER]),
                "min_layers": generator.randint(1, LAYERS),
                "temperature": generator.choice([0.0, 0.0, 1.5]),
                "top_k": generator.choice([0, 0, 5]),
                "seed": generator.randint(-5, 5),
                "stop_tokens": generator.choice([(), tuple(range(0, VOCAB, 7))]),
            },
        )


def facts(output):
    return output.tokens, output.exit_depths, output.similarities, output.finish_reason


def together(requests, slots, control, model=model):
    engine = model().engine(slots=slots, max_len=16, exit_control=control)
    for number, (prompt, options) in enumerate(requests):
        engine.submit(prompt, id=number, **options)
    outputs = {event.id: event.output for event in engine if event.output}
    return [facts(outputs[number]) for number in range(len(requests))]


@cache
def alone(modes):
    """Under host control: each decision is the host's, of one row."""
    return [together([request], 1, "host")[0] for request in some_requests(modes)]


@pytest.mark.skipif(VARIANT == "sanitized", reason="too slow there, where other tests run each kernel")
@pytest.mark.parametrize("control", ["host", "device"])
def test_requests_among_others(on_emulated_gpu, control):
    modes = ("river", "river", "river", "full", "full_w4")
    requests = list(some_requests(modes))
    got = together(requests, 5, control)
    assert got == alone(modes)
    depths = [depth for _, depths, *_ in got for depth in depths]
    assert set(depths) == set(range(LAYERS + 1)), "every depth occurs"


@pytest.mark.skipif(VARIANT == "sanitized", reason="too slow there, where other tests run each kernel")
def test_prompts_that_begin_alike_get_what_they_get_alone(on_emulated_gpu, monkeypatch):
    """They take over whole blocks of products, and nothing that steps wrote: those have other bits."""
    monkeypatch.setattr(prefill, "OpsPrompt", matmul.MatmulPrompt)
    monkeypatch.setattr(matmul.MatmulPrompt, "rows_at_a_time", 4)
    starts, fill = [], Slots.fill
    monkeypatch.setattr(
        Slots, "fill", lambda self, one, cache: (fill(self, one, cache), starts.append(one.start))
    )
    prompt, first, one = random_prompt(6, 1), {"mode": "full", "max_new_tokens": 3}, {"max_new_tokens": 1}
    talk = prompt + together([(prompt, first)], 1, "device")[0][0]
    requests = [(prompt, first), (talk, one), ([*talk, 1], one)]
    expected = [together([request], 1, "device")[0] for request in requests]
    assert not any(starts)
    starts.clear()
    assert together(requests, 1, "device") == expected
    assert starts == [0, 4, 8]


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": (1.0, 1.5, 2.0, 3.0),
    "long_factor": (2.0, 4.0, 6.0, 8.0),
    "attention_factor": 1.3,
    "original_max_position_embeddings": 6,
}
OWN_ARITHMETIC = {
    "partial rotary": {"rotary_dim": 8},
    "query scale": {"query_scaling": (2.0, 2)},
    "windows of some layers": {"sliding_window": 2, "full_attention_layers": (1,)},
    "layers without RoPE": {"nope_layers": (0, 2)},
    "longrope": {"rope_scaling": tuple(LONGROPE.items()), "rotary_dim": 8},
}


@pytest.mark.skipif(VARIANT == "sanitized", reason="too slow there, where other tests run each kernel")
@pytest.mark.parametrize("changes", OWN_ARITHMETIC.values(), ids=OWN_ARITHMETIC)
def test_the_arithmetic_of_a_family(request, changes):
    """The logits of the CPU kernels, from which those of a plain model are far."""

    def outputs(changes):
        model = random_model(dtype=torch.bfloat16, num_hidden_layers=LAYERS, **changes)
        options = {"max_new_tokens": 4, "return_logits": True, "exit_control": "device"}
        return [model.generate(random_prompt(5), mode=mode, **options) for mode in ("full", "full_w4")]

    expected, plain = outputs(changes), outputs({})
    request.getfixturevalue("on_emulated_gpu")
    for got, right, other in zip(outputs(changes), expected, plain, strict=True):
        agreed = len(commonprefix([got.tokens, right.tokens]))  # a tie may go either way
        size, until = right.logits.abs().max(), slice(agreed + 1)
        assert (got.logits - right.logits)[until].abs().max() / size < 0.05
        assert (other.logits - right.logits)[until].abs().max() / size > 0.15


@pytest.mark.skipif(VARIANT == "sanitized", reason="too slow there, where other tests run each kernel")
@pytest.mark.parametrize("slots, control", [(1, "device"), (3, "device"), (2, "host")])
def test_lossless(on_emulated_gpu, slots, control):
    """The tokens of full depth, whatever is drafted."""
    requests = list(some_requests(("full",)))
    drafts = itertools.cycle([1, 2, 3, "auto"])
    lossless = [
        (prompt, options | {"mode": "lossless", "draft_tokens": next(drafts)}) for prompt, options in requests
    ]
    assert together(lossless, slots, control) == alone(("full",))


@pytest.mark.skipif(VARIANT == "sanitized", reason="too slow there, where other tests run each kernel")
@pytest.mark.parametrize("control", ["device", "host"])
def test_quotes(on_emulated_gpu, monkeypatch, control):
    """Beside requests that quote nothing, and alone, as the others end."""
    requests = list(some_requests(("full",)))
    expected, generator, quotes = alone(("full",)), random.Random(1), []

    def quote(drafting, drafts, most):
        if generator.random() < 0.5:
            return []
        quotes.append(most)
        return [generator.randrange(4) for _ in range(most)]

    monkeypatch.setattr(Drafting, "quote", quote)
    lossless = [(prompt, options | {"mode": "lossless"}) for prompt, options in requests]
    assert together(lossless, 2, control) == expected
    assert max(quotes) >= 2


@pytest.mark.skipif(VARIANT == "sanitized", reason="too slow there, where other tests run each kernel")
@pytest.mark.parametrize("late", [False, True], ids=["copies land at once", "copies land late"])
def test_streamed_layers(on_emulated_gpu, monkeypatch, late):
    """Layers come through the two buffers when they are needed, and none is overwritten before it has run."""
    modes = ("river", "river", "river", "full", "full_w4")
    expected = alone(modes)
    requests = [
        (prompt, options | {"mode": "lossless"} if options["mode"] == "full" else options)
        for prompt, options in some_requests(modes)
    ]
    monkeypatch.setattr(offload, "streams", lambda network: True)
    with Landing(monkeypatch, late):
        assert together(requests, 5, "device", partial(offloading_model, 1)) == expected


@pytest.mark.skipif(VARIANT == "sanitized", reason="too slow there, where other tests run each kernel")
@pytest.mark.parametrize("strategy", KV_STRATEGIES[1:])
def test_kv_strategies(on_emulated_gpu, strategy):
    """What is left out of the cache holds NaN, and nobody reads it."""
    thresholds = itertools.cycle([0.6, 0.65, 0.7])
    fixed = {"kv_strategy": strategy, "max_new_tokens": 6, "min_layers": 1, "stop_tokens": ()}
    requests = [
        (prompt, options | fixed | {"threshold": next(thresholds)})
        for prompt, options in itertools.islice(some_requests(["river"]), 4)
    ]
    engine = model().engine(slots=3, max_len=16)
    engine._memory.cache.k.fill_(math.nan)
    engine._memory.cache.v.fill_(math.nan)
    for number, (prompt, options) in enumerate(requests):
        engine.submit(prompt, id=number, **options)
    outputs = {event.id: event.output for event in engine if event.output}
    for number, expected in enumerate(sequences(model(), requests)):
        assert_same(outputs[number], expected, atol=1e-3)  # bfloat16
    assert {depth for output in outputs.values() for depth in output.exit_depths} == {1, 2, 3}
