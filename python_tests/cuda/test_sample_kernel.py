"""The CUDA kernel of sample against the reference: emulated, under every schedule, and on a real GPU.

Cut-offs are searched in passes until no more tokens than threads, 512, are undecided: the vocabularies are
larger than that.
"""

import math

import pytest
from drawing import KINDS, MIXED, assert_same, drawing, make_logits, rows_of

from river_ext import ops, reference


@pytest.mark.parametrize("vocab", [1, 5, 514, 2052])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_reference(kernels, kind, vocab):
    arguments = drawing(make_logits(kind, vocab), **MIXED)
    if vocab > 1000:
        arguments = rows_of(arguments, slice(2, 6))
    assert_same(kernels.sample(**arguments), reference.sample(**arguments))


CUTS = [
    {"top_k": 300},  # more than the rank of the first guess
    {"top_k": 1500, "top_p": 0.5},
    {"top_k": 1},
    {"top_p": 0.999},
    {"top_p": 1e-30},
    {"top_p": 1 - 2**-24},
    {"min_p": 0.5},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("kind", ["random", "flat", "equal"])
def test_cut_offs(kernels, kind, cut):
    """An odd vocabulary: the second row is not aligned to 16 bytes."""
    arguments = drawing(make_logits(kind, 3001, rows=2), temperature=0.8, **cut)
    assert_same(kernels.sample(**arguments), reference.sample(**arguments))


def test_a_large_vocabulary(kernels):
    arguments = drawing(make_logits("random", 32_003, rows=2), 0.8, top_k=[50, 0], top_p=0.9)
    assert_same(kernels.sample(**arguments), reference.sample(**arguments))


def test_a_row_does_not_depend_on_the_others(kernels):
    arguments = drawing(make_logits("random", 771), **MIXED)
    tokens, logprobs = kernels.sample(**arguments)
    for rows in (slice(2, 3), slice(3, 6)):
        assert_same(kernels.sample(**rows_of(arguments, rows)), (tokens[rows], logprobs[rows]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_with_a_logit_that_is_not_finite_has_no_token(kernels, value):
    arguments = drawing(make_logits("random", 771), **MIXED)
    for row, place in ((1, 0), (4, 500), (6, 770)):
        arguments["logits"][row, place] = value
    got = kernels.sample(**arguments)
    assert (got[0] < 0).nonzero().flatten().tolist() == [1, 4, 6]
    assert_same(got, reference.sample(**arguments))


def test_options_out_of_range_filter_nothing(kernels):
    """On a GPU nobody can refuse them in time."""
    logits = make_logits("random", 771, rows=4)
    plain = ops.sample(**drawing(logits, 0.8))
    for options in (
        {"top_k": [-1, -(2**31), 771, 772]},
        {"top_p": [0.0, -1.0, 1.5, math.nan]},
        {"min_p": [-1.0, 1.5, math.nan, math.inf]},
    ):
        assert_same(kernels.sample(**drawing(logits, 0.8, **options)), plain)
    greedy = ops.sample(**drawing(logits, 0.0))
    assert_same(kernels.sample(**drawing(logits, [-1.0, math.nan, -math.inf, -0.0])), greedy)
