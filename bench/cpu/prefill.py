"""Prompts on the CPU: the time to the first token, with random weights, beside transformers on the same ones.

One line per shape and length: ms | tokens/s | transformers' ms | how many times as long that is | ms that
torch's bf16 linears alone take for all rows of the prompt, the well-tuned peak of this machine | % of that
peak. All three take turns; ms are medians of turns, x and % medians of what each turn says.
"""

import random
import time
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from bench.lib.common import machine, parser, results_path, save
from bench.lib.models import LLAMA_1B
from bench.lib.peers import llama_around
from bench.lib.weights import random_river, random_weights
from river_ext.engine.generate import Engines, generate
from river_ext.engine.network import Network
from river_ext.loading.weights import BlockShape, ModelWeights

SHAPES = {
    "135M": replace(
        LLAMA_1B, vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3,
    ),
    "1B": LLAMA_1B,
}  # fmt: skip
PROMPTS = {"135M": [128, 1024, 4096], "1B": [128, 1024]}


def main() -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    p.add_argument("--prompt-tokens", type=int, nargs="+", help="default: 128 to 4,096 by the shape")
    p.add_argument("--turns", type=int, default=7)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    path = results_path("prefill", args)
    torch.manual_seed(0)
    print(f"{machine()['processor']}, {args.threads} threads")
    header = f"{'shape':<6}{'tokens':>7}{'ms':>9}{'tok/s':>8}{'transformers':>14}{'x':>6}"
    print(header + f"{'products':>10}{'%':>5}")
    lines = []
    for name in args.shapes:
        lines += measure(name, args.prompt_tokens or PROMPTS[name], args.turns)
    print(save(path, {"machine": machine(), "turns": args.turns, "prefill": lines}))


def measure(name: str, lengths: list[int], turns: int) -> list[dict]:
    config = SHAPES[name]
    weights = random_weights(config)
    engines = Engines(Network(config, weights, random_river(config)), text=None)
    peer = llama_around(config, weights)
    lines = []
    for length in lengths:
        prompt = torch.randint(0, config.vocab_size, (length,)).tolist()
        calls = {
            "river_ext": partial(first_token, engines, prompt),
            "transformers": partial(transformers_first_token, peer, prompt),
            "products": partial(products, config, weights, length),
        }
        seconds = taking_turns(calls, turns)
        ms = {label: 1e3 * median(values) for label, values in seconds.items()}
        line = {
            "shape": name, "tokens": length, "ms": ms["river_ext"],
            "tokens_per_second": 1e3 * length / ms["river_ext"],
            "transformers_ms": ms["transformers"], "products_ms": ms["products"],
            "x_transformers": ratio(seconds, "transformers", "river_ext"),
            "percent_of_products": 100 * ratio(seconds, "products", "river_ext"),
            "ms_all": {label: [1e3 * value for value in values] for label, values in seconds.items()},
        }  # fmt: skip
        lines.append(line)
        print(
            f"{name:<6}{length:7}{line['ms']:9.1f}{line['tokens_per_second']:8.1f}{line['transformers_ms']:14.1f}"
            f"{line['x_transformers']:6.2f}{line['products_ms']:10.1f}{line['percent_of_products']:5.0f}",
            flush=True,
        )
    return lines


def taking_turns(calls: dict, turns: int) -> dict[str, list[float]]:
    """Seconds of calls, in random order turn by turn. The first turn warms up."""
    seconds = {label: [] for label in calls}
    order = list(calls)
    for turn in range(turns + 1):
        random.Random(turn).shuffle(order)
        for label in order:
            start = time.perf_counter()
            calls[label]()
            if turn > 0:
                seconds[label].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, other: str) -> float:
    return median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))


def first_token(engines: Engines, prompt: list[int]) -> None:
    options = {"mode": "full", "max_new_tokens": 1, "stop_tokens": ()}
    generate(engines, prompt, options, batch_policy="row", exit_control="auto")


@torch.inference_mode()
def transformers_first_token(model, prompt: list[int]) -> None:
    model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1).logits.argmax(-1)


@torch.inference_mode()
def products(config, weights: ModelWeights, rows: int) -> None:
    """The linears of all layers for the rows of a prompt, by torch."""
    sizes = BlockShape.of(config).projections()
    inputs = {size[1]: torch.randn(rows, size[1]).bfloat16() for size in sizes.values()}
    for layer in weights.layers:
        for name, (_, columns) in sizes.items():
            torch.nn.functional.linear(inputs[columns], getattr(layer, name))


if __name__ == "__main__":
    main()
