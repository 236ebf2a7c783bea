"""`river eval`: quality and speed against full depth, on the bundled held-out items or on published tasks."""

import time
from collections.abc import Sequence
from pathlib import Path

from river_ext.checks import short
from river_ext.engine.request import integer, request
from river_ext.errors import RiverError
from river_ext.evaluation import measure
from river_ext.evaluation.measure import (
    DEMO_THRESHOLDS,
    Item,
    demo_items,
    depth_table,
    result_table,
    settings_of,
)
from river_ext.evaluation.tasks import TASKS, fitted
from river_ext.loading.chat import read_template
from river_ext.progress import progress_bar

from . import shared
from .shared import machine, model_facts, model_line
from .terminal import print_json, print_table

TASK_THRESHOLDS = (0.5, 0.9)


def run(arguments) -> None:
    (_tasks if arguments.tasks else _demo)(arguments)


def _settings(arguments, default: Sequence[float]) -> tuple[Sequence[float], dict]:
    """The thresholds of the River rows and their other options, checked against the model's config."""
    thresholds = shared.thresholds(arguments.thresholds, default)
    config = shared.config(arguments)
    names = ("deep_tokens", "kv_strategy")
    own = {name: v for name in names if (v := getattr(arguments, name)) is not None}
    for threshold in thresholds:
        request(config, None, [0], own | {"threshold": threshold, "max_new_tokens": 1})
    return thresholds, own


# --- the bundled items --------------------------------------------------------------------------------------


def _demo(arguments) -> None:
    problems = integer("--problems", arguments.problems, 0, 10_000)
    functions = integer("--functions", arguments.functions, 0, 10_000)
    if problems + functions == 0:
        raise RiverError("--problems 0 --functions 0; accepted: at least one of them above 0")
    thresholds, own = _settings(arguments, DEMO_THRESHOLDS)
    model = shared.load(arguments)
    items = demo_items(problems, functions, arguments.seed)
    settings = settings_of(model, thresholds, **own)
    start = time.perf_counter()
    with progress_bar("evaluating", len(items)) as advance:
        rows = measure.evaluate(
            model,
            [[item] for item in items],
            settings,
            max_new_tokens=measure.DEMO_NEW_TOKENS,
            on_batch=lambda batch, outputs: advance(),
        )
    seconds = time.perf_counter() - start
    if arguments.json:
        print_json({**model_facts(model), "problems": problems, "functions": functions,
                     "seed": arguments.seed, "batch": 1, "max_new_tokens": measure.DEMO_NEW_TOKENS,
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


# --- published tasks ----------------------------------------------------------------------------------------


def _tasks(arguments) -> None:
    names = list(dict.fromkeys(filter(None, map(str.strip, arguments.tasks.split(",")))))
    if not names:
        raise RiverError(f"--tasks {short(arguments.tasks)}; accepted: names with commas between")
    data = None if arguments.data is None else Path(arguments.data)
    limit = None if arguments.limit is None else integer("--limit", arguments.limit, 1)
    if arguments.max_gen_toks is not None:
        integer("--max-gen-toks", arguments.max_gen_toks, 1)
    if arguments.chat:
        read_template(shared.directory(arguments))
    thresholds, own = _settings(arguments, TASK_THRESHOLDS)
    jobs = [_job(name, arguments, data, limit) for name in names]  # before the weights are loaded
    model = shared.load(arguments)
    settings = settings_of(model, thresholds, **own)
    documents = []
    for job in jobs:
        start = time.perf_counter()
        rows = job.rows(model, settings)
        seconds = time.perf_counter() - start
        documents.append(job.facts() | {"seconds": seconds, "rows": [row.as_dict() for row in rows]})
        if not arguments.json:
            _print_task(job, rows, seconds, model)
    if arguments.json:
        print_json({**model_facts(model), "tasks": documents})


def _job(name: str, arguments, data: Path | None, limit: int | None):
    if name in TASKS and TASKS[name].runs_code and (data is None or not arguments.run_code):
        raise RiverError(
            f"{name} runs programs that the model writes; accepted: with --data and --run-code, in a sandbox"
        )
    if data is None or name not in TASKS:
        return HarnessJob(name, arguments, data, limit)
    return OwnJob(name, arguments, data, limit)


class OwnJob:
    """A task on documents of this machine."""

    def __init__(self, name: str, arguments, data: Path, limit: int | None):
        self.name, self.chat, self.task = name, arguments.chat, TASKS[name]
        self.max_gen_toks = arguments.max_gen_toks or self.task.max_gen_toks
        self.items = self.task.items(data, limit, arguments.chat)

    def facts(self) -> dict:
        return {
            "task": self.name,
            "by": "river",
            "documents": len(self.items),
            "shots": self.task.shots,
            "chat": self.chat,
            "stop": list(self.task.stop),
            "max_gen_toks": self.max_gen_toks,
            "batch": 1,
        }

    def how(self) -> str:
        return (
            f"{self.task.shots}-shot, {'chat' if self.chat else 'no chat'} template, max_gen_toks "
            f"{self.max_gen_toks}, greedy, one prompt at a time"
        )

    def rows(self, model, settings: Sequence) -> list:
        items = [Item(fitted(model, item.prompt, self.max_gen_toks), item.checks) for item in self.items]
        with progress_bar(self.name, len(items)) as advance:
            return measure.evaluate(
                model,
                [[item] for item in items],
                settings,
                divergence=False,
                on_batch=lambda batch, outputs: advance(),
                max_new_tokens=self.max_gen_toks,
                stop=self.task.stop,
            )


class HarnessJob:
    """A task that lm-evaluation-harness runs."""

    def __init__(self, name: str, arguments, data: Path | None, limit: int | None):
        try:
            from river_ext.evaluation import harness, harness_tasks
        except ModuleNotFoundError as error:
            own = ", ".join(TASKS)
            raise RiverError(
                f"task {name[:80]!r} needs lm-evaluation-harness, {error.name} is missing: pip install "
                f"'river_ext[eval]'; accepted without it: {own} with --data"
            ) from None
        harness_tasks.check(name, data)
        self.name, self.harness = name, harness
        self.options = {
            "data": data,
            "limit": limit,
            "chat": arguments.chat,
            "max_gen_toks": arguments.max_gen_toks,
            "score_by": "steps" if arguments.score_by_steps else "prefill",
        }

    def facts(self) -> dict:
        options = {name: value for name, value in self.options.items() if name != "data"}
        return {"task": self.name, "by": "lm-evaluation-harness"} | options

    def how(self) -> str:
        chat, limit = self.options["chat"], self.options["max_gen_toks"]
        scored = {
            "prefill": "Log-likelihoods come from the prefill, where decoding's exits have no say: "
            "--score-by-steps lets every token exit",
            "steps": "Log-likelihoods come token by token from the decoding path",
        }[self.options["score_by"]]
        toks = f"max_gen_toks {limit}" if limit else "max_gen_toks the task's, or 256"
        return f"{'chat' if chat else 'no chat'} template, {toks}, by lm-evaluation-harness.\n{scored}"

    def rows(self, model, settings: Sequence) -> list:
        return self.harness.evaluate(model, self.name, settings, **self.options)


def _print_task(job, rows: Sequence, seconds: float, model) -> None:
    totals = {share.total for row in rows for share in row.accuracy.values()}
    documents = ", ".join(map(str, sorted(totals)))
    print(f"{model_line(model)}\n{job.name}: {documents} documents\n")
    print_table(result_table(rows))
    print("\nExit depths, in % of the tokens:\n")
    print_table(depth_table(rows))
    print(
        f"\n{job.how()}.\nOn {machine(model)}, {seconds:.0f} s in all. Scores: with the standard error. "
        "exit depth: mean over the\ntokens. tokens/s: decoding alone, the median of the prompts.\n"
    )
