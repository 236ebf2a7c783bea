"""The KV strategies on the CPU beside each other: speed, quality and work, at two thresholds each.

On the bundled model with its held-out problems, and with --model on a checkpoint and the prompts of a file
(--prompts: JSON lines with a field "question", "prompt" or "text"). Batch 1, greedy. The settings take turns
on every prompt, --repeats times, so that a slow moment of the machine hits all alike.

ms is the mean time of a decoding step, of each step the fastest repetition; x is the speed over full bf16.
With one thread it is CPU time, which leaves out the moments in which other processes ran.
Quality is measured where every setting is fed the tokens of full bf16: `agree` is the share of positions at
which its likeliest token is that of full bf16, KL the mean divergence of its next token from full bf16's, in
nats. `right` counts answers to the problems. Work is in rows per token: one is a token through a layer of the
backbone (of these, recomputed ones apart), of the river, or through the projections of K and V alone.
"""

import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch

import river_ext
from bench.lib.common import machine, parser, results_path, save
from bench.lib.prompts import read_prompts
from river_ext.engine.request import KV_STRATEGIES
from river_ext.evaluation.measure import DEMO_NEW_TOKENS, Item, demo_items, kl_divergence

DEMO_THRESHOLDS = (0.9, 0.99)
WORK = ("backbone_rows", "recomputed_rows", "exit_rows", "projected_rows")  # of stats


def main() -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--problems", type=int, default=12, help="of the bundled model")
    p.add_argument("--model", type=Path, help="a checkpoint's directory")
    p.add_argument("--prompts", type=Path, help="JSON lines, for that checkpoint")
    p.add_argument("--chat", action="store_true", help="prompts go through the chat template")
    p.add_argument("--count", type=int, default=2, help="prompts of the file")
    p.add_argument("--new-tokens", type=int, default=32, help="of each of them")
    p.add_argument("--thresholds", type=float, nargs=2, default=(0.9, 0.98), help="relaxed and strict, there")
    p.add_argument("--repeats", type=int, default=3)
    args = p.parse_args()
    if (args.model is None) != (args.prompts is None):
        p.error("--model and --prompts need each other")
    path = results_path("kv_strategies", args)
    torch.set_num_threads(args.threads)
    print(f"{machine()['processor']}, {args.threads} threads")
    problems = demo_items(args.problems, 0)
    models = [measure(river_ext.load(), "bundled", problems, DEMO_NEW_TOKENS, DEMO_THRESHOLDS, args.repeats)]
    if args.model is not None:
        items = [Item(prompt) for prompt in read_prompts(args.prompts, args.count, args.chat)]
        model = river_ext.load(args.model)
        name = args.model.name
        models.append(measure(model, name, items, args.new_tokens, args.thresholds, args.repeats))
    print(save(path, {"machine": machine(), "repeats": args.repeats, "models": models}))


def settings_at(thresholds) -> dict[str, dict]:
    """Both bounds, and every strategy at every threshold."""
    return {"full bf16": {"mode": "full"}, "full W4": {"mode": "full_w4"}} | {
        f"{strategy} {threshold:g}": {"threshold": threshold, "kv_strategy": strategy}
        for threshold in thresholds
        for strategy in KV_STRATEGIES
    }


def measure(model, name: str, items: list[Item], new_tokens: int, thresholds, repeats: int) -> dict:
    settings = settings_at(thresholds)
    measured = {setting: defaultdict(list) for setting in settings}
    for options in settings.values():  # the first call of a path is slower
        model.generate(items[0].prompt, max_new_tokens=3, **options)
    for item in items:
        speeds(model, item, new_tokens, settings, measured, repeats)
        qualities(model, item, new_tokens, settings, measured)
    print(f"\n{name}, {model.config.num_hidden_layers} layers, {len(items)} prompts")
    print(
        f"{'':<16}{'ms':>8}{'x':>7}{'agree':>8}{'KL':>9}{'right':>7}{'depth':>7}"
        f"{'backbone':>10}{'recomp.':>9}{'river':>7}{'K, V':>7}"
    )
    full_ms = ms_of(measured["full bf16"])
    rows = [report(setting, one, full_ms) for setting, one in measured.items()]
    return {
        "model": name,
        "num_hidden_layers": model.config.num_hidden_layers,
        "prompts": len(items),
        "max_new_tokens": new_tokens,
        "settings": rows,
    }


def speeds(model, item: Item, new_tokens: int, settings: dict, measured: dict, repeats: int) -> None:
    seconds = defaultdict(list)  # by setting and repetition, of every step
    for _ in range(repeats):
        for name, options in settings.items():
            stream = model.stream(item.prompt, max_new_tokens=new_tokens, **options)
            seconds[name].append(seconds_of_steps(stream))
            if len(seconds[name]) == 1:  # the others say the same
                keep(stream.output, item, measured[name])
    for name, repetitions in seconds.items():
        measured[name]["seconds"] += map(min, zip(*repetitions, strict=True))


def seconds_of_steps(stream) -> list[float]:
    """Of every token but the first, which comes from the prefill."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = [clock() for _ in stream]
    return [after - before for before, after in pairwise(times)]


def keep(output, item: Item, one: dict) -> None:
    one["depth"] += output.exit_depths[1:]
    for kind in WORK:
        one[kind].append(getattr(output.stats, kind) * (len(output.tokens) - 1))
    if item.checks:
        one["right"].append(item.is_right(output.text))


def qualities(model, item: Item, new_tokens: int, settings: dict, measured: dict) -> None:
    """Of all tokens but the first, which comes from the prefill."""
    full = model.generate(item.prompt, max_new_tokens=new_tokens, mode="full", return_logits=True)
    prompt = model.text.encode(item.prompt) if isinstance(item.prompt, str) else model.text.chat(item.prompt)
    for name, options in settings.items():
        logits = model.score(prompt + full.tokens, prompt_length=len(prompt), **options).logits[1:]
        agrees = logits.argmax(-1) == full.logits[1:].argmax(-1)
        measured[name]["agree"] += agrees.tolist()
        measured[name]["kl"] += kl_divergence(full.logits[1:], logits).tolist()


def ms_of(one: dict) -> float:
    return 1e3 * fmean(one["seconds"])


def report(name: str, one: dict, full_ms: float) -> dict:
    line = {
        "setting": name,
        "ms_per_token": ms_of(one),
        "x_full_bf16": full_ms / ms_of(one),
        "tokens": len(one["seconds"]),
        "agreement": fmean(one["agree"]),
        "kl": fmean(one["kl"]),
        "positions": len(one["agree"]),
        "right": sum(one["right"]) if one["right"] else None,
        "mean_exit_depth": fmean(one["depth"]),
        **{kind: sum(one[kind]) / len(one["seconds"]) for kind in WORK},
    }
    right = "" if line["right"] is None else line["right"]
    print(
        f"{name:<16}{line['ms_per_token']:8.3f}{line['x_full_bf16']:7.2f}{line['agreement']:8.1%}"
        f"{line['kl']:9.4f}{right:>7}{line['mean_exit_depth']:7.2f}{line['backbone_rows']:10.2f}"
        f"{line['recomputed_rows']:9.2f}{line['exit_rows']:7.2f}{line['projected_rows']:7.2f}",
        flush=True,
    )
    return line


if __name__ == "__main__":
    main()
