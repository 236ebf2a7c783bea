"""draft_advance against the reference: what a draft step leaves for the next one and for the verification."""

import pytest
import torch
from blocks import DTYPES, int32
from cycles import DRAFTING, GRIDS, NO_TOKENS, Requests, differing

from river_ext import ops, reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requests, length", [grid for grid in GRIDS if grid[1] > 1])
def test_equals_reference(requests, length, dtype):
    for index in range(length - 1):
        for seed in range(8):
            got, expected = (Requests(requests, length, dtype, seed) for _ in range(2))
            tokens = got.tokens(requests)
            got.draft_advance(ops, tokens, index)
            expected.draft_advance(reference, tokens, index)
            assert differing(got, expected) == []


def four_requests():
    """Of which the second does not draft, the third wants no more drafts, the last wants one more."""
    s = Requests(4, 2)
    s.wanted, s.slots = int32([1, 1, 0, 1]), int32([7, -1, 5, 3])
    return s


def test_a_draft():
    s, old = four_requests(), four_requests()
    s.draft_advance(ops, torch.tensor([5, 6, 7, -1]), 0)
    assert set(differing(s, old)) == set(DRAFTING)
    assert s.slots.tolist() == [-1, -1, -1, -1]
    assert s.drafts[1].tolist() == [5, *old.drafts[1, 1:].tolist()]
    assert s.verify_slots[4:].tolist() == [7, *old.verify_slots[5:].tolist()]
    assert (s.positions - old.positions).tolist() == [1, 0, 0, 0]
    assert (s.draw_positions - old.draw_positions).tolist() == [1, 0, 0, 0]
    assert torch.equal(s.hidden, torch.cat([s.embed_tokens[5:6], old.hidden[1:]]))
    rows = old.verify_hidden.split([4, 1, 3])
    assert torch.equal(s.verify_hidden, torch.cat([rows[0], s.embed_tokens[5:6], rows[2]]))


def test_a_request_drafts_as_often_as_it_wants():
    s = Requests(2, 4)
    s.slots, s.wanted, s.verify_slots = int32([8, 9]), int32([3, 2]), int32([-1] * 8)
    s.sure = torch.zeros(2)
    for index, drafting in enumerate(([8, 9], [8, -1], [-1, -1])):
        s.draft_advance(ops, torch.tensor([index, index + 3]), index)
        assert s.slots.tolist() == drafting
    assert s.drafts[1:, 0].tolist() == [0, 1, 2] and s.drafts[1:3, 1].tolist() == [3, 4]
    assert s.verify_slots.tolist() == [-1, -1, 8, 9, 8, 9, 8, -1]


def test_no_draft_follows_one_that_is_not_sure():
    """It counts itself. A margin that is no number is not sure."""
    s = Requests(2, 4)
    s.slots, s.wanted, s.verify_slots = int32([8, 9]), int32([3, 3]), int32([-1] * 8)
    s.sure = torch.tensor([1.25, 0.0])
    steps = [([1.25, 0.0], [8, 9]), ([1.24, torch.nan], [-1, -1]), ([9.0, 9.0], [-1, -1])]
    for index, (margins, drafting) in enumerate(steps):
        s.margins = torch.tensor(margins)
        s.draft_advance(ops, torch.tensor([index, index + 3]), index)
        assert s.slots.tolist() == drafting
    assert s.verify_slots.tolist() == [-1, -1, 8, 9, 8, 9, -1, -1]


@pytest.mark.parametrize("token", NO_TOKENS)
def test_a_request_without_a_token_drafts_no_more(token):
    s, old = four_requests(), four_requests()
    s.wanted = old.wanted = int32([1, 1, 1, 1])
    s.draft_advance(ops, torch.tensor([token] * 4), 0)
    assert differing(s, old) == ["slots"] and s.slots.tolist() == [-1] * 4


def test_bad_arguments():
    def refused(message, index=0, **changes):
        arguments = Requests(2, 4).drafting(torch.tensor([1, 2]), index) | changes
        with pytest.raises(RuntimeError, match=f"river::draft_advance: {message}"):
            ops.draft_advance(**arguments)

    refused("index is -1, expected 0 to 2", index=-1)
    refused("index is 3, expected 0 to 2", index=3)
    refused("index is 4294967296, expected 0 to 2", index=2**32)
    refused("tokens is int32, expected int64", tokens=int32([1, 2]))
    refused(r"tokens has shape \[3\], expected \[2\]", tokens=torch.tensor([1, 2, 3]))
    refused(r"wanted\[1\] is 4, expected 0 to 3", wanted=int32([0, 4]))
    refused(r"wanted\[0\] is -1, expected 0 to 3", wanted=int32([-1, 0]))
    refused("margins is float64, expected float32", margins=torch.ones(2).double())
    refused(r"sure has shape \[3\], expected \[2\]", sure=torch.ones(3))
    refused("embed_tokens is int32, expected bfloat16, float16 or float32", embed_tokens=int32([[1]]))
    refused(r"embed_tokens has shape \[24\], expected \[\*, \*\]", embed_tokens=torch.ones(24))
    refused("vocab_size of embed_tokens is 0", embed_tokens=torch.ones(0, 24))
    refused("hidden_size of embed_tokens is 0", embed_tokens=torch.ones(9, 0))
    refused(r"drafts has shape \[5, 2\], expected 1 to 8 entries", drafts=torch.ones(5, 2).long())
    refused(r"drafts has shape \[0, 2\], expected 1 to 8 entries", drafts=torch.ones(0, 2).long())
    refused(r"drafts has shape \[4\], expected \[\*, \*\]", drafts=torch.ones(4).long())
    refused("drafts is not contiguous", drafts=torch.ones(2, 4).long().T)
    refused("hidden is float16, expected float32", hidden=torch.ones(2, 24).half())
    refused(r"slots has shape \[1\], expected \[2\]", slots=int32([1]))
    refused(r"verify_hidden has shape \[6, 24\], expected \[8, 24\]", verify_hidden=torch.ones(6, 24))
    refused(r"verify_slots has shape \[2\], expected \[8\]", verify_slots=int32([1, 2]))
    one = Requests(2, 1)
    with pytest.raises(RuntimeError, match="river::draft_advance: drafts has 1 row, expected at least 2"):
        one.draft_advance(ops, torch.tensor([1, 2]), 0)
