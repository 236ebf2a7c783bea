"""Which number of drafts is the fastest in lossless mode, on a user's prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ..engine.drafting import draft_cost
from ..engine.request import MOST_DRAFTS
from ..engine.sequence import GenerationOutput
from ..model import Model
from .curve import speeds_over

LENGTHS = ("auto", *range(1, MOST_DRAFTS + 1))
SETTINGS = [{"mode": "lossless", "draft_tokens": length} for length in LENGTHS]
LEAST_GAIN = 1.03  # below which a fixed number is not worth more than "auto", which follows the text


@dataclass(frozen=True)
class DraftLength:
    """What drafting so many tokens at a time gave."""

    draft_tokens: int | str
    tokens_per_pass: float  # new tokens after the first, for each pass of the backbone
    right: float  # share of the drafts
    by_bytes: float  # speed over full depth, if time were the weights that are read
    measured: float  # the same by the clock: the median of the prompts
    least_over_auto: float  # by the clock, over "auto": the least of the prompts

    def as_dict(self) -> dict:
        """For JSON."""
        return vars(self)


def draft_lengths(
    model: Model, runs: Sequence[Sequence[GenerationOutput]], references: Sequence[GenerationOutput]
) -> list[DraftLength]:
    """What the runs of `SETTINGS` show, beside those of full depth."""
    cost = draft_cost(model.network)
    return [
        DraftLength(
            length,
            **_counted(outputs, cost),
            measured=median(speeds_over(outputs, references)),
            least_over_auto=min(speeds_over(outputs, runs[0])),
        )
        for length, outputs in zip(LENGTHS, runs, strict=True)
    ]


def _counted(outputs: Sequence[GenerationOutput], cost: float) -> dict[str, float]:
    """What no clock decides."""
    decoded = sum(len(output.tokens) - 1 for output in outputs)
    passes = sum(output.stats.steps for output in outputs)
    drafts = sum(output.stats.drafts for output in outputs)
    draft_steps = drafts - sum(output.stats.quotes for output in outputs)  # quotes read no weights
    return {
        "tokens_per_pass": decoded / max(1, passes),
        "right": sum(output.stats.accepted_drafts for output in outputs) / max(1, drafts),
        "by_bytes": decoded / (passes + draft_steps * cost) if passes else 1.0,
    }


def fastest(lengths: Sequence[DraftLength], by_bytes: bool) -> int | str:
    """The drafts to take: "auto", unless a fixed number is clearly faster, by the clock on each prompt."""

    def speed(length: DraftLength) -> float:
        return length.by_bytes if by_bytes else length.measured

    auto, *fixed = lengths
    faster = [
        length
        for length in fixed
        if speed(length) > LEAST_GAIN * speed(auto) and (by_bytes or length.least_over_auto > 1)
    ]
    return max(faster, key=speed).draft_tokens if faster else auto.draft_tokens
