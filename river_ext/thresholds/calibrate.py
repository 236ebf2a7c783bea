"""All of `river calibrate` but what it prints: the curve, the lengths of drafts, the choice, the file."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from ..errors import RiverError
from ..loading.calibrated import Calibrated, write_calibrated
from ..model import Model
from ..quant.exit_river import river_sha256
from . import drafts
from .by_layer import PRICES, candidates, exit_table
from .choice import Targets, choose
from .curve import FULL, Point, curve, full_depth, measured_runs, speeds_over
from .drafts import DraftLength, draft_lengths


@dataclass(frozen=True)
class Calibration:
    """What was measured on a model, and what was chosen."""

    targets: Targets
    options: dict  # of `Model.generate`, beside the threshold
    max_new_tokens: int
    tokens_per_second: float  # of full depth: the median of the timed prompts
    learnt: int  # prompts that thresholds by layer were learnt from, and that nothing else was measured on
    right: int | None  # answers of full depth, where there is telling
    timed: int  # prompts: the first ones whose answers have more than the token that the prompt gives
    points: list[Point]  # from the strictest threshold on
    lengths: list[DraftLength]
    chosen: Point | None  # None: no threshold meets the targets
    draft_tokens: int | str

    def as_dict(self) -> dict:
        """For JSON: how the choice came about."""
        return {
            "targets": asdict(self.targets),
            "max_new_tokens": self.max_new_tokens,
            "learnt": self.learnt,
            "full_depth": {"tokens_per_second": self.tokens_per_second, "right": self.right},
            "timed": self.timed,
            "curve": [point.as_dict() for point in self.points],
            "drafts": [length.as_dict() for length in self.lengths],
        }

    def write(self, path: str | Path, model: Model) -> None:
        """Writes the file that `load(..., calibrated=path)` takes; there must be a chosen threshold."""
        write_calibrated(
            path,
            Calibrated(
                threshold=self.chosen.threshold,
                min_layers=self.options["min_layers"],
                river_head=self.options["river_head"],
                draft_tokens=self.draft_tokens,
                fingerprint=model.fingerprint,
                river_sha256=river_sha256(model.river),
                dtype=model.network.dtype,
            ),
            self.as_dict(),
        )


def calibrate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    targets: Targets,
    thresholds: Sequence[float],
    *,
    max_new_tokens: int = 64,
    timed: int = 4,
    per_layer: bool = False,
    min_layers: int = 1,
    river_head: str = "model",
    is_right: Callable[[int, str], bool] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Calibration:
    """Measures the curve on prompts, given as token ids, and chooses for the targets.

    Args:
        prompts: for a guarantee, drawn as those will be that the model is used on.
        thresholds: for a guarantee, chosen before anybody saw what they do on these prompts.
        max_new_tokens: of an answer.
        timed: prompts by which the speeds are measured, at most: the first ones with a token to decode.
        per_layer: whether to learn thresholds by layer, too, from `learnt_prompts`; all that is reported is
            then measured on the others.
        min_layers, river_head: as in `Model.generate`; the threshold holds with these.
        is_right: whether a text is right as the answer to the prompt of this number.
        advance: called after each of the `steps`.
    """
    learnt, measured = split([tuple(prompt) for prompt in prompts], per_layer)
    targets.check_prompts(tuple(prompts[number]) for number in measured)
    options = {"min_layers": min_layers, "river_head": river_head}
    thresholds = sorted(set(thresholds), reverse=True)
    if per_layer:
        answers = full_depth(model, [prompts[number] for number in learnt], max_new_tokens, advance)
        thresholds = candidates(exit_table(model, answers, advance, **options), thresholds)
    settings = [FULL, *({"threshold": t} | options for t in thresholds), *drafts.SETTINGS]
    answers = full_depth(model, [prompts[number] for number in measured], max_new_tokens, advance)
    decoded = [answer.prompt for answer in answers if len(answer.tokens) > 1]
    if not decoded:
        raise RiverError(
            "every answer ends with its first token, which the prompt gives; accepted: other prompts"
        )
    full, *runs = measured_runs(model, decoded[:timed], settings, max_new_tokens, advance)
    rivers, lossless = runs[: len(thresholds)], runs[len(thresholds) :]
    speeds = {t: median(speeds_over(run, full)) for t, run in zip(thresholds, rivers, strict=True)}
    right = is_right and (lambda number, text: is_right(measured[number], text))
    points = curve(model, answers, thresholds, speeds, max_new_tokens, advance, right, **options)
    lengths = draft_lengths(model, lossless, full)
    return Calibration(
        targets=targets,
        options=options,
        max_new_tokens=max_new_tokens,
        learnt=len(learnt),
        tokens_per_second=median(output.stats.tokens_per_second for output in full),
        right=sum(right(number, answer.text) for number, answer in enumerate(answers)) if right else None,
        timed=len(full),
        points=points,
        lengths=lengths,
        chosen=choose(points, targets),
        draft_tokens=drafts.fastest(lengths, targets.by_bytes),
    )


def split(prompts: Sequence[Hashable], per_layer: bool) -> tuple[Sequence[int], Sequence[int]]:
    """The numbers of the prompts to learn thresholds by layer from, every second one, and of those to measure
    on: the others, but for copies of the first."""
    if not per_layer:
        return (), range(len(prompts))
    learnt = range(1, len(prompts), 2)
    known = {prompts[number] for number in learnt}
    measured = [number for number in range(0, len(prompts), 2) if prompts[number] not in known]
    if not learnt or not measured:
        raise RiverError(
            f"{len(set(prompts))} prompts for thresholds by layer, which are learnt from half of them; "
            "accepted: 2 or more, all different"
        )
    return learnt, measured


def steps(prompts: int, thresholds: int, timed: int, depths: int = 0) -> int:
    """How often `calibrate` calls `advance`, at most. depths: that thresholds by layer are learnt for."""
    learnt, rules = (prompts // 2, len(PRICES)) if depths else (0, 0)
    measured, candidates = prompts - learnt, thresholds + rules
    runs = 1 + candidates + len(drafts.SETTINGS)
    return prompts + learnt * depths + measured * candidates + min(timed, measured) * runs
