"""dual_layer against the reference: which row takes which path, and what it writes there.

A path is the op of its name.
"""

import pytest
import torch
from blocks import DTYPES, SHAPES, Block, assert_close, each_isa, int32
from chains import Chain, check_rows_alone, check_with_reference

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
    """The tensors that a decision reads and writes. A number or a layer's flag stands for all rows."""

    def __init__(self, rows, thresholds=NEVER, min_layers=1, limit=LAYERS, exited=(0,) * LAYERS):
        def by_row(values):
            return values if isinstance(values, (list, tuple)) else [values] * rows

        self.thresholds = (
            thresholds if isinstance(thresholds, torch.Tensor) else torch.tensor(by_row(thresholds))
        )
        self.min_layers, self.limit = int32(by_row(min_layers)), int32(by_row(limit))
        self.exited = int32([by_row(layer) for layer in exited])
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
@pytest.mark.parametrize("thresholds", [NEVER, ALWAYS, [NEVER, NEVER, ALWAYS]], ids=str)
@pytest.mark.parametrize("index", [0, 2])
def test_equals_reference(index, thresholds, shape, dtype):
    block = Block(shape, dtype)
    hidden, previous, caches, slots, positions = case(block)
    got, expected = (Decision(3, thresholds) for _ in range(2))
    expected_caches = [c.clone() for c in caches]
    previous = previous if index else None
    out = run(ops, block, index, hidden, previous, got, caches, slots, positions)
    wanted = run(reference, block, index, hidden, previous, expected, expected_caches, slots, positions)
    assert_close(out, wanted, dtype, "hidden")
    assert torch.equal(got.exited, expected.exited)
    close = torch.testing.assert_close
    close(got.similarities, expected.similarities, equal_nan=True, atol=1e-6, rtol=0)
    for actual, cache in zip(caches, expected_caches, strict=True):
        assert_close(actual, cache, dtype, "cache")


BOTH, FIRST, LAST, NONE = (0, 2), (0,), (2,), ()  # rows; row 1 is inactive


@pytest.mark.parametrize(
    "index, decision, exits, measured",
    [
        (0, {}, NONE, NONE),
        (0, {"thresholds": ALWAYS, "min_layers": 0}, NONE, NONE),  # nothing has been measured yet
        (0, {"limit": 0}, BOTH, NONE),
        (0, {"limit": [1, 0, 0]}, LAST, NONE),
        (2, {}, NONE, BOTH),
        (2, {"thresholds": ALWAYS}, BOTH, BOTH),
        (2, {"thresholds": ALWAYS, "min_layers": 2}, BOTH, BOTH),
        (2, {"thresholds": ALWAYS, "min_layers": 3}, NONE, BOTH),
        (2, {"thresholds": ALWAYS, "min_layers": [3, 3, 2]}, LAST, BOTH),
        (2, {"limit": 2}, BOTH, BOTH),
        (2, {"limit": 3}, NONE, BOTH),
        (2, {"limit": [2, 2, 3]}, FIRST, BOTH),
        (2, {"limit": 2, "min_layers": 3}, BOTH, BOTH),  # a limit is no matter of similarity
        (2, {"exited": (0, 1, 0, 0)}, BOTH, NONE),  # once in the river, always
        (2, {"exited": (0, [1, 0, 0], 0, 0)}, FIRST, LAST),  # who has left is not measured
        (2, {"exited": (0, [1, 0, 0], 0, 0), "thresholds": ALWAYS}, BOTH, LAST),
        (2, {"exited": (0, [0, 1, 0], 0, 0)}, NONE, BOTH),
        (2, {"exited": (1, 0, 1, 1)}, NONE, BOTH),  # only the layer before counts; entries are rewritten
        (2, {"thresholds": [0.5, NEVER, NEVER]}, FIRST, BOTH),
        (2, {"thresholds": [NEVER, NEVER, 0.5]}, LAST, BOTH),
        (2, {"thresholds": [0.5, NEVER, 0.5]}, BOTH, BOTH),
        (2, {"thresholds": [0.5, 0.5, float("nan")]}, FIRST, BOTH),
        # together
        (0, {"together": True, "limit": [0, 4, 0]}, BOTH, NONE),
        (0, {"together": True, "limit": [0, 0, 1]}, NONE, NONE),
        (2, {"together": True, "thresholds": [0.5, NEVER, 0.5]}, BOTH, BOTH),  # inactive rows have no say
        (2, {"together": True, "thresholds": [0.5, 0.5, NEVER]}, NONE, BOTH),  # one strict row holds back all
        (2, {"together": True, "thresholds": [0.5, 0.5, float("nan")]}, NONE, BOTH),
        (2, {"together": True, "thresholds": [0.5, 0, NEVER], "limit": [4, 4, 2]}, BOTH, BOTH),
        (2, {"together": True, "limit": [2, 2, 3]}, NONE, BOTH),
        (2, {"together": True, "exited": (0, [1, 0, 0], 0, 0)}, FIRST, LAST),  # nobody comes back
        (2, {"together": True, "exited": (0, [1, 0, 0], 0, 0), "thresholds": ALWAYS}, BOTH, LAST),
    ],
)
def test_decision(index, decision, exits, measured):
    block = Block(SHAPES["gqa"], torch.float32)
    hidden, previous, caches, slots, positions = case(block)
    decision = dict(decision)
    together = decision.pop("together", False)
    d = Decision(3, **decision)
    before, own = d.exited.clone(), [c.clone() for c in caches]
    previous_given = previous if index else None
    out = run(ops, block, index, hidden, previous_given, d, own, slots, positions, together=together)
    expected = hidden.clone()
    for layer, rows in ("exit_layer", exits), ("decoder_block", set(BOTH) - set(exits)):
        for row in rows:  # each is of its own slot
            one = slice(row, row + 1)
            y, _ = block.run(ops, layer, hidden[one], caches, slots[one], positions[one])
            expected[row] = y[0]
    assert torch.equal(out, expected) and all(torch.equal(a, b) for a, b in zip(own, caches, strict=True))
    before[index] = int32([row in exits for row in range(3)])
    assert torch.equal(d.exited, before)
    similarities = torch.full((LAYERS, 3), float("nan"))
    for row in measured:
        similarities[index - 1, row] = ops.state_similarity(previous, hidden)[row]
    assert torch.equal(d.similarities.view(torch.int32), similarities.view(torch.int32))


def test_threshold_is_strict():
    block = Block(SHAPES["gqa"], torch.float32)
    hidden, previous, caches, slots, positions = case(block)
    similarity = ops.state_similarity(previous, hidden)
    below = torch.nextafter(similarity, torch.tensor(-2.0))
    for first, last in (0, 0), (0, 1), (1, 0), (1, 1):
        thresholds = torch.stack([(similarity, below)[first][0], below[1], (similarity, below)[last][2]])
        d = Decision(3, thresholds)
        run(ops, block, 1, hidden, previous, d, caches, slots, positions)
        assert d.exited[1].tolist() == [first, 0, last]


@pytest.mark.parametrize("together", [False, True])
def test_without_active_rows_nothing_happens(together):
    block = Block(SHAPES["gqa"], torch.float32)
    hidden, previous, caches, _, positions = case(block)
    before = [c.clone() for c in caches]
    d = Decision(3, ALWAYS, exited=(0, 1, 1, 0))
    out = run(ops, block, 2, hidden, previous, d, caches, int32([-1, -1, -1]), positions, together=together)
    assert d.exited.tolist() == [[0] * 3, [1] * 3, [0] * 3, [0] * 3] and torch.equal(out, hidden)
    assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))
    assert d.similarities.isnan().all()


@pytest.fixture(params=each_isa())
def isa(request):
    ops._C.set_cpu_isa(request.param)
    yield request.param
    ops._C.set_cpu_isa(each_isa()[0])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_depend_on_the_others(shape, dtype):
    assert any([check_rows_alone(ops, Chain(SHAPES[shape], dtype, 8, seed)) for seed in range(3)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("together", [False, True])
def test_chains_equal_the_reference(together, shape, dtype):
    for seed in range(3):
        check_with_reference(ops, Chain(SHAPES[shape], dtype, 3 + 2 * seed, seed), together)


def test_options_reach_both_layers():
    block = Block(SHAPES["multi-query, qk norm, query scale"], torch.float32)
    hidden, previous, caches, slots, positions = case(block)
    valid = torch.rand(block.shape.slots, block.shape.max_len, generator=block.generator) < 0.7
    options = {"softmax_scale": 0.3, "sliding_window": 4, "kv_valid": valid, "residual_multiplier": 0.22}
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
    refused(r"limit has shape \[1\], expected \[3\]", limit=int32([1]))
    refused("exited is bool, expected int32", exited=torch.zeros(LAYERS, 3, dtype=torch.bool))
    refused(r"exited has shape \[4\], expected \[\*, 3\]", exited=int32([0] * LAYERS))
    refused(r"similarities has shape \[3, 4\], expected \[4, 3\]", similarities=torch.zeros(3, LAYERS))
    block.packed.gate_up_proj = block.packed.gate_up_proj[:8]
    refused(r"gate_up_tiles has shape \[8, 2, 576\], expected \[24, 2, 576\]")
