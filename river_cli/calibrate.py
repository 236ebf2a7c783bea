"""`river calibrate`: what each threshold costs and gains on prompts, and one chosen for a target."""

import shlex
import time
from collections.abc import Callable, Sequence

from rich.table import Table

from river_ext.checks import short
from river_ext.demo_tasks import generator
from river_ext.engine.exit_rule import threshold_name
from river_ext.engine.request import integer, number, request
from river_ext.errors import RiverError
from river_ext.loading.calibrated import check_output
from river_ext.loading.chat import read_template
from river_ext.loading.texts import read_texts
from river_ext.progress import progress_bar
from river_ext.thresholds.calibrate import Calibration, calibrate, split, steps
from river_ext.thresholds.choice import Targets, percent
from river_ext.thresholds.curve import THRESHOLDS, Point
from river_ext.thresholds.guarantee import upper_bound

from . import shared
from .shared import machine, model_facts, model_line
from .terminal import print_json, print_table, printable

FIELDS = ("prompt", "question", "text")  # of a line of JSON, the first that is there
DEMO_PROBLEMS = 60  # as many as a promise of 5 % takes, and one more


def run(arguments) -> None:
    targets = Targets(
        max_disagreement=arguments.max_disagreement,
        min_speedup=arguments.min_speedup,
        by_bytes=arguments.by_bytes,
        guarantee=arguments.guarantee,
        confidence=arguments.confidence,
    )
    thresholds = _thresholds(arguments.thresholds)
    timed = integer("--timed", arguments.timed, 1, 10_000)
    own = {"min_layers": arguments.min_layers, "river_head": arguments.river_head}
    own = {name: value for name, value in own.items() if value is not None}
    config = shared.config(arguments)
    request(config, None, [0], own | {"max_new_tokens": arguments.max_new_tokens, "threshold": thresholds[0]})
    if arguments.output:
        check_output(arguments.output)
    if arguments.chat:
        read_template(shared.directory(arguments))
    prompts, is_right = _prompts(arguments)
    _, measured = split(prompts, arguments.per_layer)
    targets.check_prompts(prompts[number] for number in measured)
    depths = config.num_hidden_layers - (arguments.min_layers or 1) if arguments.per_layer else 0
    model = shared.load(arguments)
    start = time.perf_counter()
    with progress_bar(
        "calibrating", steps(len(prompts), len(thresholds), timed, depths), not arguments.json
    ) as advance:
        found = calibrate(
            model,
            [_tokens(model, prompt, arguments) for prompt in prompts],
            targets,
            thresholds,
            max_new_tokens=arguments.max_new_tokens,
            timed=timed,
            per_layer=arguments.per_layer,
            is_right=is_right,
            advance=advance,
            **own,
        )
    if arguments.json:
        print_json({**model_facts(model), **found.as_dict(), "prompts": len(prompts),
                     "threshold": found.chosen and found.chosen.threshold,
                     "draft_tokens": found.draft_tokens, "output": found.chosen and arguments.output,
                     "seconds": time.perf_counter() - start})  # fmt: skip
    else:
        _print(model, found, len(prompts))
    if found.chosen is None:
        raise RiverError(
            f"no threshold meets the target ({targets.text()}), so nothing is written; accepted: another "
            "target, other --thresholds, or --mode lossless, whose tokens are full depth's"
        )
    if arguments.output:  # what was measured is shown by now, should there be no place for it
        found.write(arguments.output, model)
        if not arguments.json:
            print(f"{printable(arguments.output)} is used with\n  {printable(_use(arguments))}")


def _thresholds(text: str | None) -> Sequence[float]:
    if text is None:
        return THRESHOLDS
    try:
        values = [number("--thresholds", float(part)) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(-2 <= value < 1 for value in values):
        raise RiverError(
            f"--thresholds {short(text)}; accepted: numbers from -2 to below 1, with commas between"
        )
    return values


def _prompts(arguments) -> tuple[list[str], Callable[[int, str], bool] | None]:
    """Texts, and whether an answer is right, where there is telling: of the demo's own problems."""
    if arguments.prompts:
        return read_texts(arguments.prompts, FIELDS)[: arguments.count], None
    problems = generator.held_out_problems(arguments.count or DEMO_PROBLEMS)
    return [item.prompt for item in problems], lambda i, text: generator.score_problem(text, problems[i])


def _tokens(model, prompt: str, arguments) -> list[int]:
    if model.text is None:
        raise RiverError("prompts are text, and this checkpoint has no tokenizer.json")
    if arguments.chat:
        tokens = model.text.chat([{"role": "user", "content": prompt}])
    else:
        tokens = model.text.encode(prompt)
    request(model.config, None, tokens, {"max_new_tokens": arguments.max_new_tokens})
    return tokens


def _print(model, found: Calibration, prompts: int) -> None:
    right = "" if found.right is None else f", {found.right} answers right"
    learnt = f", {found.learnt} of them to learn from" if found.learnt else ""
    print(
        f"{model_line(model)}\n{prompts} prompts{learnt}, {found.points[0].tokens} tokens of full depth at "
        f"{found.tokens_per_second:.3g} tokens/s{right}\n"
    )
    print_table(_curve_table(found))
    print()
    print_table(_drafts_table(found))
    print(
        f"\nGreedy, on {machine(model)}. same tokens, same answers: what the threshold draws as full depth\n"
        "does; bound: with this confidence, at least so many of all answers to such prompts. by bytes: what\n"
        f"reading fewer weights would give. speed: over full depth, the median of {found.timed} prompts in\n"
        "turns."
    )
    if found.chosen is None:
        return
    target = f"{found.targets.text()}, in answers of up to {found.max_new_tokens} tokens"
    print(f"\nFor {target}:\n  {_choice(found)}")


def _choice(found: Calibration) -> str:
    chosen = found.chosen.threshold
    values = " ".join(f"{value:.4g}" for value in chosen) if isinstance(chosen, tuple) else f"{chosen:g}"
    return f"threshold {values}; in lossless mode, draft_tokens {found.draft_tokens}"


def _use(arguments) -> str:
    """The command that generates with what was written."""
    model = ["--demo"] if arguments.model is None else ["--model", arguments.model]
    river = [] if arguments.river is None else ["--river", arguments.river]
    chat = ["--chat"] if arguments.chat else []  # a threshold is for such prompts as it was measured on
    own = [*model, *river, "--calibrated", arguments.output, *chat]
    return shlex.join(["river", "generate", *own, "a prompt"])


def _curve_table(found: Calibration) -> Table:
    confidence = found.targets.confidence
    table = _table("threshold", "exit depth", "same tokens", "same answers", f"{percent(confidence)} bound")
    if found.points[0].right is not None:
        table.add_column("right", justify="right")
    for head in ("by bytes", "speed"):
        table.add_column(head, justify="right")
    for point in found.points:
        table.add_row(*_cells(point, confidence), style="bold" if point is found.chosen else "")
    return table


def _cells(point: Point, confidence: float) -> list[str]:
    bound = 1 - upper_bound(point.different, point.answers, confidence)
    cells = [
        threshold_name(point.threshold),
        f"{point.exit_depth:.2f}",
        f"{100 * (1 - point.disagreement):.1f} %",
        f"{point.answers - point.different} of {point.answers}",
        f"{100 * bound:.1f} %",
    ]
    if point.right is not None:
        cells.append(f"{point.right} of {point.answers}")
    return [*cells, f"{point.by_bytes:.2f} x", f"{point.measured:.2f} x"]


def _drafts_table(found: Calibration) -> Table:
    table = _table("drafts", "tokens per pass", "right", "by bytes", "speed")
    for length in found.lengths:
        table.add_row(
            str(length.draft_tokens),
            f"{length.tokens_per_pass:.2f}",
            f"{100 * length.right:.0f} %",
            f"{length.by_bytes:.2f} x",
            f"{length.measured:.2f} x",
            style="bold" if length.draft_tokens == found.draft_tokens else "",
        )
    return table


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table
