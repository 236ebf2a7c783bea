"""What dual_layer reads of its weights: no format without a row, and nothing twice.

The emulated GPU counts what copies to shared memory take. A ring that was filled on a wrong guess is read in
vain, and only that.
"""

import emulated_ops
import pytest
import torch
from blocks import Block, Shape, int32
from emulated import SCHEDULES, Recorder, copied_bytes

SHAPES = {"gqa": Shape(), "split K": Shape(hidden_size=1024, intermediate_size=64)}  # without padding
DENSE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PACKED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
NEVER, ALWAYS = float("inf"), -2.0
SLOTS = [-1, 4, 0, -1, 7]


def times_read(monkeypatch, shape, schedule, left, thresholds, slots=SLOTS):
    """How often each weight is read by layer 1 of 2: dense ones, packed ones. left: who left before that."""
    block, recorder = Block(SHAPES[shape], torch.bfloat16), Recorder()
    monkeypatch.setattr(emulated_ops, "emulate", recorder)
    rows = len(slots)
    previous = block.random(rows, block.shape.hidden_size)
    hidden = previous + block.random(rows, block.shape.hidden_size)
    rule = torch.tensor(thresholds), int32([0] * rows), int32([9] * rows)
    exited = int32([left, [0] * rows])
    decision = 1, previous, *rule, exited, torch.zeros(2, rows)
    block.run_dual(
        emulated_ops, decision, hidden, block.caches(), int32(slots), int32([3 * row for row in range(rows)])
    )
    recorder.run(SCHEDULES[schedule])
    dense = [block.dense[name] for name in DENSE]
    packed = [getattr(block.packed, name) for name in PACKED]
    return tuple({copied_bytes(t) / t.nbytes for t in weights} for weights in (dense, packed))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_guessed_right_is_read_once(monkeypatch, shape, schedule):
    for left, slots, expected in [
        ([0, 0, 0, 0, 0], SLOTS, ({1}, {0})),
        ([1, 0, 0, 1, 0], SLOTS, ({1}, {0})),  # inactive rows do not count
        ([1, 1, 1, 1, 1], SLOTS, ({0}, {1})),
        ([0, 1, 1, 0, 1], SLOTS, ({0}, {1})),
        ([0, 1, 0, 0, 0], SLOTS, ({1}, {1})),
        ([0, 0, 1, 0, 1], SLOTS, ({1}, {1})),
        ([0, 1, 0, 1, 0], [-1] * 5, ({0}, {0})),
        ([0, 1, 0, 1, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7], ({1}, {1})),
    ]:
        read = times_read(monkeypatch, shape, schedule, left, [NEVER] * len(slots), slots)
        assert read == expected, (left, slots)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_wrong_guess_costs_a_ring(monkeypatch, shape, schedule):
    def read(left, thresholds):
        return times_read(monkeypatch, shape, schedule, left, thresholds)

    dense, packed = read([0] * 5, [ALWAYS] * 5)  # dense, then packed
    assert max(dense) <= 1 and packed == {1}
    dense, packed = read([0] * 5, [NEVER, NEVER, ALWAYS, NEVER, NEVER])  # dense, then both
    assert min(dense) >= 1 and max(dense) <= 2 and packed == {1}
    dense, packed = read([0, 0, 1, 0, 1], [ALWAYS] * 5)  # both, then packed
    assert max(dense) <= 1 and min(packed) >= 1 and max(packed) <= 2
