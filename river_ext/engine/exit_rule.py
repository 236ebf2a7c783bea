"""The exit rule: after which backbone layer a token may leave for the exit river.

A row may leave after `depth` backbone layers when the similarity of the last one is strictly above the
threshold that the row has for that depth, and `depth >= min_layers`; it must when `depth` is its limit. The
batch policy says what becomes of that: by "row", each row leaves on its own; by "min", the paper's, all rows
leave together or none of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..checks import short
from ..errors import RiverError

BATCH_POLICIES = ("row", "min")
PREFILL_POLICIES = "'full', 'depth:k', 'min' or 'last'"


@dataclass(frozen=True)
class ExitRule:
    """The rule of one row. Thresholds are rounded to fp32, what the similarities are in.

    There is one for each layer, after which it decides; the last one has nothing to decide. `limit` is the
    number of backbone layers that the row's tokens may run: the model's depth, 0 for the pure river, or the
    resident layers, if no token is to run an offloaded one.
    """

    thresholds: tuple[float, ...]
    min_layers: int
    limit: int

    def __post_init__(self):
        rounded = torch.tensor(self.thresholds, dtype=torch.float64).float()
        if rounded.isnan().any():
            raise RiverError("threshold is NaN; accepted: any number, inf (never exit) included")
        object.__setattr__(self, "thresholds", tuple(rounded.tolist()))

    @property
    def never_leaves(self) -> bool:
        """Before the limit."""
        return self.limit > 0 and not any(map(self.may_leave, range(self.limit)))

    def may_leave(self, depth: int) -> bool:
        """Whether any similarity lets the row leave after `depth` layers; none exceeds 1."""
        return depth >= self.limit or (depth >= self.min_layers and self.thresholds[depth - 1] < 1)

    def leaves(self, depth: int, similarity: float) -> bool:
        """Whether the row is ready to leave after `depth` layers, the last of which had this similarity."""
        if depth >= self.limit:
            return True
        return depth >= self.min_layers and similarity > self.thresholds[depth - 1]


def threshold_name(threshold: float | Sequence[float]) -> str:
    """For tables."""
    return "by layer" if isinstance(threshold, Sequence) else f"{threshold:g}"


def next_decision(
    rules: Sequence[ExitRule], depth: int, staying: Sequence[bool], together: bool, layers: int
) -> int:
    """The first depth after `depth` at which one of the rows that stay may leave; `layers` if none may."""
    some = all if together else any
    return next(
        (
            after
            for after in range(depth + 1, layers)
            if some(rule.may_leave(after) for rule, stays in zip(rules, staying, strict=True) if stays)
        ),
        layers,
    )


def still_staying(
    rules: Sequence[ExitRule],
    depth: int,
    staying: Sequence[bool],
    similarities: Sequence[float],
    together: bool,
) -> list[bool]:
    """Which of the rows that ran `depth` backbone layers run another one; the others leave for good."""
    ready = [rule.leaves(depth, s) for rule, s in zip(rules, similarities, strict=True)]
    if together:
        ready = [all(ready[row] for row, stays in enumerate(staying) if stays)] * len(ready)
    return [stays and not leaves for stays, leaves in zip(staying, ready, strict=True)]


@dataclass(frozen=True)
class PrefillPolicy:
    """How many backbone layers a prompt runs: at most `limit`, fewer where the rule is met."""

    limit: int
    judged: str | None = None  # the similarity the rule looks at: "min" over all tokens, the "last", none

    @classmethod
    def parse(cls, text: str, depth: int) -> "PrefillPolicy":
        if isinstance(text, str):
            if text == "full":
                return cls(depth)
            if text in ("min", "last"):
                return cls(depth, judged=text)
            name, _, number = text.partition(":")
            digits = number.isascii() and number.isdigit() and len(number) <= 9
            if name == "depth" and digits and int(number) <= depth:
                return cls(int(number))
        raise RiverError(f"prefill={short(text)}; accepted: {PREFILL_POLICIES} with k from 0 to {depth}")
