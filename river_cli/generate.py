"""`river generate`: continues prompts, compares with full depth, and shows the demo."""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields

from rich.text import Text

from river_ext import trace
from river_ext.engine.engine import Engine
from river_ext.engine.request import Options, integer, request, strings
from river_ext.errors import RiverError
from river_ext.evaluation import measure
from river_ext.evaluation.measure import Item, demo_items, result_table, settings_of
from river_ext.loading.calibrated import read_calibrated
from river_ext.loading.chat import read_template
from river_ext.loading.config import read_config

from . import shared
from .shared import machine, model_facts, model_line
from .terminal import new_console, note, print_json, print_table, printable

ENGINE_OPTIONS = ("batch_policy", "exit_control")  # of `Model.generate`, beside those of a request
DEMO_PROBLEMS, DEMO_FUNCTIONS = 4, 2  # what `river generate --demo` shows


def run(arguments) -> None:
    options = own_options(arguments)
    prompts = arguments.prompts
    if arguments.chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    _check_request(arguments, options)
    model = shared.load(arguments)
    if not prompts:
        _show_demo(arguments, model, options)
    elif arguments.compare:
        _generate_and_compare(arguments, model, prompts, options)
    elif arguments.json or len(prompts) > 1:
        outputs = model.generate(prompts, progress=True, **options)
        if arguments.json:
            print_json({**model_facts(model), "options": options, "outputs": _outputs(prompts, outputs)})
        else:
            _print_texts(arguments.prompts, outputs)
        _write_trace(arguments, model, prompts, outputs, options)
        for output in outputs:
            output.checked()
        if not arguments.json:
            note(_summary(model, outputs, options))
    else:
        stream = model.stream(prompts[0], progress=True, **options)
        for piece in stream:
            print(printable(piece.text), end="", flush=True)
        print()
        _write_trace(arguments, model, prompts, [stream.output], options)
        note(_summary(model, [stream.output], options))


def own_options(arguments) -> dict:
    """Those of `Model.generate` that the command line has."""
    names = {field.name for field in fields(Options)} | set(ENGINE_OPTIONS)
    options = {name: v for name, v in vars(arguments).items() if name in names and v is not None}
    if arguments.calibrated is None:
        return options
    layers = read_config(shared.directory(arguments)).num_hidden_layers
    found = read_calibrated(arguments.calibrated, layers)
    return found.options(arguments.mode, arguments.threshold) | options


def _check_request(arguments, options: dict) -> None:
    """Refuses what can be refused before the weights are loaded."""
    if (arguments.compare or not arguments.prompts) and options.get("mode", "river") != "river":
        raise RiverError(f"mode={options['mode']!r}; accepted: no --mode, the comparison runs every one")
    if arguments.chat:
        read_template(shared.directory(arguments))
    check_options(arguments, options)
    if arguments.trace:
        trace.check_path(arguments.trace)


def check_options(arguments, options: dict) -> None:
    """Against the model's config."""
    strings("--stop", options.get("stop", ()))
    config = shared.config(arguments)
    integer("max_new_tokens", options.get("max_new_tokens", 1), 1, config.max_length - 1)
    Engine.check(**{name: options[name] for name in ENGINE_OPTIONS if name in options})
    own = {name: value for name, value in options.items() if name not in ENGINE_OPTIONS}
    request(config, None, [0], own | {"max_new_tokens": 1, "stop": ()})


def _write_trace(arguments, model, prompts: Sequence, outputs: Sequence, options: dict) -> None:
    """If it is asked for."""
    if arguments.trace:
        trace.write(trace.exit_trace(model, list(prompts), outputs, options), arguments.trace)


def _outputs(prompts: Sequence, outputs: Sequence) -> list[dict]:
    """For JSON."""
    return [{"prompt": prompt} | output.to_dict() for prompt, output in zip(prompts, outputs, strict=True)]


def _print_texts(prompts: Sequence[str], outputs: Sequence) -> None:
    """One text alone is printed as it is; several have a line before each that says which one it is."""
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True), start=1):
        if len(prompts) > 1:
            print(f"--- {number}: {printable(' '.join(prompt.split())[:80])}")
        print(printable(output.text))


def _summary(model, outputs: Sequence, options: dict) -> str:
    depths = [depth for output in outputs for depth in output.exit_depths]
    drafts = sum(output.stats.drafts for output in outputs)
    if drafts:
        steps = sum(output.stats.steps for output in outputs)
        decoded = sum(output.stats.new_tokens - 1 for output in outputs)
        right = sum(output.stats.accepted_drafts for output in outputs) / drafts
        how = f"{decoded / steps:.2f} per backbone pass, {right:.0%} of the drafts were right"
    else:
        mean = sum(depths) / len(depths)
        how = f"mean exit depth {mean:.2f} of {model.config.num_hidden_layers} layers"
    compare = "--compare" if options.get("mode", "river") == "river" else "--compare in place of --mode"
    return f"{len(depths)} new tokens, {how}; {compare} shows speed and agreement with full depth"


def _generate_and_compare(arguments, model, prompts: list, options: dict) -> None:
    settings, common = _settings(model, options)
    shown = []
    rows = measure.evaluate(
        model,
        [[Item(prompt) for prompt in prompts]],
        settings,
        divergence=False,
        on_batch=lambda batch, outputs: shown.extend(outputs[-1]),
        **common,
    )
    _write_trace(arguments, model, prompts, shown, options)
    if arguments.json:
        print_json({**model_facts(model), "options": options, "outputs": _outputs(prompts, shown),
                     "rows": [row.as_dict() for row in rows]})  # fmt: skip
        return
    _print_texts(arguments.prompts, shown)
    _print_comparison(model, rows, shown)
    print(f"Together, at batch {len(prompts)}, on {machine(model)}.")


def _settings(model, options: dict) -> tuple[list, dict]:
    """Full depth, lossless, full W4 and River, and the options that they have in common."""
    names = ("min_layers", "prefill", "river_head", "deep_tokens", "kv_strategy")
    own = {name: options[name] for name in names if name in options}
    threshold = options.get("threshold", Options.threshold)
    common = {name: v for name, v in options.items() if name not in ("mode", "threshold", *own)}
    return settings_of(model, [threshold], **own), common


def _show_demo(arguments, model, options: dict) -> None:
    """Held-out prompts through the river, then what that costs and gains."""
    seed = options.get("seed", 0)
    items = demo_items(DEMO_PROBLEMS, DEMO_FUNCTIONS, seed)
    settings, common = _settings(model, {"max_new_tokens": measure.DEMO_NEW_TOKENS} | options)
    river = settings[-1]
    shown = []

    def show(batch, outputs):
        (item,), (output,) = batch, outputs[-1]
        shown.append(output)
        if not arguments.json:
            _print_demo_item(item, output.text)

    if not arguments.json:
        print(f"{model_line(model)}\n{river.name}, on prompts that are not in its training data:\n")
    rows = measure.evaluate(
        model, [[item] for item in items], settings, divergence=False, on_batch=show, **common
    )
    _write_trace(arguments, model, [item.prompt for item in items], shown, options)
    if arguments.json:
        print_json({**model_facts(model), "options": options,
                     "outputs": _outputs([item.prompt for item in items], shown),
                     "rows": [row.as_dict() for row in rows]})  # fmt: skip
        return
    _print_comparison(model, rows, shown)
    print(
        f"One prompt at a time on {machine(model)}; tokens/s is decoding alone, the median of the prompts.\n"
        "A model as small as this one says little about the speed of large ones: see bench/."
    )


def _print_demo_item(item, text: str) -> None:
    right = item.is_right(text)
    mark = ("  right", "bold green") if right else ("  wrong", "bold red")
    line = Text.assemble((item.prompt, "dim"), printable(text).rstrip(), mark)
    new_console().print(line, soft_wrap=not sys.stdout.isatty())
    print()


def _print_comparison(model, rows: Sequence, outputs: Sequence) -> None:
    """The table of the settings, the river's exit depths, and its agreement with full depth."""
    river = rows[-1]
    print_table(result_table(rows))
    print(f"\nExit depths of {river.name}, {river.new_tokens} tokens:")
    print("\n".join(_histogram(outputs)))
    tokens, exited = river.equal_tokens, river.equal_exited_tokens
    early = f";\nof the {exited.total} that exited early, {exited.count} are" if exited else ""
    print(f"\n{tokens.count} of {tokens.total} tokens are what full depth has at the same place{early}.\n")


def _histogram(outputs: Sequence) -> list[str]:
    """Text bars of how many tokens had which exit depth; first tokens have the prefill's depth."""
    counts = Counter(depth for output in outputs for depth in output.exit_depths[1:])
    first = Counter(output.exit_depths[0] for output in outputs)
    longest = max((counts + first).values())
    bar = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    lines = []
    for depth in sorted(counts | first):
        count = counts[depth] + first[depth]
        prompts = f"  ({first[depth]} by the prefill)" if first[depth] else ""
        lines.append(f"  {depth:3}  {bar * math.ceil(40 * count / longest)} {count}{prompts}")
    return lines
