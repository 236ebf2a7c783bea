"""accept against the reference: the new tokens of a verification, and what the next cycle starts from."""

import pytest
import torch
from blocks import DTYPES, int32
from cycles import GRIDS, NO_TOKENS, Requests, differing

from river_ext import ops, reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requests, length", GRIDS)
def test_equals_reference(requests, length, dtype):
    for rows in range(requests, requests * length + 1, requests):
        for seed in range(8):
            options = {"stops": seed % 3, "step": seed}
            got, expected = (Requests(requests, length, dtype, seed, **options) for _ in range(2))
            tokens = got.tokens(rows)
            got.accept(ops, tokens)
            expected.accept(reference, tokens)
            assert differing(got, expected) == []
            assert (got.records[[(seed + 1) % 3, (seed + 2) % 3]] == -9).all()


def test_the_random_states_are_of_all_kinds():
    counts, ends = set(), set()
    for seed in range(200):
        s = Requests(2, 4, seed=seed)
        active = s.verify_slots[:2] >= 0
        s.accept(ops, s.tokens(8))
        _, numbers, tokens = s.record()
        counts.update(numbers)
        for r in active.nonzero().flatten().tolist():
            last = tokens[r][numbers[r] - 1]
            reasons = (last in s.stop_tokens[r], s.remaining[r] == 0, last == -2)
            assert (s.slots[r] < 0) == any(reasons)
            ends.add((numbers[r], *map(bool, reasons)))
    assert counts == {-1, 1, 2, 3, 4}
    for number in (1, 2, 3):
        for reasons in ((True, False, False), (False, True, False), (False, False, True), (False,) * 3):
            assert (number, *reasons) in ends


def one_request(drafts, **changes):
    """A request whose last token is at position 40, in slot 6, with drafts."""
    s = Requests(1, 4, step=4)
    s.drafts = torch.tensor([-1, *drafts, -1, -1, -1])[:4, None]
    s.verify_slots = int32([6, *(6 for _ in drafts), -1, -1, -1][:4])
    s.verify_positions, s.verify_draw_positions = int32([40, 41, 42, 43]), int32([41, 42, 43, 44])
    s.slots, s.remaining, s.stop_tokens = int32([-1]), int32([9]), torch.tensor([[11, -1]])
    for name, value in changes.items():
        setattr(s, name, value)
    return s


@pytest.mark.parametrize(
    "drafts, targets, expected, ends",
    [
        ([3, 4, 5], [3, 4, 5, 6], [3, 4, 5, 6], False),  # all right
        ([3, 4, 5], [3, 4, 9, 6], [3, 4, 9], False),
        ([3, 4, 5], [9, 4, 5, 6], [9], False),
        ([3, 4, 5], [3, 4], [3, 4], False),  # only one was verified
        ([3], [3, 4, 5, 6], [3, 4], False),  # there was only one
        ([], [3, 4, 5, 6], [3], False),
        ([3, 11, 5], [3, 11, 5, 6], [3, 11], True),  # a stop token
        ([3, 4, 5], [11, 4, 5, 6], [11], True),
        ([3, 4, 5], [3, 4, 5, 11], [3, 4, 5, 11], True),
        ([3, 4, 5], [3, 9, 11, 6], [3, 9], False),  # not of this text any more
        ([3, 4, 5], [3, -1, 5, 6], [3, -2], True),
        ([3, -1, 5], [3, -1, 5, 6], [3, -2], True),
        ([3, 4, 5], [3, 9, -1, 6], [3, 9], False),
    ],
)
def test_which_tokens_are_new(drafts, targets, expected, ends):
    s, old, n = one_request(drafts), one_request(drafts), len(expected)
    s.accept(ops, torch.tensor(targets))
    assert s.record(4) == (5, [n], [expected + [-1] * (4 - n)]) and s.step.tolist() == [5]
    assert s.positions.tolist() == [40 + n] and s.draw_positions.tolist() == [41 + n]
    assert s.verify_positions.tolist() == [40 + n + i for i in range(4)]
    assert s.verify_draw_positions.tolist() == [41 + n + i for i in range(4)]
    assert s.remaining.tolist() == [9 - n]
    slot = -1 if ends else 6
    assert s.slots.tolist() == [slot] and s.verify_slots.tolist() == [slot, -1, -1, -1]
    assert s.drafts.tolist() == [[-1]] * 4
    for name in ("hidden", "verify_hidden"):
        actual, before = getattr(s, name), getattr(old, name)
        row = before[0] if expected[-1] == -2 else s.embed_tokens[expected[-1]]
        assert torch.equal(actual[0], row) and torch.equal(actual[1:], before[1:]), name


@pytest.mark.parametrize("remaining", [1, 2, 3, 4, 5])
def test_no_more_tokens_than_remain(remaining):
    s = one_request([3, 4, 5], remaining=int32([remaining]))
    s.accept(ops, torch.tensor([3, 4, 5, 6]))
    n = min(remaining, 4)
    assert s.record(4)[1:] == ([n], [[3, 4, 5, 6][:n] + [-1] * (4 - n)])
    assert s.remaining.tolist() == [remaining - n]
    assert s.slots.tolist() == [6 if remaining > 4 else -1]


@pytest.mark.parametrize("token", NO_TOKENS)
def test_a_target_that_is_no_token_ends_a_request(token):
    """Its record says so; no embedding is read; stop tokens of other requests are not its own."""
    s, old = one_request([token, 4]), one_request([token, 4])
    s.accept(ops, torch.tensor([token, 4, 5]))
    assert s.record(4)[1:] == ([1], [[-2, -1, -1, -1]]) and s.slots.tolist() == [-1]
    assert "hidden" not in differing(s, old) and "verify_hidden" not in differing(s, old)


def test_an_inactive_request_only_loses_its_drafts():
    s, old = Requests(2, 3), Requests(2, 3)
    for state in (s, old):
        state.verify_slots = int32([-5, 3, 4, 4, 4, 4])
        state.stop_tokens[:] = torch.tensor([[7], [-1]])
    s.accept(ops, torch.tensor([1, 7, 1, 7, 1, 7]))
    assert s.record()[1][0] == -1 and s.record()[2][0] == [-1] * 3
    assert s.slots.tolist()[1] == 3  # 7 stops the other one
    assert s.verify_slots.tolist() == [-5, 3, -1, -1, -1, -1] and (s.drafts == -1).all()
    for name in ("slots", "positions", "draw_positions", "remaining"):
        assert getattr(s, name)[0] == getattr(old, name)[0]
    for name in ("verify_positions", "verify_draw_positions"):
        assert torch.equal(getattr(s, name)[::2], getattr(old, name)[::2])
    assert torch.equal(s.hidden[0], old.hidden[0])
    assert torch.equal(s.verify_hidden[[0, 2, 3, 4, 5]], old.verify_hidden[[0, 2, 3, 4, 5]])


def test_bad_arguments():
    def refused(message, **changes):
        arguments = Requests(2, 4).accepting(torch.tensor([1, 2])) | changes
        with pytest.raises(RuntimeError, match=f"river::accept: {message}"):
            ops.accept(**arguments)

    for count in (0, 3, 10):
        refused(
            f"tokens has {count} entries, expected 1 to 4 of each of 2 requests", tokens=torch.arange(count)
        )
    refused("tokens is int32, expected int64", tokens=int32([1, 2]))
    refused(r"tokens has shape \[1, 2\], expected \[\*\]", tokens=torch.tensor([[1, 2]]))
    refused("embed_tokens is int32, expected bfloat16, float16 or float32", embed_tokens=int32([[1]]))
    refused(r"drafts has shape \[3, 3\], expected 1 to 8 entries", drafts=torch.ones(3, 3).long())
    refused(r"stop_tokens has shape \[2\], expected \[2, \*\]", stop_tokens=torch.tensor([1, 2]))
    refused(r"stop_tokens has shape \[1, 2\], expected \[2, \*\]", stop_tokens=torch.tensor([[1, 2]]))
    refused("remaining is int64, expected int32", remaining=torch.tensor([1, 2]))
    refused(r"hidden has shape \[8, 24\], expected \[2, 24\]", hidden=torch.ones(8, 24))
    refused(r"verify_positions has shape \[2\], expected \[8\]", verify_positions=int32([1, 2]))
    refused(r"verify_draw_positions has shape \[9\]", verify_draw_positions=int32(list(range(9))))
    refused(r"step\[0\] is -1, expected 0 to", step=int32([-1]))
    refused(r"step\[0\] is 2147483647, expected 0 to 2147483646", step=int32([2**31 - 1]))
    refused(r"records has shape \[3, 10\], expected \[\*, 11\]", records=torch.ones(3, 10).int())
    refused("entries of records is 0", records=torch.ones(0, 11).int())
    refused("records is not contiguous", records=torch.ones(11, 3).int().T)
