"""The curve of a model: what each threshold costs and gains on a user's prompts, against full depth.

Full depth answers every prompt, greedily. Each threshold is then fed these answers, token by token: where it
would draw another token, its own answer differs from there on; where it never would, its answer is the same,
since a token depends on those before it alone. So one pass says both shares, that of tokens and that of
answers. Speed is measured by free generation of some prompts, one at a time, all settings in turns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ..engine.drafting import bytes_of
from ..engine.sequence import GenerationOutput
from ..errors import RiverError
from ..model import Model

THRESHOLDS = (0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.9, 0.8, 0.5)
FULL = {"mode": "full"}


@dataclass(frozen=True)
class Point:
    """A threshold's result. Tokens and answers are full depth's, exit depths those of its decoded tokens."""

    threshold: float | tuple[float, ...]  # one for all layers, or for each
    exit_depth: float
    tokens: int
    different_tokens: int  # that it would have drawn otherwise
    answers: int
    different: int  # answers of which it would have drawn any token otherwise
    right: int | None  # of its own answers, where there is telling
    by_bytes: float  # weights that full depth reads for a token, over those that it reads
    measured: float  # speed over full depth: the median of the timed prompts

    @property
    def disagreement(self) -> float:
        """The share of tokens."""
        return self.different_tokens / self.tokens

    def as_dict(self) -> dict:
        """For JSON."""
        return vars(self) | {"disagreement": self.disagreement}


@dataclass(frozen=True)
class Answer:
    """What full depth made of a prompt."""

    prompt: list[int]
    tokens: list[int]
    text: str
    similarities: list[list[float]] = field(default_factory=list)  # of each token, after each layer


def full_depth(
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int, advance: Callable[[], None]
) -> list[Answer]:
    """The answers to prompts, given as token ids."""
    answers = []
    for prompt in prompts:
        out = model.generate(list(prompt), mode="full", max_new_tokens=max_new_tokens)
        anew = model.config.rotates_anew_after
        if anew is not None and len(prompt) <= anew < len(prompt) + len(out.tokens):
            raise RiverError(
                f"a prompt of {len(prompt)} tokens and its answer pass position {anew}, from which the model "
                "rotates anew; accepted: prompts that end well before it, or behind it"
            )
        answers.append(Answer(list(prompt), out.tokens, out.text, out.similarities))
        advance()
    return answers


@dataclass
class _Tally:
    differs: list[list[bool]] = field(default_factory=list)  # by answer, by token
    depths: list[int] = field(default_factory=list)  # by decoded token
    rights: list[bool] = field(default_factory=list)  # by answer


def curve(
    model: Model,
    answers: Sequence[Answer],
    thresholds: Sequence[float | tuple[float, ...]],
    speeds: Mapping[float | tuple[float, ...], float],
    max_new_tokens: int,
    advance: Callable[[], None],
    is_right: Callable[[int, str], bool] | None = None,
    **options,
) -> list[Point]:
    """A point for each threshold.

    Args:
        speeds: over full depth, of each threshold: from `measured_runs`.
        max_new_tokens: of an answer, as full depth had them.
        is_right: whether a text is right as the answer of this number.
        options: of `Model.generate`, beside the threshold.
    """
    points = []
    for threshold in thresholds:
        tally, own = _Tally(), options | {"threshold": threshold}
        for number, answer in enumerate(answers):
            differs, depths = feed(model, answer, own)
            tally.differs.append(differs)
            tally.depths += depths[1:]  # the first is the prompt's
            if is_right:
                generated = answer
                if any(differs):  # else its own answer is full depth's
                    generated = model.generate(answer.prompt, max_new_tokens=max_new_tokens, **own)
                tally.rights.append(is_right(number, generated.text))
            advance()
        points.append(
            Point(
                threshold=threshold,
                exit_depth=fmean(tally.depths),
                tokens=sum(map(len, tally.differs)),
                different_tokens=sum(map(sum, tally.differs)),
                answers=len(answers),
                different=sum(map(any, tally.differs)),
                right=sum(tally.rights) if is_right else None,
                by_bytes=speed_by_bytes(model, tally.depths, options.get("river_head") == "w4"),
                measured=speeds[threshold],
            )
        )
    return points


def feed(model: Model, answer: Answer, options: dict) -> tuple[list[bool], list[int]]:
    """By token of an answer: whether another one would have been drawn, and the exit depth."""
    score = model.score(answer.prompt + answer.tokens, prompt_length=len(answer.prompt), **options)
    drawn = score.logits.argmax(-1).tolist()
    return [own != token for own, token in zip(drawn, answer.tokens, strict=True)], score.exit_depths


def speed_by_bytes(model: Model, depths: Sequence[int], river_head: bool) -> float:
    """Weights that full depth reads for a token, over those that tokens of these exit depths read."""
    network = model.network
    head = network.lm_head.nbytes
    backbone = [bytes_of(layer.weights) for layer in network.layers]
    river = [bytes_of(layer.river) for layer in network.layers]
    own_head = network.river_head_bytes if river_head else head
    read = fmean(sum(backbone[:depth]) + sum(river[depth:]) + own_head for depth in depths)
    return (sum(backbone) + head) / read


def measured_runs(
    model: Model,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[dict],
    max_new_tokens: int,
    advance: Callable[[], None],
) -> list[list[GenerationOutput]]:
    """By setting, its outputs of all prompts. Settings take turns, so that a slow moment meets all alike."""
    for setting in settings:  # the first call of a path is slower
        model.generate(list(prompts[0]), max_new_tokens=2, **setting)
    runs: list[list[GenerationOutput]] = [[] for _ in settings]
    for prompt in prompts:
        for setting, outputs in zip(settings, runs, strict=True):
            outputs.append(model.generate(list(prompt), max_new_tokens=max_new_tokens, **setting))
            advance()
    return runs


def speeds_over(outputs: Sequence[GenerationOutput], references: Sequence[GenerationOutput]) -> list[float]:
    """Of the prompts that have more than the prompt's own token; 1 alone if none has."""
    ratios = [
        own.stats.tokens_per_second / reference.stats.tokens_per_second
        for own, reference in zip(outputs, references, strict=True)
        if len(own.tokens) > 1 and len(reference.tokens) > 1
    ]
    return ratios or [1.0]
