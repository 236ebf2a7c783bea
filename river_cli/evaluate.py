"""`river eval`: quality and speed against full depth, on the bundled held-out items."""

import time

from river_ext import evaluate
from river_ext.engine.request import integer, request
from river_ext.errors import RiverError
from river_ext.evaluate import DEMO_THRESHOLDS, demo_items, result_table, settings_of
from river_ext.progress import progress_bar

from . import shared
from .shared import machine, model_facts, model_line
from .terminal import print_json, print_table


def run(arguments) -> None:
    problems = integer("--problems", arguments.problems, 0, 10_000)
    functions = integer("--functions", arguments.functions, 0, 10_000)
    if problems + functions == 0:
        raise RiverError("--problems 0 --functions 0; accepted: at least one of them above 0")
    thresholds = shared.thresholds(arguments.thresholds, DEMO_THRESHOLDS)
    config = shared.config(arguments)
    names = ("deep_tokens", "kv_strategy")
    own = {name: v for name in names if (v := getattr(arguments, name)) is not None}
    for threshold in thresholds:
        request(config, None, [0], own | {"threshold": threshold, "max_new_tokens": 1})
    model = shared.load(arguments)
    items = demo_items(problems, functions, arguments.seed)
    settings = settings_of(model, thresholds, **own)
    start = time.perf_counter()
    with progress_bar("evaluating", len(items)) as advance:
        rows = evaluate.evaluate(
            model,
            [[item] for item in items],
            settings,
            max_new_tokens=evaluate.DEMO_NEW_TOKENS,
            on_batch=lambda batch, outputs: advance(),
        )
    seconds = time.perf_counter() - start
    if arguments.json:
        print_json({**model_facts(model), "problems": problems, "functions": functions,
                     "seed": arguments.seed, "batch": 1, "max_new_tokens": evaluate.DEMO_NEW_TOKENS,
                     "seconds": seconds, "rows": [row.as_dict() for row in rows]})  # fmt: skip
        return
    print(f"{model_line(model)}\n{problems} problems, {functions} functions (seed {arguments.seed})\n")
    print_table(result_table(rows))
    full = rows[0].name
    print(
        f"\nGreedy, one prompt at a time on {machine(model)}, {seconds:.0f} s in all.\n"
        "problems, functions: right ones, with the standard error. same output: token sequences that equal\n"
        f"{full}'s. KL: mean KL({full} || row) of the next token, along {full}'s sequences.\n"
        "exit depth: mean over the new tokens. tokens/s: decoding alone, the median of the prompts."
    )
