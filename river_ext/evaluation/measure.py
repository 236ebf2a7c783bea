"""Quality and speed beside each other: the rows of every table that this project prints.

A table has a row for each setting of one model: full depth, which is the reference, lossless decoding, which
gives the same tokens, full W4, which is the river's ceiling in speed, and the river. The settings take turns
on every prompt, so that whatever else the machine does meets all of them alike. Prompts run one at a time.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, zip_longest

import torch
from rich.table import Table
from torch import Tensor

from ..engine.exit_rule import threshold_name
from ..engine.request import is_calibrated
from ..engine.sequence import GenerationOutput
from ..model import Model

DEMO_THRESHOLDS = (0.5, 0.9, 0.98, 0.99, 0.995)  # from the river's speed to near full depth
DEMO_NEW_TOKENS = 128  # the longest of the demo's answers has 90 tokens
PROBLEMS, FUNCTIONS = "problems", "functions"  # the demo's tasks
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Item:
    """A prompt, as `Model.generate` takes it, and by name what says whether a continuation is right."""

    prompt: str | list
    checks: Mapping[str, Callable[[str], bool]] = field(default_factory=dict)

    def is_right(self, text: str) -> bool:
        """By every check."""
        return all(check(text) for check in self.checks.values())


@dataclass(frozen=True)
class Setting:
    """What a row of a table measures: keyword arguments of `Model.generate` that `Model.score` has too."""

    name: str
    options: dict


@dataclass(frozen=True)
class Share:
    """`count` of `total`."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total

    @property
    def standard_error(self) -> float:
        """Of a share as an estimate from `total` independent samples: sqrt(p (1 - p) / n)."""
        return math.sqrt(self.value * (1 - self.value) / self.total)

    def as_dict(self) -> dict:
        return asdict(self) | {"value": self.value, "standard_error": self.standard_error}

    def __str__(self) -> str:
        if self.total < 30:  # too few for percents
            return f"{self.count} of {self.total}"
        return f"{100 * self.value:.1f} ± {100 * self.standard_error:.1f} %"


@dataclass(frozen=True)
class Row:
    """What one setting scored. `equal_*` compare with the first row's outputs."""

    name: str
    options: dict
    accuracy: dict[str, Share]  # by check
    equal_sequences: Share | None  # outputs that are the same from end to end; None if none are compared
    equal_tokens: Share | None  # tokens that are the same, position by position
    equal_exited_tokens: Share | None  # the same, of the tokens that exited early; None if none did
    kl: float | None  # mean KL(first row || this) in nats per token, along the first row's tokens
    new_tokens: int
    mean_exit_depth: float  # over all new tokens; the first of a sequence has the prefill's depth
    tokens_by_depth: list[int]  # the new tokens that left after 0, 1, ... backbone layers
    tokens_per_second: float | None  # decoded tokens per decoding second: the median over the batches

    def as_dict(self) -> dict:
        """For JSON: shares with their values."""
        shares = {
            name: share and share.as_dict()
            for name, share in vars(self).items()
            if name in ("equal_sequences", "equal_tokens", "equal_exited_tokens")
        }
        accuracy = {name: share.as_dict() for name, share in self.accuracy.items()}
        return vars(self) | shares | {"accuracy": accuracy}


def full_name(model: Model) -> str:
    return f"full {DTYPE_NAMES[model.network.dtype]}"


def settings_of(model: Model, thresholds: Sequence[float | str], **options) -> list[Setting]:
    """Full depth, the same by lossless decoding, full W4, and the river at some thresholds and options."""
    strategy = options.get("kv_strategy", "share")
    river = "River" if strategy == "share" else strategy
    found = model.config.calibrated  # whose number, or numbers, "calibrated" stands for
    names = [threshold_name(found.threshold if is_calibrated(t) else t) for t in thresholds]
    rivers = [
        Setting(f"{river} {name}", {"mode": "river", "threshold": t, **options})
        for name, t in zip(names, thresholds, strict=True)
    ]
    modes = {full_name(model): "full", "lossless": "lossless", "full W4": "full_w4"}
    return [Setting(name, {"mode": mode}) for name, mode in modes.items()] + rivers


def demo_items(problems: int, functions: int, seed: int = 0) -> list[Item]:
    """Held-out word problems and functions. Functions are checked by an interpreter that runs no code."""
    from ..demo_tasks import generator  # only who asks for the demo's tasks needs it

    def items(task: str, found: Iterable, is_right: Callable) -> list[Item]:
        return [Item(item.prompt, {task: lambda text, item=item: is_right(text, item)}) for item in found]

    return items(PROBLEMS, generator.held_out_problems(problems, seed), generator.score_problem) + items(
        FUNCTIONS, generator.held_out_functions(functions, seed), generator.score_function
    )


def evaluate(
    model: Model,
    batches: Sequence[Sequence[Item]],
    settings: Sequence[Setting],
    *,
    divergence: bool = True,
    on_batch: Callable[[Sequence[Item], list[list[GenerationOutput]]], None] | None = None,
    **options,
) -> list[Row]:
    """One row for each setting; the first one is the reference of the others.

    Args:
        batches: prompts that are generated together, usually one.
        divergence: compute the KL, for which batches need to be of one prompt.
        on_batch: called after each batch with the outputs of every setting.
        options: more keyword arguments of `Model.generate`, for all settings.
    """
    if divergence and any(len(batch) != 1 for batch in batches):
        raise ValueError("divergence needs batches of one prompt")
    tallies = [_Tally(setting, model.config.num_hidden_layers) for setting in settings]
    few = {"max_new_tokens": min(2, options.get("max_new_tokens", 2))}
    for setting in settings:  # the first call of a path is slower
        model.generate(batches[0][0].prompt, **options | setting.options | few)
    for batch in batches:
        prompts = [item.prompt for item in batch]
        outputs = [
            model.generate(prompts, return_logits=divergence, **options, **setting.options)
            for setting in settings
        ]
        for output in chain.from_iterable(outputs):
            output.checked()
        for tally, output in zip(tallies, outputs, strict=True):
            tally.add(batch, output, outputs[0])
            if divergence:
                tally.divergences += _divergences(model, prompts[0], output[0], outputs[0][0], tally.setting)
        if on_batch:
            on_batch(batch, outputs)
    return [tally.row() for tally in tallies]


def depth_row(
    setting: Setting, accuracy: dict, depths: Sequence[int], speeds: Sequence[float], layers: int, **compared
) -> Row:
    """A row of what is known of all tokens, their exit depths, and what was compared with the reference."""
    names = ("equal_sequences", "equal_tokens", "equal_exited_tokens", "kl")
    return Row(
        name=setting.name,
        options=setting.options,
        accuracy=accuracy,
        new_tokens=len(depths),
        mean_exit_depth=statistics.fmean(depths),
        tokens_by_depth=[depths.count(depth) for depth in range(layers + 1)],
        tokens_per_second=statistics.median(speeds) if speeds else None,
        **dict.fromkeys(names) | compared,
    )


@dataclass
class _Tally:
    """A row in the making."""

    setting: Setting
    layers: int
    depths: list[int] = field(default_factory=list)  # by token
    rights: dict[str, list[bool]] = field(default_factory=dict)  # by check
    equal: list[bool] = field(default_factory=list)  # by sequence
    same: list[tuple[bool, bool]] = field(default_factory=list)  # by token: (the same, it exited early)
    divergences: list[float] = field(default_factory=list)  # by token of the reference
    speeds: list[float] = field(default_factory=list)  # by batch

    def add(self, batch: Sequence[Item], outputs: Sequence[GenerationOutput], references) -> None:
        decoded = sum(len(output.tokens) - 1 for output in outputs)
        if decoded:
            # rows of a batch decode together: the one that stayed longest saw all of the steps
            self.speeds.append(decoded / max(output.stats.decode_seconds for output in outputs))
        for item, output, reference in zip(batch, outputs, references, strict=True):
            for name, is_right in item.checks.items():
                self.rights.setdefault(name, []).append(is_right(output.text))
            self.equal.append(output.tokens == reference.tokens)
            self.depths += output.exit_depths
            exited = [depth < self.layers for depth in output.exit_depths]
            self.same += [
                (token == other, early)
                for token, other, early in zip_longest(output.tokens, reference.tokens, exited)
            ]

    def row(self) -> Row:
        exited = [same for same, early in self.same if early]
        return depth_row(
            self.setting,
            {name: _share(rights) for name, rights in self.rights.items()},
            self.depths,
            self.speeds,
            self.layers,
            equal_sequences=_share(self.equal),
            equal_tokens=_share([same for same, _ in self.same]),
            equal_exited_tokens=_share(exited) if exited else None,
            kl=statistics.fmean(self.divergences) if self.divergences else None,
        )


def _share(flags: Sequence[bool]) -> Share:
    return Share(sum(flags), len(flags))


def _divergences(
    model: Model, prompt: str, output: GenerationOutput, reference: GenerationOutput, setting: Setting
) -> list[float]:
    """KL at every token of the reference, with the setting fed the reference's tokens.

    Where it generated them by itself, its logits are the ones that it has when fed.
    """
    logits = output.logits
    if output.tokens != reference.tokens:
        tokens = model.text.encode(prompt)
        logits = model.score(tokens + reference.tokens, prompt_length=len(tokens), **setting.options).logits
    return kl_divergence(reference.logits, logits).tolist()


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) of each row, in nats."""
    p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def result_table(rows: Sequence[Row]) -> Table:
    """Rows as text; columns that no row has a value for are left out."""
    cells: dict[str, list[str]] = {"": [row.name for row in rows]}
    for name in dict.fromkeys(chain.from_iterable(row.accuracy for row in rows)):
        cells[name] = [str(row.accuracy[name]) if name in row.accuracy else "" for row in rows]
    first = rows[0].tokens_per_second
    cells["same output"] = [_percent(row.equal_sequences) for row in rows]
    cells["KL, nats"] = [_number(row.kl, ".4f") for row in rows]
    cells["exit depth"] = [_number(row.mean_exit_depth, ".2f") for row in rows]
    cells["tokens/s"] = [_number(row.tokens_per_second, ".3g") for row in rows]
    cells["speed"] = [
        f"{row.tokens_per_second / first:.2f} x" if first and row.tokens_per_second else "" for row in rows
    ]
    return _table({head: column for head, column in cells.items() if any(column)})


def depth_table(rows: Sequence[Row]) -> Table:
    """Where the tokens of each row left: in percent, by ranges of depths."""
    layers = len(rows[0].tokens_by_depth) - 1
    width = max(1, math.ceil((layers - 1) / 6))
    starts = [0, *range(1, layers, width), layers]
    cells = {"": [row.name for row in rows]}
    for start, end in zip(starts, [*starts[1:], layers + 1], strict=True):
        head = str(start) if end == start + 1 else f"{start}-{end - 1}"
        cells[head] = [_of_all(sum(row.tokens_by_depth[start:end]), row.new_tokens) for row in rows]
    return _table(cells)


def _of_all(count: int, total: int) -> str:
    return f"{100 * count / total:.0f}" if count else "-"


def _table(cells: Mapping[str, list[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head in cells:
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for values in zip(*cells.values(), strict=True):
        table.add_row(*values)
    return table


def _percent(share: Share | None) -> str:
    if share is None:
        return ""
    return str(share) if share.total < 30 else f"{100 * share.value:.1f} %"


def _number(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if form == ".3g" and value >= 100 else f"{value:{form}}"
