"""A promise that holds whatever the model and the prompts are: with confidence 1 - delta, at most a given
share of later answers differs from full depth.

An answer either differs or does not, so the number of different ones among n prompts is binomial. The null
hypothesis of a threshold is that its share is above the promised one; it is refuted where so few different
answers would then have a probability of at most delta (the exact test of Clopper and Pearson, Biometrika 26,
1934). Thresholds are tested in a fixed order, from the strictest on, each at the full delta, up to the first
that is not refuted: then the probability that any of those before it breaks the promise is at most delta
(fixed-sequence testing, as in Angelopoulos, Bates, Candes, Jordan and Lei, "Learn then Test", arXiv
2110.01052).
"""

import math
from collections.abc import Iterable
from itertools import takewhile
from typing import Protocol, TypeVar


class Tested(Protocol):
    """A threshold's result."""

    answers: int
    different: int  # of these, from full depth


AnyTested = TypeVar("AnyTested", bound=Tested)


def promised(strict_first: Iterable[AnyTested], share: float, confidence: float) -> list[AnyTested]:
    """The results whose thresholds all keep the promise, with this confidence.

    Args:
        strict_first: in an order that the answers have not decided; the first that fails ends it.
        share: of later answers that may differ, above 0 and below 1.
        confidence: 1 - delta, above 0 and below 1.
    """
    delta = 1 - confidence
    return list(takewhile(lambda r: p_value(r.different, r.answers, share) <= delta, strict_first))


def p_value(different: int, answers: int, share: float) -> float:
    """The probability of so few different answers or fewer, if each differs with probability `share`."""
    log_share, log_rest = math.log(share), math.log1p(-share)
    return min(
        1.0,
        math.fsum(
            math.exp(_log_choose(answers, k) + k * log_share + (answers - k) * log_rest)
            for k in range(different + 1)
        ),
    )


def upper_bound(different: int, answers: int, confidence: float) -> float:
    """The smallest share that the answers refute with this confidence: Clopper and Pearson's upper limit."""
    if different == answers:
        return 1.0
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if p_value(different, answers, middle) <= 1 - confidence else (middle, high)
    return high


def fewest_answers(share: float, confidence: float) -> int:
    """Prompts below which not even full depth's own answers could be promised anything."""
    answers = max(1, math.floor(math.log(1 - confidence) / math.log1p(-share)) - 1)
    while p_value(0, answers, share) > 1 - confidence:
        answers += 1
    return answers


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
