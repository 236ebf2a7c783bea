"""`river bench`: the speed of every mode on a model, or on random weights in the shape of a config."""

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch
from rich.table import Table

from river_ext import benchmark
from river_ext.benchmark import Result, peak_memory_bytes
from river_ext.demo_tasks.generator import held_out_problems
from river_ext.engine.request import Options, integer, request
from river_ext.errors import RiverError
from river_ext.evaluation.measure import Share
from river_ext.loading.chat import read_template
from river_ext.loading.checkpoint import lone_config
from river_ext.loading.config import ModelConfig, parse_dtype, read_config_file
from river_ext.model import Model, choose_device
from river_ext.progress import progress_bar
from river_ext.random_model import random_model

from . import shared
from .shared import machine, model_facts, model_line, thresholds
from .terminal import print_json, print_table, size_text

PROMPT_TOKENS, PROBLEMS = 128, 3  # of random ids, where there is no text; of the text that is there else


def run(arguments) -> None:
    alone = lone_config(shared.directory(arguments))
    config = shared.config(arguments) if alone is None else read_config_file(alone)
    own = _check(arguments, config, random=alone is not None)
    model = shared.load(arguments) if alone is None else _random_model(arguments, config, alone.parent)
    prompts, common = _prompts(arguments, model), {"max_new_tokens": arguments.new_tokens}
    if arguments.prompt_tokens or not model.text:
        common["stop_tokens"] = ()  # random ids have no end
    settings = benchmark.settings_of(model, **own)
    start = time.perf_counter()
    with progress_bar("measuring", arguments.turns * len(prompts) * len(settings)) as advance:
        results = benchmark.benchmark(
            model, prompts, settings, turns=arguments.turns, on_run=advance, **common
        )
    facts = {
        **model_facts(model),
        "machine": benchmark.machine(),
        "random_weights": alone is not None,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "new_tokens": arguments.new_tokens,
        "turns": arguments.turns,
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": peak_memory_bytes(model.network.device),
    }
    if arguments.json:
        print_json({**facts, "results": [result.as_dict() for result in results]})
    else:
        _print(model, results, facts)


def _check(arguments, config: ModelConfig, random: bool) -> dict:
    """The options of `settings_of`; refuses what can be refused before weights are loaded or drawn."""
    if random and arguments.river is not None:
        raise RiverError("--river belongs to the weights of a model, and here is a config.json alone")
    if random and (arguments.file or arguments.chat):
        given = "--chat" if arguments.chat else "--file"
        raise RiverError(f"{given} with random weights, which read no text; accepted: --prompt-tokens")
    if arguments.chat:
        read_template(shared.directory(arguments))
    integer("--turns", arguments.turns, 1, 1000)
    new_tokens = integer("--new-tokens", arguments.new_tokens, 2, config.max_length - 1)
    if arguments.prompt_tokens is not None:
        integer("--prompt-tokens", arguments.prompt_tokens, 1, config.max_length - new_tokens)
    names = ("min_layers", "river_head")
    own = {name: v for name in names if (v := getattr(arguments, name)) is not None}
    values = thresholds(arguments.thresholds, (Options.threshold,))
    for threshold in values:
        request(config, None, [0], own | {"threshold": threshold, "max_new_tokens": 1})
    return own | {"thresholds": values}


def _random_model(arguments, config: ModelConfig, directory) -> Model:
    if arguments.dtype != "auto":
        config = replace(config, dtype=parse_dtype(arguments.dtype, "--dtype"))
    return random_model(config, choose_device(arguments.device), directory)


def _prompts(arguments, model: Model) -> list[list[int]]:
    """Token ids: of the files, or random ones, or of word problems where the model reads text."""
    if arguments.prompt_tokens or not model.text:
        count = arguments.prompt_tokens or min(PROMPT_TOKENS, model.config.max_length - arguments.new_tokens)
        draw = torch.Generator().manual_seed(0)
        return [torch.randint(0, model.config.vocab_size, (count,), generator=draw).tolist()]
    texts = arguments.prompts or [problem.prompt for problem in held_out_problems(PROBLEMS)]
    if arguments.chat:
        return [model.text.chat([{"role": "user", "content": text}]) for text in texts]
    return [model.text.encode(text) for text in texts]


# --- what it prints -----------------------------------------------------------------------------------------


def _print(model: Model, results: Sequence[Result], facts: dict) -> None:
    lengths = ", ".join(map(str, facts["prompt_tokens"]))
    prompts = "a prompt" if len(facts["prompt_tokens"]) == 1 else "prompts"
    print(
        f"{model_line(model)}{', random weights' if facts['random_weights'] else ''}\n"
        f"{facts['machine']['processor']}, on {machine(model)}; {prompts} of {lengths} tokens, "
        f"up to {facts['new_tokens']} new ones, {facts['turns']} turns\n"
    )
    print_table(_table(results))
    full, memory = results[0].name, size_text(facts["peak_memory_bytes"])
    read = median(run.read_gb_per_second for run in results[0].runs)
    print(
        "\nMedians of the runs. ms per token, of all tokens: the wait for those that come together, over\n"
        "their number. tokens/s, speed: after the first token. GB/s: weights and cache that steps read; of\n"
        f"read: beside a plain read of the weights ({read:.1f} GB/s). right: drafts. same: outputs that\n"
        f"equal those of {full}. weights: those that a setting uses; the whole process took up to {memory}."
    )
    if facts["random_weights"]:
        print("Random weights: depths, drafts and outputs say nothing of a trained model.")


def _table(results: Sequence[Result]) -> Table:
    columns = [
        ("", [result.name for result in results]),
        ("first token", [f"{result.first_token_ms:.1f} ms" for result in results]),
        ("prompt tokens/s", [f"{result.prompt_tokens_per_second:.0f}" for result in results]),
        ("ms per token: p50", [_text(result.token_ms_p50, ".2f") for result in results]),
        ("p95", [_text(result.token_ms_p95, ".2f") for result in results]),
        ("tokens/s", [_text(result.tokens_per_second, ".1f") for result in results]),
        ("speed", [_text(result.x_full, ".2f", " x") for result in results]),
        ("GB/s", [_text(result.gb_per_second, ".1f") for result in results]),
        ("of read", [_text(result.percent_of_read, ".0f", " %") for result in results]),
        ("exit depth", [_text(result.exit_depth, ".2f") for result in results]),
        ("right", [_percent(result.acceptance) for result in results]),
        ("same", [f"{result.same_output.count} of {result.same_output.total}" for result in results]),
        ("weights", [size_text(result.weight_bytes) for result in results]),
    ]  # fmt: skip
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head, _ in columns:
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for values in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*values)
    return table


def _percent(share: Share | None) -> str:
    return "" if share is None else f"{100 * share.value:.0f} %"


def _text(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
