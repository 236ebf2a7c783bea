"""Whole steps of the CUDA kernels, queued without a word from the host, against the reference step by step.

Every kernel of three steps, one workspace, dependent launches: what runs before the kernels ahead are done
must not matter, so all schedules give the same bits.
"""

import emulated_ops
import pytest
import torch
from blocks import Block, Shape, assert_close, int32
from emulated import SCHEDULES, VARIANT, Recorder
from tiny_model import random_model, random_prompt

from river_ext import ops, reference

LAYERS, VOCAB, STEPS = 4, 60, 3
PROMPTS = [random_prompt(n, n) for n in (3, 7)]


class Steps:
    """A random network and the state of its rows, as river_ext/engine/graph.py arranges them."""

    def __init__(
        self, shape, slots, thresholds, limit=LAYERS, min_layers=1, remaining=9, filters=None, together=False
    ):
        self.blocks = [Block(shape, torch.bfloat16, seed=seed) for seed in range(LAYERS)]
        g = torch.Generator().manual_seed(7)
        rows, size = len(slots), shape.hidden_size
        self.embed = torch.randn(VOCAB, size, generator=g).bfloat16()
        self.norm = torch.rand(size, generator=g).bfloat16()
        self.head = torch.randn(VOCAB, size, generator=g).bfloat16()
        self.caches = [block.caches() for block in self.blocks]
        self.rule = [torch.tensor(thresholds), int32([min_layers] * rows), int32([limit] * rows)]
        self.together = together
        self.slots, self.positions = int32(slots), int32([3 + 5 * row for row in range(rows)])
        self.draw_positions, self.remaining = self.positions + 1, int32([remaining] * (rows - 1) + [2])
        self.hidden = self.embed[[5 + row for row in range(rows)]].clone()
        self.exited, self.similarities = int32([[0] * rows] * LAYERS), torch.zeros(LAYERS, rows)
        self.step = int32([0])
        self.records = torch.zeros(STEPS, 1 + 2 * rows + LAYERS * rows, dtype=torch.int32)
        self.sampled = {
            "temperature": torch.tensor([0.0 if row % 2 else 0.9 for row in range(rows)]),
            "seeds": torch.arange(rows) + 10,
            "positions": self.draw_positions,
        }
        self.filters = filters and {
            "top_k": int32([filters["top_k"]] * rows),
            "top_p": torch.tensor([filters["top_p"]] * rows),
            "min_p": torch.tensor([filters["min_p"]] * rows),
        }

    def take(self, module):
        previous, hidden = None, self.hidden
        for index, (block, caches) in enumerate(zip(self.blocks, self.caches, strict=True)):
            decision = (index, previous, *self.rule, self.exited, self.similarities)
            following = block.run_dual(
                module, decision, hidden, caches, self.slots, self.positions, together=self.together
            )
            previous, hidden = hidden, following
        tokens = self.draw(module, hidden)
        stop_tokens = torch.full((len(self.slots), 1), -1)
        module.advance(
            previous, hidden, tokens, self.embed, stop_tokens, self.hidden, self.slots, self.positions,
            self.draw_positions, self.remaining, self.exited, self.similarities, self.step, self.records,
        )  # fmt: skip

    def draw(self, module, hidden):
        head = (hidden, self.norm, self.head, 1e-5)
        if not self.filters:
            return module.lm_head(*head, return_logits=False, **self.sampled)[0]
        _, logits, _ = module.lm_head(*head, return_logits=True)
        return module.sample(logits, **self.sampled, **self.filters)[0]

    def state(self):
        caches = {
            f"{name}{layer}": cache
            for layer, pair in enumerate(self.caches)
            for name, cache in zip("kv", pair, strict=True)
        }
        names = ("hidden", "slots", "positions", "draw_positions", "remaining", "exited", "step", "records")
        return caches | {name: getattr(self, name) for name in names}


FILTERS = {"top_k": 20, "top_p": 0.9, "min_p": 0.02}
CASES = {
    "each token its depth": {"thresholds": 0.86},
    "a stricter row": {"thresholds": 0.75, "last": 0.9},
    "a stricter row, together": {"thresholds": 0.75, "last": 0.9, "together": True},
    "one row each": {"thresholds": -2.0, "last": float("inf")},
    "full depth": {"thresholds": float("inf")},
    "pure river": {"thresholds": float("inf"), "limit": 0},
    "limit": {"thresholds": float("inf"), "limit": 2},
    "at once": {"thresholds": -2.0},
    "after three": {"thresholds": -2.0, "min_layers": 3},
    "filters": {"thresholds": 0.86, "filters": FILTERS},
}

if VARIANT == "sanitized":  # it looks for overruns, which no threshold hides
    CASES = {name: CASES[name] for name in ("each token its depth", "one row each", "limit", "filters")}
SHAPES = {"gqa": Shape(), "qk norm": Shape(qk_norm=True, hidden_size=192, intermediate_size=200)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("slots", [[4], [0, -1, 6]], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps(monkeypatch, shape, slots, case):
    shape, options = SHAPES[shape], dict(CASES[case])
    thresholds = [options.pop("thresholds")] * len(slots)
    thresholds[-1] = options.pop("last", thresholds[-1])
    expected = Steps(shape, slots, thresholds, **options)
    for _ in range(STEPS):
        expected.take(reference)
    expected = expected.state()
    first = None
    for name, schedule in SCHEDULES.items():
        steps, recorder = Steps(shape, slots, thresholds, **options), Recorder()
        monkeypatch.setattr(emulated_ops, "emulate", recorder)
        for _ in range(STEPS):
            steps.take(emulated_ops)
        recorder.run(schedule)
        state = steps.state()
        first = first or state
        for what, tensor in state.items():
            assert torch.equal(tensor, first[what]), f"{what} differs under {name}"
    head = 1 + 2 * len(slots)
    assert torch.equal(first["records"][:, :head], expected["records"][:, :head])
    for what in ("slots", "positions", "draw_positions", "remaining", "exited", "step", "hidden"):
        assert torch.equal(first[what], expected[what]), what
    for what in first:
        if what[0] in "kv":
            assert_close(first[what], expected[what], torch.bfloat16, what)


@pytest.mark.parametrize("control", ["host", "device"])
@pytest.mark.parametrize(
    "sampled",
    [{}, {"river_head": "w4"}, {"temperature": 1.0, **FILTERS}],
    ids=["greedy", "head of the river", "filters"],
)
def test_generation_by_the_cuda_kernels(monkeypatch, uncaptured, control, sampled):
    """The whole engine on the emulated GPU: the tokens and depths that the CPU kernels give."""
    model = random_model(dtype=torch.bfloat16)
    options = {"threshold": 0.7, "max_new_tokens": 6, "exit_control": control, **sampled}
    expected = model.generate(PROMPTS, **options)
    layers = ("decoder_block", "exit_layer", "dual_layer", "state_similarity")
    for name in (*layers, "lm_head", "lm_head_w4", "sample", "advance"):
        monkeypatch.setattr(ops, name, getattr(emulated_ops, name))
    got = model.generate(PROMPTS, **options)
    assert [(o.tokens, o.exit_depths) for o in got] == [(o.tokens, o.exit_depths) for o in expected]
    assert len({depth for o in got for depth in o.exit_depths}) > 1
