"""dual_layer against the reference: which path runs, what it writes; a path is the op of its name."""

import pytest
import torch
from blocks import DTYPES, SHAPES, Block, assert_close, int32

from river_ext import ops, reference

LAYERS = 4
NEVER, ALWAYS = float("inf"), -2.0


def weights_of(block):
    norm1, norm2 = block.norms
    d, p = block.dense, block.packed
    dense = [d[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    rest = [d[name] for name in ("gate_proj", "up_proj", "down_proj")]
    return [norm1, *dense, norm2, *rest, p.qkv_proj, p.o_proj, p.gate_up_proj, p.down_proj]


class Decision:
    """The tensors that a decision reads and writes."""

    def __init__(self, rows, thresholds=NEVER, min_layers=1, limit=LAYERS, exited=(0,) * LAYERS):
        self.thresholds = torch.full((rows,), thresholds) if isinstance(thresholds, float) else thresholds
        self.min_layers = int32([min_layers] * rows)
        self.limit = int32([limit])
        self.exited = int32(list(exited))
        self.similarities = torch.full((LAYERS, rows), float("nan"))


def run(module, block, index, hidden, previous, decision, caches, slots, positions, **options):
    d = decision
    return module.dual_layer(
        index, hidden, previous, d.thresholds, d.min_layers, d.limit, d.exited, d.similarities,
        *weights_of(block), *caches, slots, positions, *block.tables, block.shape.num_attention_heads, 1e-5,
        **(block.options | options),
    )  # fmt: skip


def case(block, rows=3):
    """hidden is close to previous, so that similarities are about 0.95."""
    previous = block.random(rows, block.shape.hidden_size)
    hidden = previous + block.random(rows, block.shape.hidden_size, scale=0.3)
    return hidden, previous, block.caches(), int32([0, -1, 2][:rows]), int32([5, 0, 7][:rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("threshold", [NEVER, ALWAYS])
@pytest.mark.parametrize("index", [0, 2])
def test_equals_reference(index, threshold, shape, dtype):
    block = Block(shape, dtype)
    hidden, previous, caches, slots, positions = case(block)
    got, expected = (Decision(3, threshold) for _ in range(2))
    expected_caches = [c.clone() for c in caches]
    previous = previous if index else None
    out = run(ops, block, index, hidden, previous, got, caches, slots, positions)
    wanted = run(reference, block, index, hidden, previous, expected, expected_caches, slots, positions)
    assert_close(out, wanted, dtype, "hidden")
    assert torch.equal(got.exited, expected.exited)
    active = slots >= 0
    close = torch.testing.assert_close
    close(got.similarities[:, active], expected.similarities[:, active], equal_nan=True, atol=1e-6, rtol=0)
    for actual, cache in zip(caches, expected_caches, strict=True):
        assert_close(actual, cache, dtype, "cache")


@pytest.mark.parametrize(
    "index, decision, exits, measures",
    [
        (0, {}, False, False),
        (0, {"thresholds": ALWAYS}, False, False),  # nothing has been measured yet
        (0, {"limit": 0}, True, False),
        (2, {}, False, True),
        (2, {"thresholds": ALWAYS}, True, True),
        (2, {"thresholds": ALWAYS, "min_layers": 2}, True, True),
        (2, {"thresholds": ALWAYS, "min_layers": 3}, False, True),
        (2, {"limit": 2}, True, True),
        (2, {"limit": 3}, False, True),
        (2, {"exited": (0, 1, 0, 0)}, True, False),  # once in the river, always
        (
            2,
            {"exited": (1, 0, 1, 1)},
            False,
            True,
        ),  # only the layer before counts, and the entry is rewritten
        (2, {"thresholds": torch.tensor([0.5, NEVER, 0.5])}, True, True),  # an inactive row has no say
        (2, {"thresholds": torch.tensor([0.5, 0.5, NEVER])}, False, True),  # one strict row holds back all
        (2, {"thresholds": torch.tensor([0.5, 0.5, float("nan")])}, False, True),
    ],
)
def test_decision(index, decision, exits, measures):
    block = Block(SHAPES["gqa"], torch.float32)
    hidden, previous, caches, slots, positions = case(block)
    d = Decision(3, **decision)
    before = d.exited.clone()
    own = [c.clone() for c in caches]
    out = run(ops, block, index, hidden, previous if index else None, d, own, slots, positions)
    layer = "exit_layer" if exits else "decoder_block"
    expected, _ = block.run(ops, layer, hidden, caches, slots, positions)
    assert torch.equal(out, expected) and all(torch.equal(a, b) for a, b in zip(own, caches, strict=True))
    before[index] = exits
    assert torch.equal(d.exited, before)
    active = slots >= 0
    measured = ~d.similarities[:, active].isnan()
    assert measured.all(1).tolist() == [measures and layer == index - 1 for layer in range(LAYERS)]
    if measures:
        similarity = ops.state_similarity(previous, hidden)
        assert torch.equal(d.similarities[index - 1, active], similarity[active])


def test_threshold_is_strict():
    block = Block(SHAPES["gqa"], torch.float32)
    hidden, previous, caches, slots, positions = case(block)
    similarity = ops.state_similarity(previous, hidden)
    for thresholds, exits in [(similarity, 0), (torch.nextafter(similarity, torch.tensor(-2.0)), 1)]:
        d = Decision(3, thresholds)
        run(ops, block, 1, hidden, previous, d, caches, slots, positions)
        assert d.exited[1] == exits


def test_without_active_rows_all_wish_to_exit():
    block = Block(SHAPES["gqa"], torch.float32)
    hidden, previous, caches, _, positions = case(block)
    before = [c.clone() for c in caches]
    d = Decision(3)
    out = run(ops, block, 1, hidden, previous, d, caches, int32([-1, -1, -1]), positions)
    assert d.exited.tolist() == [0, 1, 0, 0] and torch.equal(out, hidden)
    assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))


def test_options_reach_both_layers():
    block = Block(SHAPES["multi-query, qk norm, query scale"], torch.float32)
    hidden, previous, caches, slots, positions = case(block)
    valid = torch.rand(block.shape.slots, block.shape.max_len, generator=block.generator) < 0.7
    options = {"softmax_scale": 0.3, "sliding_window": 4, "kv_valid": valid}
    for threshold, layer in [(NEVER, "decoder_block"), (ALWAYS, "exit_layer")]:
        own = [c.clone() for c in caches]
        out = run(ops, block, 1, hidden, previous, Decision(3, threshold), own, slots, positions, **options)
        expected = block.run(ops, layer, hidden, [c.clone() for c in caches], slots, positions, **options)[0]
        assert torch.equal(out, expected)


def test_bad_arguments():
    block = Block(SHAPES["gqa"], torch.float32)
    hidden, previous, caches, slots, positions = case(block)

    def refused(message, index=1, previous=previous, **changes):
        d = Decision(3)
        for name, value in changes.items():
            setattr(d, name, value)
        with pytest.raises(RuntimeError, match=f"river::dual_layer: {message}"):
            run(ops, block, index, hidden, previous, d, caches, slots, positions)

    refused("index is 4, expected 0 to 3", index=4)
    refused("index is -1, expected 0 to 3", index=-1, previous=None)
    refused(
        "previous is None at index 1, expected None at index 0 and a tensor at every other", previous=None
    )
    refused("previous is given at index 0", index=0)
    refused("previous is float64, expected float32", previous=previous.double())
    refused(r"thresholds has shape \[2\], expected \[3\]", thresholds=torch.zeros(2))
    refused("min_layers is int64, expected int32", min_layers=torch.ones(3, dtype=torch.int64))
    refused(r"limit has shape \[2\], expected \[1\]", limit=int32([1, 1]))
    refused("exited is bool, expected int32", exited=torch.zeros(LAYERS, dtype=torch.bool))
    refused(r"similarities has shape \[3, 4\], expected \[4, 3\]", similarities=torch.zeros(3, LAYERS))
    block.packed.gate_up_proj = block.packed.gate_up_proj[:8]
    refused(r"gate_up_tiles has shape \[8, 2, 576\], expected \[24, 2, 576\]")
