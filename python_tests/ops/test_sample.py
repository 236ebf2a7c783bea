"""sample: the reference's tokens and bits, what each filter keeps, and that nothing else matters."""

import math

import pytest
import torch
from blocks import each_isa, int32
from drawing import KINDS, MIXED, assert_same, drawing, make_logits, rows_of

from river_ext import ops, reference


def tokens_of(logits, **options):
    return ops.sample(**drawing(logits, **options))[0].tolist()


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 255, 256, 257, 5003])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_reference(kind, vocab):
    arguments = drawing(make_logits(kind, vocab), **MIXED)
    assert_same(ops.sample(**arguments), reference.sample(**arguments))


@pytest.mark.parametrize("kind", ["random", "flat", "equal"])
def test_equals_reference_on_a_large_vocabulary(kind):
    arguments = drawing(
        make_logits(kind, 200_063, rows=3), top_k=[0, 50, 0], top_p=[0.95, 0.9, 1.0], min_p=0.01
    )
    assert_same(ops.sample(**arguments), reference.sample(**arguments))


def test_equals_reference_for_every_option_alone():
    logits = make_logits("random", 1003)
    for name, values in {
        "temperature": [0.1, 0.7, 1.0, 2.0, 5.0, 1e30],
        "top_k": [1, 2, 3, 4, 5, 100, 1002, 1003, 1004],
        "top_p": [1e-30, 1e-3, 0.1, 0.5, 0.9, 0.99, 1 - 2**-24],
        "min_p": [1e-45, 1e-30, 1e-6, 1e-3, 0.1, 0.5, 0.9, 1.0],
    }.items():
        for value in values:
            arguments = drawing(logits, **{name: value}, seeds=range(8))
            assert_same(ops.sample(**arguments), reference.sample(**arguments))


def test_rows_are_independent():
    arguments = drawing(make_logits("random", 1003), **MIXED)
    tokens, logprobs = ops.sample(**arguments)
    for first in range(8):
        for end in range(first + 1, 9):
            rows = slice(first, end)
            assert_same(ops.sample(**rows_of(arguments, rows)), (tokens[rows], logprobs[rows]))


def test_threads_do_not_matter():
    arguments = drawing(make_logits("flat", 50_021), **MIXED)
    expected, threads = ops.sample(**arguments), torch.get_num_threads()
    try:
        for count in (2, 3, 8):
            torch.set_num_threads(count)
            for _ in range(10):
                assert_same(ops.sample(**arguments), expected)
    finally:
        torch.set_num_threads(threads)


def test_instruction_sets_do_not_matter():
    arguments = drawing(make_logits("random", 5003), **MIXED)
    expected = ops.sample(**arguments)
    try:
        for isa in each_isa():
            ops._C.set_cpu_isa(isa)
            assert_same(ops.sample(**arguments), expected)
    finally:
        ops._C.set_cpu_isa(each_isa()[0])


# --- what is kept -------------------------------------------------------------------------------------------


def drawn(logits, draws=4000, **options):
    """The tokens that so many draws from logits [vocab] gave, with their counts."""
    rows = logits.expand(8, -1).contiguous()
    counts = torch.zeros(len(logits), dtype=torch.int64)
    for i in range(0, draws, 8):
        tokens = tokens_of(rows, positions=range(i, i + 8), **options)
        counts += torch.bincount(torch.tensor(tokens), minlength=len(logits))
    return counts


PROBABILITIES = torch.tensor([0.05, 0.3, 0.1, 0.3, 0.05, 0.2])  # ranked: 1, 3, 5, 2, 0, 4


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 4}, {1, 3, 5, 2}),
        ({"top_k": 5}, {1, 3, 5, 2, 0}),  # of two equal ones the first
        ({"top_p": 0.01}, {1}),
        ({"top_p": 0.29}, {1}),
        ({"top_p": 0.31}, {1, 3}),
        ({"top_p": 0.79}, {1, 3, 5}),
        ({"top_p": 0.81}, {1, 3, 5, 2}),
        ({"top_p": 0.94}, {1, 3, 5, 2, 0}),
        ({"top_p": 0.96}, {1, 3, 5, 2, 0, 4}),
        ({"top_k": 3, "top_p": 0.7}, {1, 3}),  # 0.3 of 0.8 is 0.375
        ({"top_k": 3, "top_p": 0.76}, {1, 3, 5}),
        ({"min_p": 1.0}, {1, 3}),
        ({"min_p": 0.6}, {1, 3, 5}),
        ({"min_p": 0.3}, {1, 3, 5, 2}),
        ({"min_p": 0.1}, {0, 1, 2, 3, 4, 5}),
        ({"min_p": 0.6, "top_k": 1}, {1}),
        ({"min_p": 0.6, "top_p": 0.9}, {1, 3, 5}),
        ({"temperature": 0.5, "top_p": 0.76}, {1, 3}),  # their squares: 0.09 of 0.235 each
        ({"temperature": 0.5, "min_p": 0.5}, {1, 3}),
        ({"temperature": 0.0, "top_k": 5, "top_p": 0.9}, {1}),
    ],
    ids=str,
)
def test_what_the_filters_keep(options, kept):
    """And each token as often as it is likely among those: chi-square, 1 in 10,000."""
    counts = drawn(PROBABILITIES.log(), **options)
    assert set(counts.nonzero().flatten().tolist()) == kept
    weights = torch.zeros(6)
    ids = sorted(kept)
    weights[ids] = PROBABILITIES[ids] ** (1 / (options.get("temperature", 1.0) or 1.0))
    expected = (weights / weights.sum() * counts.sum())[ids]
    assert ((counts[ids] - expected) ** 2 / expected).sum() < 26


def test_one_token_is_always_left():
    for kind in KINDS:
        logits = make_logits(kind, 777)
        greedy = logits.max(-1).values
        for options in ({"top_k": 1}, {"top_p": 1e-45}, {"min_p": 1.0}):
            tokens, _ = ops.sample(**drawing(logits, seeds=range(8), **options))
            assert torch.equal(logits.gather(1, tokens[:, None])[:, 0], greedy)


def test_a_tiny_temperature_is_greedy():
    logits = make_logits("random", 777)
    for temperature in (1e-30, 1e-38, 1e-45):
        assert tokens_of(logits, temperature=temperature, top_k=9) == logits.argmax(-1).tolist()


def test_ties_go_to_the_lowest_id():
    equal = torch.zeros(1, 2400)
    for options in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}):
        assert tokens_of(equal, **options) == [0]
    for options in ({"top_k": 600}, {"top_p": 0.25}):
        counts = drawn(equal[0], **options)
        assert counts[:600].sum() == 4000 and (counts[550:600] > 0).any()


def test_without_filters_it_draws_what_lm_head_draws():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 64, generator=g), torch.randn(1003, 64, generator=g)
    for temperature in (0.0, 0.7, 1.0, 1e-40):
        own = drawing(torch.zeros(8, 1), temperature, seeds=range(8), positions=range(8))
        shared = {name: own[name] for name in ("temperature", "seeds", "positions")}
        tokens, logits, _ = ops.lm_head(hidden, torch.ones(64), weight, 1e-5, **shared)
        arguments = drawing(logits, temperature, seeds=range(8), positions=range(8))
        assert torch.equal(ops.sample(**arguments)[0], tokens)


def kept_by_float64(logits, temperature, top_k=0, top_p=1.0):
    """The ids that top_k and then top_p leave of logits [vocab_size], by sorting and fp64 probabilities."""
    ranked = logits.sort(descending=True, stable=True).indices[: top_k or None]
    probability = (logits[ranked].double() / temperature).softmax(0)
    return ranked[probability.cumsum(0) - probability < top_p]


@pytest.mark.parametrize(
    "options",
    [{"top_k": 50}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.5}, {"top_k": 1500}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "tied"])
def test_it_draws_from_what_float64_keeps(kind, options):
    """Many kept and few; only at the very boundary of top_p may fp64 see a token on the other side."""
    differ = total = 0
    for seed in range(10):
        logits = make_logits(kind, 3001, seed=seed)
        got = tokens_of(logits, temperature=0.8, seeds=range(seed, seed + 8), **options)
        for i, row in enumerate(logits):
            kept = kept_by_float64(row, 0.8, **options)
            scores = row[kept] / 0.8 + reference.gumbel(seed + i, 7, kept)
            differ += got[i] != kept[scores == scores.max()].min().item()
            total += 1
    assert differ <= total // 40, f"{differ} of {total} tokens differ"


# --- log-probabilities --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_those_of_the_unfiltered_softmax(kind):
    logits = make_logits(kind, 5003)
    tokens, logprobs = ops.sample(**drawing(logits, **MIXED))
    exact = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    error = (logprobs.double() - exact).abs() / exact.abs().clamp_min(1)
    assert logprobs.dtype == torch.float32 and error.max() < 1e-6


def test_weights_are_accurate():
    x = -torch.linspace(0, 40, 100_001)
    exact = x.double().exp() * 2**40
    error = (reference.weights_of(x).double() - exact).abs()
    assert (error <= exact * 2**-22 + 1).all()
    assert reference.weights_of(torch.tensor([0.0, -0.0, -math.inf])).tolist() == [2**40, 2**40, 0]


# --- rows without a token, and what is refused --------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 300, 1002])
def test_a_row_with_a_logit_that_is_not_finite_has_no_token(value, place):
    healthy = drawing(make_logits("random", 1003), **MIXED)
    arguments = healthy | {"logits": healthy["logits"].clone()}
    arguments["logits"][[0, 2, 5], place] = value
    tokens, logprobs = ops.sample(**arguments)
    assert_same((tokens, logprobs), reference.sample(**arguments))
    assert (tokens[[0, 2, 5]] == -1).all() and logprobs[[0, 2, 5]].isnan().all()
    others = [1, 3, 4, 6, 7]
    expected = ops.sample(**healthy)
    assert_same((tokens[others], logprobs[others]), tuple(part[others] for part in expected))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": [1.0, -1.0]}, r"temperature\[1\] is -1, expected a finite number >= 0"),
        ({"temperature": math.nan}, r"temperature\[0\] is nan"),
        ({"temperature": math.inf}, r"temperature\[0\] is inf"),
        ({"top_k": [0, -1]}, r"top_k\[1\] is -1, expected at least 0"),
        ({"top_p": 0.0}, r"top_p\[0\] is 0, expected above 0, at most 1"),
        ({"top_p": 1.5}, r"top_p\[0\] is 1.5"),
        ({"top_p": [0.5, math.nan]}, r"top_p\[1\] is nan"),
        ({"min_p": -0.5}, r"min_p\[0\] is -0.5, expected 0 to 1"),
        ({"min_p": 1.5}, r"min_p\[0\] is 1.5"),
        ({"min_p": math.nan}, r"min_p\[0\] is nan"),
        ({"top_k": [1, 2, 3]}, r"top_k has shape \[3\], expected \[2\]"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(RuntimeError, match=f"^river::sample: {message}"):
        ops.sample(**drawing(torch.zeros(2, 5), **options))


def test_bad_tensors():
    good = drawing(torch.zeros(2, 5))
    for changed, message in [
        ({"logits": torch.zeros(2, 5).bfloat16()}, "logits is bfloat16, expected float32"),
        ({"logits": torch.zeros(9, 5)}, "logits has 9 rows, expected 1 to 8"),
        ({"logits": torch.zeros(2, 0)}, r"vocab_size of logits is 0, expected 1 to 2\^30 - 1"),
        ({"logits": torch.zeros(1, 1).expand(2, 2**23 + 1)}, "logits is not contiguous"),
        ({"top_k": torch.zeros(2, dtype=torch.int64)}, "top_k is int64, expected int32"),
        ({"seeds": int32([0, 0])}, "seeds is int32, expected int64"),
    ]:
        with pytest.raises(RuntimeError, match=f"^river::sample: {message}"):
            ops.sample(**(good | changed))
    with pytest.raises(RuntimeError, match="vocab_size of logits is 8388609, expected at most 8388608"):
        ops.sample(**drawing(torch.zeros(1, 2**23 + 1)))
