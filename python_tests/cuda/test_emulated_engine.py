"""The engine by the CUDA kernels on the emulated GPU: what a request gets does not depend on the others."""

import itertools
import math
import random
from functools import cache

import emulated
import emulated_ops
import pytest
import torch
from emulated import VARIANT
from tiny_model import MULTIPLIERS, random_model, random_prompt

from river_ext import ops

LAYERS, VOCAB, REQUESTS = 3, 80, 26
BY_THE_KERNELS = (
    "decoder_block", "exit_layer", "dual_layer", "state_similarity", "lm_head", "lm_head_w4", "sample",
    "advance", "draft_advance", "accept",
)  # fmt: skip


@pytest.fixture
def on_emulated_gpu(monkeypatch):
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


def some_requests(modes):
    generator = random.Random(5)
    for number in range(REQUESTS):
        yield (
            random_prompt(generator.randint(1, 6), number),
            {
                "max_new_tokens": generator.randint(1, 5),
                "mode": generator.choice(modes),
                "threshold": generator.choice([-2, 0.5, 0.6, 0.7, 0.8, math.inf]),
                "min_layers": generator.randint(1, LAYERS),
                "temperature": generator.choice([0.0, 0.0, 1.5]),
                "top_k": generator.choice([0, 0, 5]),
                "seed": generator.randint(-5, 5),
                "stop_tokens": generator.choice([(), tuple(range(0, VOCAB, 7))]),
            },
        )


def facts(output):
    return output.tokens, output.exit_depths, output.similarities, output.finish_reason


def together(requests, slots, control):
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
@pytest.mark.parametrize("slots", [1, 3])
def test_lossless(on_emulated_gpu, slots):
    """The tokens of full depth, whatever is drafted."""
    requests = list(some_requests(("full",)))
    drafts = itertools.cycle([1, 2, 3, "auto"])
    lossless = [
        (prompt, options | {"mode": "lossless", "draft_tokens": next(drafts)}) for prompt, options in requests
    ]
    assert together(lossless, slots, "device") == alone(("full",))
