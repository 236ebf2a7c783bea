"""The threads of a layer stay together: whatever their number, its bits are those of one thread."""

import threading

import pytest
import torch
from blocks import Block, Shape, int32

from river_ext import ops

LARGE = Shape(
    hidden_size=512, num_attention_heads=8, num_key_value_heads=2, head_dim=64, rotary_dim=64,
    intermediate_size=1000, max_len=600,
)  # fmt: skip
SLOTS, POSITIONS = [0, 0, 3, -1, 5, 3, 8, 2], [7, 8, 580, 0, 0, 579, 300, 12]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Layer:
    def __init__(self, dtype=torch.bfloat16, rows=8):
        self.block, self.rows = Block(LARGE, dtype), rows
        self.hidden, self.start = self.block.random(rows, LARGE.hidden_size), self.block.caches()
        self.slots, self.positions = int32(SLOTS[:rows]), int32(POSITIONS[:rows])

    def run(self, kind):
        """All that the layer writes."""
        caches = [cache.clone() for cache in self.start]
        if kind != "dual_layer":
            return *self.block.run(ops, kind, self.hidden, caches, self.slots, self.positions), *caches
        index, layers, rows = 1, 2, self.rows
        exited = torch.zeros(layers, rows, dtype=torch.int32)
        exited[0] = torch.arange(rows) % 2
        similarities = torch.zeros(layers, rows)
        previous = self.hidden.flip(0)
        decision = [index, previous, torch.full((rows,), 2.0), int32([1] * rows), int32([2] * rows)]
        decision += [exited, similarities]
        out = self.block.run_dual(ops, decision, self.hidden, caches, self.slots, self.positions)
        return out, exited, similarities, *caches


def same(a, b):
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["decoder_block", "exit_layer", "dual_layer"])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_any_number_of_threads_gives_the_bits_of_one(kind, rows):
    layer = Layer(rows=rows)
    torch.set_num_threads(1)
    alone = layer.run(kind)
    for count in (2, 3, 8):  # more than there are cores, too
        torch.set_num_threads(count)
        for _ in range(20):
            assert same(layer.run(kind), alone), f"{count} threads"


def test_teams_of_several_callers_do_not_meet():
    layer = Layer()
    torch.set_num_threads(2)
    expected = {kind: layer.run(kind) for kind in ("decoder_block", "exit_layer")}
    wrong = []

    def call(kind):
        torch.set_num_threads(2)
        for _ in range(30):
            if not same(layer.run(kind), expected[kind]):
                wrong.append(kind)

    callers = [threading.Thread(target=call, args=(kind,)) for kind in [*expected, *expected]]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
