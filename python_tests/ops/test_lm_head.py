"""lm_head: logits, greedy ties, and Gumbel sampling by seed and position."""

import pytest
import torch
from blocks import DTYPES, assert_close, each_isa, int32

from river_ext import ops, reference


@pytest.fixture(params=each_isa())
def isa(request):
    ops._C.set_cpu_isa(request.param)
    yield request.param
    ops._C.set_cpu_isa(each_isa()[0])


def inputs(dtype, rows=8, hidden=128, vocab=515, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, hidden, generator=g).to(dtype),
        (1 + 0.1 * torch.randn(hidden, generator=g)).to(dtype),
        (torch.randn(vocab, hidden, generator=g) * hidden**-0.5).to(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 16, 515])
def test_equals_reference(vocab, dtype, isa):
    hidden, norm, weight = inputs(dtype, vocab=vocab)
    for rows in range(1, 9):
        tokens, logits = ops.lm_head(hidden[:rows], norm, weight, 1e-5)
        assert_close(logits, reference.lm_head(hidden[:rows], norm, weight, 1e-5)[1], torch.float32, "logits")
        assert torch.equal(tokens, logits.argmax(-1))
        alone, nothing = ops.lm_head(hidden[:rows], norm, weight, 1e-5, return_logits=False)
        assert torch.equal(alone, tokens) and nothing.shape == (0, vocab)


def test_rows_are_independent(isa):
    hidden, norm, weight = inputs(torch.bfloat16)
    _, together = ops.lm_head(hidden, norm, weight, 1e-5)
    for row in range(8):
        assert torch.equal(ops.lm_head(hidden[row : row + 1], norm, weight, 1e-5)[1][0], together[row])


def test_ties_go_to_the_lowest_id():
    hidden, norm, weight = inputs(torch.bfloat16, vocab=4096)
    weight[:] = weight[:1]
    tokens, logits = ops.lm_head(hidden, norm, weight, 1e-5)
    assert (logits == logits[:, :1]).all() and (tokens == 0).all()
    weight[[77, 2000, 4095]] = (weight[:1].float() + 3 * hidden[:1].float()).bfloat16()
    assert ops.lm_head(hidden[:1], norm, weight, 1e-5)[0].tolist() == [77]


def test_ties_over_threads_go_to_the_lowest_id():
    """The best of each thread's part has one value; whichever is done first, the lowest id wins."""
    hidden, norm, weight = inputs(torch.bfloat16, vocab=16384)
    weight[:] = weight[:1]
    threads = torch.get_num_threads()
    try:
        for count in (2, 3, 8):
            torch.set_num_threads(count)
            for _ in range(50):
                assert (ops.lm_head(hidden, norm, weight, 1e-5, return_logits=False)[0] == 0).all()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("place", [0, 5000, 16383])
def test_one_thread_sees_the_logit_that_is_not_finite(place):
    hidden, norm, weight = inputs(torch.bfloat16, vocab=16384)
    weight[place] = float("nan")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            assert (ops.lm_head(hidden, norm, weight, 1e-5, return_logits=False)[0] == -1).all()
    finally:
        torch.set_num_threads(threads)


def sampling(rows, temperature, seeds, positions):
    return dict(
        temperature=torch.full((rows,), temperature), seeds=torch.tensor(seeds), positions=int32(positions)
    )


def test_sampling_equals_reference():
    hidden, norm, weight = inputs(torch.float32)
    for seed in (0, 1, 2**31, 2**62 + 12345, -1):
        options = sampling(8, 0.8, [seed + r for r in range(8)], list(range(0, 80, 10)))
        tokens, _ = ops.lm_head(hidden, norm, weight, 1e-5, **options)
        assert torch.equal(tokens, reference.lm_head(hidden, norm, weight, 1e-5, **options)[0])
    greedy = sampling(8, 0.0, [1] * 8, [0] * 8)
    assert torch.equal(
        ops.lm_head(hidden, norm, weight, 1e-5, **greedy)[0], ops.lm_head(hidden, norm, weight, 1e-5)[0]
    )


def test_sampling_depends_on_seed_and_position_only():
    hidden, norm, weight = inputs(torch.float32)
    options = sampling(8, 1.0, [7] * 8, [3, 4, 5, 6, 7, 8, 9, 10])
    together = ops.lm_head(hidden, norm, weight, 1e-5, **options)[0]
    for row in range(8):
        alone = ops.lm_head(hidden[row : row + 1], norm, weight, 1e-5, **sampling(1, 1.0, [7], [3 + row]))[0]
        assert alone[0] == together[row]
    many = [
        ops.lm_head(hidden[:1], norm, weight, 1e-5, **sampling(1, 1.0, [seed], [3]))[0].item()
        for seed in range(20)
    ]
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


def broken(kind):
    """Inputs in which rows 2 and 5 have a logit that is no number, or an infinite one."""
    hidden, norm, weight = inputs(torch.float32)
    hidden[:, -1] = 0
    hidden[[2, 5], -1] = {"nan": float("nan"), "inf": float("inf")}.get(kind, 1.0)
    if kind == "overflow":  # every number is finite
        norm[-1] = weight[300, -1] = 1e30
    elif kind == "one logit":
        weight[7, -1] = -float("inf")
        hidden[[0, 1, 3, 4, 6, 7], -1] = 1e-30  # and every other row too
    return hidden, norm, weight


BROKEN = {"nan": [2, 5], "inf": [2, 5], "overflow": [2, 5], "one logit": list(range(8))}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_row_without_finite_logits_has_no_token(kind, isa):
    hidden, norm, weight = broken(kind)
    healthy = [row for row in range(8) if row not in BROKEN[kind]]
    draw = sampling(8, 0.8, list(range(8)), [4] * 8)
    for options in ({}, draw, {"return_logits": False}, draw | {"return_logits": False}):
        tokens, _ = ops.lm_head(hidden, norm, weight, 1e-5, **options)
        assert (tokens[BROKEN[kind]] == -1).all() and (tokens[healthy] >= 0).all()
        assert torch.equal(tokens, reference.lm_head(hidden, norm, weight, 1e-5, **options)[0])
        for row in range(8):
            own = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            alone = ops.lm_head(hidden[row : row + 1], norm, weight, 1e-5, **own)[0]
            assert alone.tolist() == tokens[row : row + 1].tolist()


def test_bad_arguments():
    hidden, norm, weight = inputs(torch.float32)
    for options, message in [
        (dict(temperature=torch.ones(8)), "temperature, seeds and positions are given in part"),
        (sampling(8, -1.0, [0] * 8, [0] * 8), r"temperature\[0\] is -1, expected a finite number >= 0"),
        (sampling(8, float("nan"), [0] * 8, [0] * 8), r"temperature\[0\] is nan"),
        (sampling(7, 1.0, [0] * 8, [0] * 8), r"temperature has shape \[7\], expected \[8\]"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.lm_head(hidden, norm, weight, 1e-5, **options)
    with pytest.raises(RuntimeError, match=r"weight has shape \[515, 64\], expected \[\*, 128\]"):
        ops.lm_head(hidden, norm, weight[:, :64].contiguous(), 1e-5)


def test_a_tiny_temperature_is_greedy():
    hidden, norm, weight = inputs(torch.float32)
    greedy = ops.lm_head(hidden, norm, weight, 1e-5)[0]
    for temperature in (1e-30, 1e-38, 1e-45):
        options = sampling(8, temperature, [0] * 8, [0] * 8)
        assert torch.equal(ops.lm_head(hidden, norm, weight, 1e-5, **options)[0], greedy)
