"""Which threshold of a curve meets a user's targets."""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from ..errors import RiverError
from .curve import Point
from .guarantee import fewest_answers, promised

LEAST_GUARANTEE = 1e-6  # of a smaller share millions of prompts are not enough
DISAGREEMENT = 0.01  # of tokens, where nobody says anything else


@dataclass(frozen=True)
class Targets:
    """What a threshold has to meet, all of it; None asks for nothing."""

    max_disagreement: float | None = None  # share of tokens
    min_speedup: float | None = None  # over full depth
    by_bytes: bool = False  # the speed is that of the bytes read, and not of a clock
    guarantee: float | None = None  # the share of later answers that may differ from full depth
    confidence: float = 0.95  # of that

    def __post_init__(self):
        if self.max_disagreement is self.min_speedup is self.guarantee is None:
            object.__setattr__(self, "max_disagreement", DISAGREEMENT)
        for name in ("max_disagreement", "guarantee", "confidence"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise RiverError(f"{name}={value}; accepted: a share above 0 and below 1, such as 0.05")
        if self.guarantee is not None and self.guarantee < LEAST_GUARANTEE:
            raise RiverError(
                f"guarantee={self.guarantee}; accepted: a share from {LEAST_GUARANTEE:g} on, such as 0.05"
            )
        if self.min_speedup is not None and not 0 < self.min_speedup < math.inf:
            raise RiverError(f"min_speedup={self.min_speedup}; accepted: a number above 0, such as 1.5")

    def check_prompts(self, prompts: Iterable[Hashable]) -> None:
        """Refuses so few prompts that nothing could be promised, before anything is measured. Copies show
        nothing of other prompts and are not counted."""
        if self.guarantee is None:
            return
        different, fewest = len(set(prompts)), fewest_answers(self.guarantee, self.confidence)
        if different < fewest:
            raise RiverError(
                f"{different} prompts are too few to promise {percent(self.guarantee)} with a confidence of "
                f"{percent(self.confidence)}; accepted: {fewest} or more, all different, or a larger share"
            )

    def speed(self, point: Point) -> float:
        return point.by_bytes if self.by_bytes else point.measured

    def text(self) -> str:
        """In words, for messages."""
        parts = []
        if self.guarantee is not None:
            parts.append(
                f"at most {percent(self.guarantee)} of later answers different, with a confidence of "
                f"{percent(self.confidence)}"
            )
        if self.max_disagreement is not None:
            parts.append(f"at most {percent(self.max_disagreement)} of tokens different")
        if self.min_speedup is not None:
            parts.append(f"{self.min_speedup:.4g} times as fast{' by bytes' if self.by_bytes else ''}")
        return ", ".join(parts)


def percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def choose(points: Sequence[Point], targets: Targets) -> Point | None:
    """The point that meets the targets, or None. Of several, the one with the fewest layers; where the speed
    is all that is asked for, the one with the fewest different tokens.

    Args:
        points: the strictest first, in an order that the answers they are from have no say in.
    """
    met = list(points)
    if targets.guarantee is not None:
        met = promised(points, targets.guarantee, targets.confidence)
    if targets.max_disagreement is not None:
        met = [point for point in met if point.disagreement <= targets.max_disagreement]
    if targets.min_speedup is not None:
        met = [point for point in met if targets.speed(point) >= targets.min_speedup]
    if targets.max_disagreement is targets.guarantee is None:
        return min(met, key=lambda point: (point.disagreement, -targets.speed(point)), default=None)
    return min(met, key=lambda point: (point.exit_depth, point.disagreement), default=None)
