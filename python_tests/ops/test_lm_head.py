"""lm_head and lm_head_w4: logits, greedy ties, and Gumbel sampling by seed and position."""

import pytest
import torch
from blocks import DTYPES, assert_close, each_isa, int32
from heads import KINDS, Head

from river_ext import ops


@pytest.fixture(params=each_isa())
def isa(request):
    ops._C.set_cpu_isa(request.param)
    yield request.param
    ops._C.set_cpu_isa(each_isa()[0])


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def threads():
    """Sets how many threads there are, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(dtype, rows=8, hidden=128, vocab=515, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, hidden, generator=g).to(dtype),
        (1 + 0.1 * torch.randn(hidden, generator=g)).to(dtype),
        (torch.randn(vocab, hidden, generator=g) * hidden**-0.5).to(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 16, 515, 1003])
def test_equals_reference(kind, vocab, dtype, isa):
    hidden, norm, weight = inputs(dtype, vocab=vocab)
    head = Head(kind, weight)
    for rows in range(1, 9):
        tokens, logits, margins = head(hidden[:rows], norm)
        assert logits.shape == (rows, vocab)
        assert_close(logits, head.reference(hidden[:rows], norm)[1], torch.float32, "logits")
        assert torch.equal(tokens, logits.argmax(-1))
        two = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf).topk(2).values  # or one
        assert torch.equal(margins, two[:, 0] - two[:, 1])
        alone, nothing, same = head(hidden[:rows], norm, return_logits=False)
        assert torch.equal(alone, tokens) and nothing.shape == (0, vocab) and torch.equal(same, margins)


@pytest.mark.parametrize("size", [16, 72, 100, 1000])
def test_sizes_between_tiles(kind, size, isa):
    hidden, norm, weight = inputs(torch.float32, hidden=size, vocab=37)
    head = Head(kind, weight)
    tokens, logits, _ = head(hidden, norm)
    expected_tokens, expected, _ = head.reference(hidden, norm)
    assert torch.equal(tokens, expected_tokens)
    assert_close(logits, expected, torch.float32, "logits")


def test_rows_are_independent(kind, isa):
    hidden, norm, weight = inputs(torch.bfloat16)
    head = Head(kind, weight)
    tokens, together, margins = head(hidden, norm)
    for rows in (slice(0, 1), slice(3, 4), slice(7, 8), slice(2, 7)):
        some_tokens, some, ahead = head(hidden[rows], norm)
        assert torch.equal(some, together[rows]) and torch.equal(some_tokens, tokens[rows])
        assert torch.equal(ahead, margins[rows])


def test_ties_go_to_the_lowest_id(kind):
    hidden, norm, weight = inputs(torch.bfloat16, vocab=4090)
    weight[:] = weight[:1]
    head = Head(kind, weight)
    tokens, logits, margins = head(hidden, norm)
    assert (logits == logits[:, :1]).all() and (tokens == 0).all() and (margins == 0).all()
    weight[[77, 2000, 4089]] = (weight[:1].float() + 3 * hidden[:1].float()).bfloat16()
    head = Head(kind, weight)
    assert head(hidden[:1], norm)[0].tolist() == [77]


def test_ties_over_threads_go_to_the_lowest_id(kind, threads):
    """The best of each thread's part has one value; whichever is done first, the lowest id wins."""
    hidden, norm, weight = inputs(torch.bfloat16, vocab=16384)
    weight[:] = weight[:1]
    head = Head(kind, weight)
    for count in (2, 3, 8):
        threads(count)
        for _ in range(50):
            assert (head(hidden, norm, return_logits=False)[0] == 0).all()


@pytest.mark.parametrize("place", [0, 5000, 16379])
def test_one_thread_sees_the_logit_that_is_not_finite(kind, place, threads):
    hidden, norm, weight = inputs(torch.bfloat16, vocab=16380)
    head = Head(kind, weight)
    head.spoil(place, float("nan"))
    for count in (1, 2, 8):
        threads(count)
        assert (head(hidden, norm, return_logits=False)[0] == -1).all()


def sampling(rows, temperature, seeds, positions):
    return dict(
        temperature=torch.full((rows,), temperature), seeds=torch.tensor(seeds), positions=int32(positions)
    )


def test_sampling_equals_reference(kind):
    hidden, norm, weight = inputs(torch.float32)
    head = Head(kind, weight)
    for seed in (0, 1, 2**31, 2**62 + 12345, -1):
        options = sampling(8, 0.8, [seed + r for r in range(8)], list(range(0, 80, 10)))
        tokens, _, margins = head(hidden, norm, **options)
        expected, _, ahead = head.reference(hidden, norm, **options)
        assert torch.equal(tokens, expected)
        assert_close(margins, ahead, torch.float32, "margins")
    greedy = sampling(8, 0.0, [1] * 8, [0] * 8)
    assert torch.equal(head(hidden, norm, **greedy)[0], head(hidden, norm)[0])


@pytest.mark.parametrize("scaling", [8.0, 0.3])
def test_logits_are_divided_before_a_token_is_chosen(kind, scaling, isa):
    hidden, norm, weight = inputs(torch.float32)
    head = Head(kind, weight)
    _, plain, _ = head(hidden, norm)
    draw = sampling(8, 0.8, list(range(8)), list(range(0, 80, 10)))
    for options in ({}, draw):
        tokens, logits, _ = head(hidden, norm, logits_scaling=scaling, **options)
        assert torch.equal(logits, plain / scaling)
        assert torch.equal(tokens, head.reference(hidden, norm, logits_scaling=scaling, **options)[0])
        alone, _, _ = head(hidden, norm, logits_scaling=scaling, return_logits=False, **options)
        assert torch.equal(alone, tokens)


def test_logits_that_a_division_makes_equal_are_a_tie(kind):
    """What a user sees of the logits decides, and what `sample` does too."""
    hidden, norm, weight = inputs(torch.float32)
    head = Head(kind, weight)
    tokens, logits, _ = head(hidden, 1e-6 * norm, logits_scaling=1e38)  # so small that few bits are left
    ties = logits == logits.amax(-1, keepdim=True)
    assert (ties.sum(-1) > 1).any() and torch.equal(tokens, ties.int().argmax(-1))


def test_sampling_depends_on_seed_and_position_only(kind):
    hidden, norm, weight = inputs(torch.float32)
    head = Head(kind, weight)
    options = sampling(8, 1.0, [7] * 8, [3, 4, 5, 6, 7, 8, 9, 10])
    together = head(hidden, norm, **options)[0]
    for row in range(8):
        alone = head(hidden[row : row + 1], norm, **sampling(1, 1.0, [7], [3 + row]))[0]
        assert alone[0] == together[row]
    many = [head(hidden[:1], norm, **sampling(1, 1.0, [seed], [3]))[0].item() for seed in range(20)]
    assert len(set(many)) > 10


def test_sampling_distribution():
    """Chi-square of 8,000 draws against softmax(logits / temperature)."""
    hidden, norm, weight = inputs(torch.float32, rows=1, vocab=12)
    hidden = hidden.expand(8, -1).contiguous()
    counts = torch.zeros(12)
    for i in range(1000):
        options = sampling(8, 0.7, [99] * 8, list(range(8 * i, 8 * i + 8)))
        counts += torch.bincount(ops.lm_head(hidden, norm, weight, 1e-5, **options)[0], minlength=12)
    logits = ops.lm_head(hidden[:1], norm, weight, 1e-5)[1][0]
    expected = torch.softmax(logits / 0.7, 0) * 8000
    assert ((counts - expected) ** 2 / expected).sum() < 35  # 11 degrees of freedom: 1 in 4,000


def broken(kind, what):
    """A head, and inputs of which rows 2 and 5, or all, have a logit that is NaN or infinite."""
    hidden, norm, weight = inputs(torch.float32)
    hidden[:, -1] = 0
    hidden[[2, 5], -1] = {"nan": float("nan"), "inf": float("inf")}.get(what, 1.0)
    if what == "overflow":  # every number is finite
        norm[-1] = 1e35
        weight[300, -1] = 1e4
    head = Head(kind, weight)
    if what.startswith("one logit"):
        head.spoil(514, float(what.split()[-1]))
        hidden[[0, 1, 3, 4, 6, 7], -1] = 1e-30  # and every other row too
    return head, hidden, norm


BROKEN = {
    "nan": [2, 5],
    "inf": [2, 5],
    "overflow": [2, 5],
    "one logit is nan": list(range(8)),
    "one logit is inf": list(range(8)),
    "one logit is -inf": list(range(8)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_row_without_finite_logits_has_no_token(kind, what, isa):
    head, hidden, norm = broken(kind, what)
    healthy = [row for row in range(8) if row not in BROKEN[what]]
    draw = sampling(8, 0.8, list(range(8)), [4] * 8)
    for options in ({}, draw, {"return_logits": False}, draw | {"return_logits": False}):
        tokens, _, margins = head(hidden, norm, **options)
        assert (tokens[BROKEN[what]] == -1).all() and (tokens[healthy] >= 0).all()
        assert (margins[BROKEN[what]] == 0).all() and (margins[healthy] > 0).all()
        assert torch.equal(tokens, head.reference(hidden, norm, **options)[0])
        for row in range(8):
            own = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            alone = head(hidden[row : row + 1], norm, **own)[0]
            assert alone.tolist() == tokens[row : row + 1].tolist()


def test_bad_arguments():
    hidden, norm, weight = inputs(torch.float32)
    for options, message in [
        (dict(temperature=torch.ones(8)), "temperature, seeds and positions are given in part"),
        (sampling(8, -1.0, [0] * 8, [0] * 8), r"temperature\[0\] is -1, expected a finite number >= 0"),
        (sampling(8, float("nan"), [0] * 8, [0] * 8), r"temperature\[0\] is nan"),
        (sampling(7, 1.0, [0] * 8, [0] * 8), r"temperature has shape \[7\], expected \[8\]"),
        (dict(logits_scaling=0.0), "logits_scaling is 0, expected a finite number > 0"),
        (dict(logits_scaling=-8.0), "logits_scaling is -8, expected a finite number > 0"),
        (dict(logits_scaling=float("nan")), "logits_scaling is nan, expected a finite number > 0"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.lm_head(hidden, norm, weight, 1e-5, **options)
    with pytest.raises(RuntimeError, match=r"weight has shape \[515, 64\], expected \[\*, 128\]"):
        ops.lm_head(hidden, norm, weight[:, :64].contiguous(), 1e-5)
    packed = Head("lm_head_w4", weight).weight
    for changed, vocab, message in [
        (packed, 512, r"weight has shape \[33, 2, 576\], expected \[32, 2, 576\]"),
        (packed, 529, r"weight has shape \[33, 2, 576\], expected \[34, 2, 576\]"),
        (packed[:, :1].contiguous(), 515, r"weight has shape \[33, 1, 576\], expected \[33, 2, 576\]"),
        (packed.float(), 515, "weight is float32, expected uint8"),
        (packed[..., 1:], 515, r"weight has shape \[33, 2, 575\]"),
        (packed, 0, "vocab_size is 0, expected 1"),
        (packed, -1, "vocab_size is -1, expected 1"),
        (packed, 2**40, "vocab_size is 1099511627776, expected 1"),
        (packed, 515.0, "vocab_size is 515.0, expected int"),
    ]:
        with pytest.raises(RuntimeError, match=f"^river::lm_head_w4: {message}"):
            ops.lm_head_w4(hidden, norm, changed, vocab, 1e-5)
    with pytest.raises(RuntimeError, match=r"^river::lm_head_w4: temperature\[0\] is -1, expected a finite"):
        ops.lm_head_w4(hidden, norm, packed, 515, 1e-5, **sampling(8, -1.0, [0] * 8, [0] * 8))


def test_a_tiny_temperature_is_greedy():
    hidden, norm, weight = inputs(torch.float32)
    greedy = ops.lm_head(hidden, norm, weight, 1e-5)[0]
    for temperature in (1e-30, 1e-38, 1e-45):
        options = sampling(8, temperature, [0] * 8, [0] * 8)
        tokens, _, margins = ops.lm_head(hidden, norm, weight, 1e-5, **options)
        assert torch.equal(tokens, greedy) and (margins > 1e28).all()


def test_infinite_scores_have_no_margin(kind):
    """Logits are finite, and overflow when they are divided by the temperature."""
    hidden, norm, weight = inputs(torch.float32)
    head, options = Head(kind, weight), sampling(8, 1e-30, [0] * 8, [0] * 8)
    tokens, logits, margins = head(hidden, norm, logits_scaling=1e-20, **options)
    assert logits.isfinite().all() and (tokens >= 0).all() and (margins == 0).all()
    assert torch.equal(margins, head.reference(hidden, norm, logits_scaling=1e-20, **options)[2])
