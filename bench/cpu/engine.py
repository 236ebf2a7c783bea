"""Requests through the engine on the CPU: tokens per second of several at once, over one at a time.

In the shape of Llama-3.2-1B, or of a 135M model, with random weights, full bf16 and full W4, each request
with a prompt of 32 tokens. x is the speed over one request; `of bytes` is the share of what the bytes allow:
a step reads the weights once for all its rows.
"""

import time
from statistics import median

import torch

from bench.cpu.prefill import SHAPES
from bench.lib.common import machine, parser, results_path, save
from bench.lib.weights import random_network
from river_ext.engine.engine import Engine

MODES = {"full bf16": {"mode": "full"}, "full W4": {"mode": "full_w4", "river_head": "w4"}}


def main() -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    p.add_argument("--requests", type=int, nargs="+", default=[1, 2, 4, 8])
    p.add_argument("--new-tokens", type=int, default=25)
    p.add_argument("--turns", type=int, default=5)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    path = results_path("engine", args)
    print(f"{machine()['processor']}, {args.threads} threads")
    lines = [line for shape in args.shapes for line in measure(shape, args)]
    print(save(path, {"machine": machine(), "new_tokens": args.new_tokens, "engine": lines}))


def measure(shape: str, args) -> list[dict]:
    network = random_network(SHAPES[shape], "cpu")
    engines = {count: Engine(network, None, slots=count, max_len=64) for count in args.requests}
    seconds = {(mode, count): [] for mode in MODES for count in args.requests}
    for _ in range(args.turns):
        for mode, count in seconds:
            seconds[mode, count].append(step_seconds(engines[count], count, MODES[mode], args.new_tokens))
    print(f"\n{shape}\n{'':<12}{'requests':>9}{'ms/step':>9}{'tok/s':>8}{'x':>7}{'of bytes':>10}")
    lines = []
    for (mode, count), times in seconds.items():
        typical, one = median(times), median(seconds[mode, args.requests[0]])
        line = {
            "shape": shape, "mode": mode, "requests": count, "ms_per_step": 1e3 * typical,
            "tokens_per_second": count / typical, "x_one": count * one / typical, "of_bytes": one / typical,
            "ms_all": [1e3 * value for value in times],
        }  # fmt: skip
        lines.append(line)
        print(
            f"{mode:<12}{count:9}{line['ms_per_step']:9.1f}{line['tokens_per_second']:8.1f}{line['x_one']:7.2f}"
            f"{line['of_bytes']:10.0%}",
            flush=True,
        )
    return lines


def step_seconds(engine: Engine, requests: int, options: dict, new_tokens: int) -> float:
    """Of a step in which all requests draw a token."""
    vocab_size = engine.network.config.vocab_size
    for number in range(requests):
        prompt = torch.randint(0, vocab_size, (32,)).tolist()
        engine.submit(prompt, id=number, max_new_tokens=new_tokens, stop_tokens=(), **options)
    begun, seconds = set(), []
    while engine.busy:
        start, all_begun = time.perf_counter(), len(begun) == requests
        events = engine.step()
        if all_begun and len(events) == requests:
            seconds.append(time.perf_counter() - start)
        begun.update(event.id for event in events)
    return median(seconds)


if __name__ == "__main__":
    main()
