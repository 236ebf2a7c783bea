"""draft_advance and accept by the CUDA kernels: the CPU's bits, alone and queued as whole cycles."""

import emulated_ops
import pytest
import torch
from blocks import int32
from cycles import GRIDS, NO_TOKENS, Requests, differing
from emulated import SCHEDULES, Recorder

from river_ext import ops

DTYPES = [torch.bfloat16, torch.float16]
WIDE = 4400  # hidden_size: some threads copy two pieces of a row, and not all


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requests, length", [grid for grid in GRIDS if grid[1] > 1])
def test_draft_advance(kernels, requests, length, dtype):
    for index in range(length - 1):
        options = {"seed": length + index, "size": WIDE if index == 0 else 24}
        ours, cpu = (Requests(requests, length, dtype, **options) for _ in range(2))
        tokens = ours.tokens(requests)
        ours.draft_advance(kernels, tokens, index)
        cpu.draft_advance(ops, tokens, index)
        assert differing(ours, cpu) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requests, length", GRIDS)
def test_accept(kernels, requests, length, dtype):
    for rows in range(requests, requests * length + 1, requests):
        options = {"seed": rows, "stops": rows % 3, "step": rows, "size": WIDE if rows == requests else 24}
        ours, cpu = (Requests(requests, length, dtype, **options) for _ in range(2))
        tokens = ours.tokens(rows)
        ours.accept(kernels, tokens)
        cpu.accept(ops, tokens)
        assert differing(ours, cpu) == []


@pytest.mark.parametrize("token", NO_TOKENS)
def test_no_embedding_is_read_without_a_token(kernels, token):
    def some_requests():
        s = Requests(2, 3, torch.bfloat16)
        s.slots, s.verify_slots = int32([3, 4]), int32([3, 4, 3, 4, 3, 4])
        s.wanted, s.drafts = int32([2, 2]), torch.full((3, 2), token)
        return s

    tokens = torch.tensor([5, token] * 3)
    s, old = some_requests(), some_requests()
    s.accept(kernels, tokens)
    assert s.record()[1:] == ([1, 1], [[5, -1, -1], [-2, -1, -1]]) and s.slots.tolist() == [3, -1]
    assert torch.equal(s.hidden, torch.stack([s.embed_tokens[5], old.hidden[1]]))
    s = some_requests().draft_advance(kernels, torch.tensor([token, token]), 0)
    assert differing(s, old) == ["slots"] and s.slots.tolist() == [-1, -1]


class Cycles(Requests):
    """Cycles of two drafts and their verification, whose tokens are known before: a script."""

    def __init__(self):
        super().__init__(2, 3, torch.bfloat16, size=1032)
        self.slots, self.wanted, self.sure = int32([5, 2]), int32([2, 1]), torch.zeros(2)
        self.verify_slots = torch.cat([self.slots, int32([-1] * 4)])
        self.remaining = int32([20, 5])
        self.stop_tokens[:] = -1

    def play(self, module):
        for first, second, verified in [
            ([3, 4], [5, 6], [3, 4, 5, 7, 8, 9]),  # all are right
            ([1, 2], [3, 4], [1, 9, 2, 3, 5, 5]),  # one is, none is
            ([-1, 6], [7, 8], [4, 6, 5, 7, 6, 8]),  # no draft; the second request ends
            ([9, 1], [2, 2], [9, 1, 2, -1, 3, 3]),
        ]:
            self.draft_advance(module, torch.tensor(first), 0)
            self.draft_advance(module, torch.tensor(second), 1)
            self.accept(module, torch.tensor(verified))
        return self


def test_cycles(monkeypatch):
    """Twelve kernels in a queue, of which each may start before the one ahead has ended."""
    expected = Cycles().play(ops)
    assert expected.slots.tolist() == [5, -1] and expected.step.tolist() == [4]
    assert [expected.record(cycle)[1] for cycle in (1, 2, 3)] == [[2, 1], [1, 2], [3, -1]]
    for name, schedule in SCHEDULES.items():
        cycles, recorder = Cycles(), Recorder()
        monkeypatch.setattr(emulated_ops, "emulate", recorder)
        cycles.play(emulated_ops)
        recorder.run(schedule)
        assert differing(cycles, expected) == [], name
