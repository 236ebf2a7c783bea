"""The promise of a guarantee: its bounds against their definition, and by simulation that it is kept."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy
import pytest

from river_ext.thresholds.guarantee import fewest_answers, p_value, promised, upper_bound


@dataclass(frozen=True)
class Result:
    """Of one threshold, whose true share of different answers is `risk`."""

    different: int
    answers: int
    risk: float


@pytest.mark.parametrize(
    ("different", "answers", "share"), [(0, 59, "1/20"), (3, 40, "1/8"), (7, 9, "2/3"), (5, 5, "1/4")]
)
def test_the_p_value_is_the_tail_of_the_binomial_distribution(different, answers, share):
    share = Fraction(share)
    exact = sum(math.comb(answers, k) * share**k * (1 - share) ** (answers - k) for k in range(different + 1))
    assert p_value(different, answers, float(share)) == pytest.approx(float(exact), rel=1e-12)


def test_the_upper_bound_is_where_the_p_value_is_delta():
    for different, answers, confidence in [(0, 59, 0.95), (3, 40, 0.9), (39, 40, 0.99), (20, 2000, 0.95)]:
        bound = upper_bound(different, answers, confidence)
        assert p_value(different, answers, bound) == pytest.approx(1 - confidence, rel=1e-9)
    # a published value: 1 - 0.05 ** (1 / n) where none is different
    assert upper_bound(0, 30, 0.95) == pytest.approx(1 - 0.05 ** (1 / 30), rel=1e-12)
    assert upper_bound(4, 4, 0.95) == 1


@pytest.mark.parametrize(
    ("share", "confidence"), [(0.05, 0.95), (0.01, 0.95), (0.1, 0.9), (0.5, 0.5), (0.9, 0.01)]
)
def test_the_fewest_answers_are_just_enough(share, confidence):
    fewest = fewest_answers(share, confidence)
    assert promised([Result(0, fewest, 0)], share, confidence)
    assert fewest == 1 or not promised([Result(0, fewest - 1, 0)], share, confidence)
    assert fewest_answers(0.05, 0.95) == 59


def test_thresholds_behind_the_first_that_fails_are_not_promised():
    results = [Result(0, 100, 0), Result(1, 100, 0), Result(9, 100, 0), Result(0, 100, 0)]
    assert promised(results, 0.05, 0.95) == results[:2]
    assert promised(results[2:], 0.05, 0.95) == []


# --- by simulation: how often the promise is broken --------------------------------------------------------

SHARE, CONFIDENCE, REPETITIONS = 0.1, 0.9, 4000
RISKS = {
    "rising": (0.01, 0.04, 0.07, 0.09, 0.101, 0.11, 0.13, 0.2, 0.4),
    "all a little above": (0.101,) * 9,
    "not monotone": (0.05, 0.12, 0.02, 0.11, 0.105, 0.03, 0.2, 0.104, 0.102),
}


def simulated(risks, answers: int, together: bool, generator) -> list[Result]:
    """Of answers drawn anew. `together`: what differs under one threshold differs under every riskier one."""
    difficulty = generator.random((answers, 1 if together else len(risks)))
    different = (difficulty < numpy.array(risks)).sum(0)
    return [Result(int(count), answers, risk) for count, risk in zip(different, risks, strict=True)]


def broken(risks, answers: int, together: bool, choose) -> float:
    """The share of repetitions in which any of the promised thresholds breaks the promise."""
    generator = numpy.random.default_rng(0)
    return sum(
        any(result.risk > SHARE for result in choose(simulated(risks, answers, together, generator)))
        for _ in range(REPETITIONS)
    ) / REPETITIONS  # fmt: skip


@pytest.mark.parametrize("risks", RISKS.values(), ids=RISKS)
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("answers", [30, 120])
def test_the_promise_is_broken_no_more_often_than_said(risks, together, answers):
    delta = 1 - CONFIDENCE
    margin = 3 * math.sqrt(delta * CONFIDENCE / REPETITIONS)
    assert broken(risks, answers, together, lambda r: promised(r, SHARE, CONFIDENCE)) <= delta + margin


def test_the_simulation_would_notice_weaker_rules():
    """What has no guarantee: the measured share itself, and a test of each threshold for itself."""

    def measured(results):
        return [result for result in results if result.different <= SHARE * result.answers]

    def each(results):
        return [r for r in results if p_value(r.different, r.answers, SHARE) <= 1 - CONFIDENCE]

    risks = RISKS["all a little above"]
    assert broken(risks, 120, False, measured) > 0.9
    assert broken(risks, 120, False, each) > 0.3


@pytest.mark.parametrize("seed", range(3))
def test_the_promise_holds_over_splits_of_one_pool(seed):
    """Answers that were measured once, split again and again: the share of the whole pool is the true one."""
    generator = numpy.random.default_rng(seed)
    ease = generator.random(600)
    pool = numpy.stack([ease < risk + 0.02 * generator.standard_normal(600) for risk in RISKS["rising"]])
    risks = pool.mean(1)
    broken = 0
    for _ in range(1000):
        own = pool[:, generator.permutation(600)[:80]]
        results = [Result(int(row.sum()), 80, risk) for row, risk in zip(own, risks, strict=True)]
        broken += any(result.risk > SHARE for result in promised(results, SHARE, CONFIDENCE))
    assert broken / 1000 <= 1 - CONFIDENCE + 3 * math.sqrt(0.1 * 0.9 / 1000)
