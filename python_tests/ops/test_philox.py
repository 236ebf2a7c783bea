"""Philox and Gumbel noise (csrc/philox.h): known answers, accuracy, both tails, the same bits everywhere."""

import math

import pytest
import torch
from blocks import each_isa, int32

from river_ext import ops, reference

WORDS = 2**32


def test_philox_known_answer():
    """The published known-answer vectors of Philox4x32-10 (Random123, kat_vectors)."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(w) for w in reference.philox(0, (zero, 0, 0, 0))]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    words = [int(w) for w in reference.philox(-1, (zero + ones, ones, ones, ones))]
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def noise_of(words):
    return torch.from_numpy(ops._C.gumbel_of(torch.as_tensor(words).numpy()))


def some_words():
    """Random ones, both ends, and where an exponent or the way of computing changes."""
    random = torch.randint(WORDS, (300_000,), generator=torch.Generator().manual_seed(0))
    powers = 2 ** torch.arange(33)
    edges = torch.cat([powers, WORDS - powers, torch.tensor([math.floor(WORDS * (1 - 0.5**0.5))])])
    near = (edges[:, None] + torch.arange(-300, 300)).flatten()
    return torch.cat([random, near[(near >= 0) & (near < WORDS)]])


def exact(words):
    v, rest = ((w.double() + 0.5) / WORDS for w in (words, WORDS - 1 - words))
    return -torch.log(torch.where(v < 0.5, -torch.log1p(-v), -torch.log(rest)))


def test_noise_is_accurate():
    words = some_words()
    errors = (noise_of(words).double() - exact(words)).abs()
    assert errors.max() < 1e-6
    assert errors[exact(words).abs() < 1].max() < 2.5e-7
    assert [round(x, 4) for x in noise_of([0, WORDS - 1]).tolist()] == [22.8739, -3.13]


def test_noise_has_the_bits_of_the_reference():
    words = some_words()
    assert torch.equal(noise_of(words), reference.gumbel_of(words))
    tokens = torch.arange(3000) * 41
    for seed, position in ((0, 0), (-1, 5), (2**62 + 12345, 2**31 - 1), (-(2**63), 77)):
        noise = torch.from_numpy(ops._C.gumbel(seed, position, tokens.numpy()))
        assert torch.equal(noise, reference.gumbel(seed, position, tokens))


def test_noise_follows_the_gumbel_distribution():
    """Kolmogorov-Smirnov: 99.9 % of samples stay below 1.95."""
    n = 1_000_000
    noise = torch.from_numpy(ops._C.gumbel(17, 3, torch.arange(n).numpy())).double().sort().values
    expected = torch.exp(-torch.exp(-noise))
    above = (torch.arange(1, n + 1) / n - expected).abs().max()
    below = (expected - torch.arange(n) / n).abs().max()
    assert max(above, below) * n**0.5 < 1.95


@pytest.mark.parametrize("bound", [18.0, 17.0, 16.7, 12.0, 8.0])
def test_large_noise_is_as_likely_as_it_should_be(bound):
    """By words: what lies above a bound, the probability of a token that is so much less likely."""
    probability = -math.expm1(-math.exp(-bound))
    count = (noise_of(torch.arange(2_000_000)) > bound).sum().item()
    assert abs(count - probability * WORDS) < 1 + 3e-6 * count


@pytest.mark.parametrize("bound", [-3.0, -2.9, -2.5, -2.0])
def test_small_noise_is_as_likely_as_it_should_be(bound):
    probability = math.exp(-math.exp(-bound))
    count = (noise_of(WORDS - 3_000_000 + torch.arange(3_000_000)) < bound).sum().item()
    assert abs(count - probability * WORDS) < 1 + 2e-5 * count


def hidden_and_weight(logits):
    """What gives exactly these fp32 logits [8, vocab] in bfloat16: each is a sum over its row's columns."""
    rows, vocab = logits.shape
    hidden, weight = torch.zeros(rows, 64), torch.zeros(vocab, 64)
    for row in range(rows):
        hidden[row, 4 * row : 4 * row + 4] = 4  # a mean square of 1: the norm changes nothing
        left = logits[row].clone()
        for part in range(3):
            piece = left.bfloat16().float()
            weight[:, 4 * row + part] = piece / 4
            left -= piece
        assert (left == 0).all()
    return hidden.bfloat16(), weight.bfloat16()


def check_noise_bits(lm_head, seed, position, vocab=40):
    """The noise of every token by the tokens that are drawn.

    Logits are the reference's noise negated, so that all scores are 0 and the lowest id wins; a row leaves
    out the ids below some first one. A token with more noise than the reference would win where it should
    not, one with less would not win where it is the first.
    """
    noise = reference.gumbel(seed, position, torch.arange(vocab))
    for start in range(0, vocab, 8):
        firsts = torch.arange(start, start + 8)
        logits = torch.where(torch.arange(vocab) < firsts[:, None], -(2.0**100), -noise)
        hidden, weight = hidden_and_weight(logits)
        options = {
            "temperature": torch.ones(8),
            "seeds": torch.full((8,), seed),
            "positions": int32([position] * 8),
        }
        tokens, got, _ = lm_head(hidden, torch.ones(64).bfloat16(), weight, 0.0, **options)
        assert torch.equal(got, logits)
        assert torch.equal(tokens, firsts)


@pytest.mark.parametrize("isa", each_isa())
def test_lm_head_adds_these_bits(isa):
    ops._C.set_cpu_isa(isa)
    try:
        for seed, position in ((0, 0), (-7, 123), (2**40 + 1, 2**20)):
            check_noise_bits(ops.lm_head, seed, position)
    finally:
        ops._C.set_cpu_isa(each_isa()[0])


def test_the_cuda_kernel_adds_these_bits(kernels):
    for seed, position in ((0, 0), (-7, 123)):
        check_noise_bits(kernels.lm_head, seed, position)
