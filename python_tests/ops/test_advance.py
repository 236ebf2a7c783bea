"""advance against the reference: the record of a step, and what the next step starts from."""

import pytest
import torch
from blocks import DTYPES, int32

from river_ext import ops, reference

ROWS, SIZE, VOCAB, LAYERS, RECORDS = 4, 64, 50, 3, 5
OWN_DEPTHS = (0, 0, 0, 0), (1, 0, 0, 0), (1, 0, 1, 0)  # row 1 is inactive


class State:
    """exited: by layer, of all rows or row by row. Every row has stop tokens of its own."""

    def __init__(self, dtype=torch.float32, exited=(0, 1, 1), step=0, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*size):
            return torch.randn(*size, generator=generator).to(dtype)

        self.before, self.after = random(ROWS, SIZE), random(ROWS, SIZE)
        self.tokens = torch.tensor([7, 3, 9, 49])
        self.embed_tokens = random(VOCAB, SIZE)
        self.stop_tokens = torch.tensor([[9, 3, -1], [3, -1, -1], [8, 9, -1], [7, 48, -1]])
        self.hidden = random(ROWS, SIZE)
        self.slots = int32([2, -1, 0, 1])
        self.positions = int32([10, 11, 12, 13])
        self.draw_positions = int32([11, 12, 13, 14])
        self.remaining = int32([5, 5, 5, 1])
        self.exited = int32([layer if isinstance(layer, tuple) else [layer] * ROWS for layer in exited])
        self.similarities = torch.rand(LAYERS, ROWS, generator=generator)
        self.step = int32([step])
        self.records = torch.full((RECORDS, 1 + 2 * ROWS + LAYERS * ROWS), -7, dtype=torch.int32)

    def advance(self, module=ops):
        module.advance(*vars(self).values())
        return self

    def record(self, step):
        """Stamp, exit depths, tokens, similarities."""
        stamp, *rest = self.records[step % RECORDS].tolist()
        similarities = int32(rest[2 * ROWS :]).view(torch.float32).view(LAYERS, ROWS)
        return stamp, rest[:ROWS], rest[ROWS : 2 * ROWS], similarities


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exited", [(0, 1, 1), (0, 0, 0), (1, 1, 1), (0, 0, 1), OWN_DEPTHS])
def test_equals_reference(exited, dtype):
    got = State(dtype, exited, step=7).advance()
    expected = State(dtype, exited, step=7).advance(reference)
    for name in vars(got):
        if name not in ("similarities", "records"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert got.record(7)[:3] == expected.record(7)[:3]
    for actual, wanted in [
        (got.similarities, expected.similarities),
        (got.record(7)[3], expected.record(7)[3]),
    ]:
        torch.testing.assert_close(actual, wanted, atol=1e-6, rtol=0)  # of inactive rows what was there
    assert (got.records[[0, 1, 3, 4]] == -7).all()


def test_a_step():
    s, old = State().advance(), State()
    assert s.record(0)[:3] == (1, [1] * ROWS, [7, -1, 9, 49])
    assert torch.equal(s.record(0)[3], old.similarities)
    assert s.slots.tolist() == [2, -1, -1, -1]  # row 2 drew a stop token, row 3 its last
    assert s.positions.tolist() == [11, 11, 13, 14]
    assert s.draw_positions.tolist() == [12, 12, 14, 15]
    assert s.remaining.tolist() == [4, 5, 4, 0]
    assert torch.equal(s.hidden[[0, 2, 3]], s.embed_tokens[[7, 9, 49]])
    assert torch.equal(s.hidden[1], old.hidden[1])
    assert not s.exited.any() and s.step.item() == 1
    for name in ("before", "after", "tokens", "embed_tokens", "stop_tokens"):
        assert torch.equal(getattr(s, name), getattr(old, name)), name


def test_the_last_layer_is_measured_where_it_ran_in_the_backbone():
    s, old = State(exited=(0, 0, 0)).advance(), State()
    similarity = ops.state_similarity(s.before, s.after)
    active = old.slots >= 0
    assert s.record(0)[1] == [LAYERS] * ROWS
    assert torch.equal(s.similarities[-1, active], similarity[active])
    assert torch.equal(s.record(0)[3][-1, active], similarity[active])
    assert torch.equal(s.similarities[:-1], old.similarities[:-1])


def test_each_row_has_its_depth_and_is_measured_where_it_was_in_the_backbone():
    s, old = State(exited=OWN_DEPTHS).advance(), State()
    assert s.record(0)[1] == [1, LAYERS, 2, LAYERS]
    similarity = ops.state_similarity(s.before, s.after)
    assert s.similarities[-1].tolist() == [*old.similarities[-1, :3].tolist(), similarity[3].item()]
    assert torch.equal(s.similarities[:-1], old.similarities[:-1])


@pytest.mark.parametrize("row", [0, 2, 3])
def test_a_row_has_its_own_stop_tokens(row):
    s = State()
    s.remaining[:] = 9
    s.stop_tokens = torch.full((ROWS, 2), -1)
    s.stop_tokens[:, 0] = s.tokens.roll(1)  # those of its neighbour, and for one row its own
    s.stop_tokens[row, 1] = s.tokens[row]
    slots = s.slots.clone()
    slots[row] = -1
    assert torch.equal(s.advance().slots, slots)


def test_steps_follow_each_other_until_no_row_is_left():
    s, expected = State(), State()
    s.stop_tokens = expected.stop_tokens = torch.empty(ROWS, 0, dtype=torch.int64)
    for step in range(12):
        s.advance()
        expected.advance(reference)
        assert s.record(step)[0] == step + 1
        assert all(
            torch.equal(getattr(s, n), getattr(expected, n)) for n in ("slots", "positions", "remaining")
        )
    assert s.slots.tolist() == [-1] * ROWS and s.record(11)[2] == [-1] * ROWS
    assert s.positions.tolist() == [15, 11, 17, 14]
    assert sorted(s.records[:, 0].tolist()) == [8, 9, 10, 11, 12]


@pytest.mark.parametrize("token", [-1, VOCAB, 1 << 40, -(1 << 40), 2**32 + 5, -(2**63)])
def test_a_row_without_a_token_ends(token):
    """Its record says so, which is not what it says of an inactive row; its embedding is not read."""
    s, expected, old = State(), State(), State()
    s.tokens[0] = expected.tokens[0] = token
    s.stop_tokens[:] = expected.stop_tokens[:] = 1
    s.advance()
    expected.advance(reference)
    assert s.record(0)[2] == [-2, -1, 9, 49]
    assert torch.equal(s.hidden[0], old.hidden[0]) and s.positions[0] == 11
    assert s.slots.tolist() == [-1, -1, 0, -1]
    for name in ("hidden", "slots", "positions", "draw_positions", "remaining", "exited", "step"):
        assert torch.equal(getattr(s, name), getattr(expected, name)), name
    assert s.record(0)[:3] == expected.record(0)[:3]
    s.advance()
    assert s.record(1)[2] == [-1, -1, 9, -1]


def test_bad_arguments():
    def refused(message, **changes):
        s = State()
        for name, value in changes.items():
            setattr(s, name, value)
        with pytest.raises(RuntimeError, match=f"river::advance: {message}"):
            s.advance()

    refused("before is int32, expected bfloat16, float16 or float32", before=int32([[0] * SIZE] * ROWS))
    refused("before has 9 rows, expected 1 to 8", before=torch.zeros(9, SIZE))
    refused("hidden_size is 40, expected a multiple of 16", before=torch.zeros(ROWS, 40))
    refused("after is float16, expected float32", after=torch.zeros(ROWS, SIZE, dtype=torch.float16))
    refused(r"stop_tokens has shape \[3\], expected \[4, \*\]", stop_tokens=torch.tensor([9, -1, -1]))
    refused(r"exited has shape \[3\], expected \[\*, 4\]", exited=int32([0, 0, 0]))
    refused("tokens is int32, expected int64", tokens=int32([1, 2, 3, 4]))
    refused(r"embed_tokens has shape \[50, 32\], expected \[\*, 64\]", embed_tokens=torch.zeros(VOCAB, 32))
    refused(r"similarities has shape \[2, 4\], expected \[3, 4\]", similarities=torch.zeros(2, ROWS))
    refused(
        r"records has shape \[5, 18\], expected \[\*, 21\]", records=torch.zeros(5, 18, dtype=torch.int32)
    )
    refused("entries of records is 0", records=torch.zeros(0, 21, dtype=torch.int32))
    refused(r"step\[0\] is -1, expected 0 to", step=int32([-1]))
    refused("hidden is not contiguous", hidden=torch.zeros(SIZE, ROWS).T)
