"""Whole decoding steps on the CPU, batch 1, in the shape of Llama-3.2-1B with random weights.

Rows: full bf16, full W4 with either head, fixed exit depths, and transformers on the same tensors (eager with
its default cache; with --compile also under torch.compile with a static cache). A fixed depth d is threshold
-2 with min_layers d. GB/s counts the bytes of weights that a token reads; % is the time that a plain read of
exactly these tensors takes; `allowed` is what the bytes alone would give over full bf16. Random weights make
random text, and time does not depend on it.
"""

import importlib.util
import time
from statistics import median

import torch

from bench.lib.common import machine, parser, reader, results_path, save
from bench.lib.models import LLAMA_1B
from bench.lib.peers import llama_around
from bench.lib.weights import random_river, random_weights
from river_ext.engine.generate import Engines, generate
from river_ext.engine.network import Network
from river_ext.loading.config import ModelConfig
from river_ext.loading.weights import ModelWeights
from river_ext.quant.exit_river import ExitRiver


def main() -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 8])
    p.add_argument("--prompt-tokens", type=int, default=32)
    p.add_argument("--new-tokens", type=int, default=33)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--compile", action="store_true", help="also transformers under torch.compile (minutes)")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    path = results_path("decode", args)
    torch.manual_seed(0)
    config = LLAMA_1B
    weights, river = random_weights(config), random_river(config)
    engines = Engines(Network(config, weights, river), text=None)
    prompt = torch.randint(0, config.vocab_size, (args.prompt_tokens,)).tolist()

    runs = {
        "full bf16": ({"mode": "full"}, config.num_hidden_layers),
        "full W4": ({"mode": "full_w4"}, 0),
        "full W4, W4 head": ({"mode": "full_w4", "river_head": "w4"}, 0),
    }
    runs |= {f"exit depth {d}": ({"threshold": -2.0, "min_layers": d}, d) for d in args.depths}
    seconds = {name: [] for name in runs}
    peers = transformers_models(config, weights, args.compile, args.prompt_tokens + args.new_tokens)
    for peer in peers.values():
        transformers_seconds(*peer, prompt, args.new_tokens)  # compiles
    seconds |= {name: [] for name in peers}
    reads = [read_seconds(weights, river)]
    for _ in range(args.repeats):  # interleaved, so that a slow minute of the machine hits all alike
        for name, (options, depth) in runs.items():
            options = options | {"max_new_tokens": args.new_tokens, "stop_tokens": ()}
            output = generate(engines, prompt, options, batch_policy="row", exit_control="auto")
            assert set(output.exit_depths[1:]) == {depth}
            seconds[name].append(output.stats.decode_seconds / (args.new_tokens - 1))
        for name, peer in peers.items():
            seconds[name].append(transformers_seconds(*peer, prompt, args.new_tokens))
        reads.append(read_seconds(weights, river))
    report(config, weights, river, runs, seconds, reads, args, path)


def read_seconds(weights: ModelWeights, river: ExitRiver) -> dict[str, float]:
    """Seconds of a plain read of each tensor of a backbone layer, an exit layer, and of both heads."""

    def seconds(tensors) -> float:
        start = time.perf_counter()
        for tensor in tensors:
            reader()(tensor)
        return time.perf_counter() - start

    reader()(weights.lm_head)
    return {
        "block": median(seconds(tensors_of(layer)) for layer in weights.layers),
        "exit_layer": median(seconds(tensors_of(layer)) for layer in river),
        "model head": median(seconds([weights.lm_head]) for _ in range(3)),
        "w4 head": median(seconds([river.lm_head]) for _ in range(3)),
    }


def report(config, weights, river, runs, seconds, reads, args, path) -> None:
    block, exit_layer = size_of(weights.layers[0]), size_of(river[0])
    heads = {"model head": weights.lm_head.nbytes, "w4 head": river.lm_head.nbytes}
    layers = config.num_hidden_layers
    full = median(seconds["full bf16"])
    read = {part: median(times[part] for times in reads) for part in reads[0]}
    print(f"{machine()['processor']}, {args.threads} threads")
    print(f"{'':<24}{'ms':>8}{'tok/s':>8}{'GB/s':>7}{'read':>7}{'%':>5}{'x full':>8}{'allowed':>9}")
    lines = []
    for name, times in seconds.items():
        typical = median(times)
        options, depth = runs.get(name, ({}, layers))
        head = options.get("river_head", "model") + " head"
        size = depth * block + (layers - depth) * exit_layer + heads[head]
        read_time = depth * read["block"] + (layers - depth) * read["exit_layer"] + read[head]
        line = {
            "run": name, "ms": 1e3 * typical, "tokens_per_second": 1 / typical, "bytes": size,
            "gb_s": size / typical / 1e9, "read_gb_s": size / read_time / 1e9,
            "percent_of_read": 100 * read_time / typical,
            "x_full_bf16": full / typical, "allowed": (layers * block + heads["model head"]) / size,
            "ms_all": [1e3 * t for t in times],
        }  # fmt: skip
        lines.append(line)
        print(
            f"{name:<24}{line['ms']:8.1f}{line['tokens_per_second']:8.2f}{line['gb_s']:7.1f}{line['read_gb_s']:7.1f}"
            f"{line['percent_of_read']:5.0f}{line['x_full_bf16']:8.2f}{line['allowed']:9.2f}"
        )
    settings = {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens, "repeats": args.repeats}
    result = {
        "machine": machine(),
        "shape": "Llama-3.2-1B",
        **settings,
        "decode": lines,
    }
    print(save(path, result))


def tensors_of(weights) -> list[torch.Tensor]:
    return [tensor for tensor in vars(weights).values() if tensor is not None]


def size_of(weights) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(weights))


def transformers_models(config: ModelConfig, weights: ModelWeights, compiled: bool, max_length: int) -> dict:
    """Eager and compiled, each as (prompt, step, cache); {} where transformers is not installed."""
    if not importlib.util.find_spec("transformers"):
        print("transformers is not installed: no comparison")
        return {}
    from transformers import StaticCache

    model = llama_around(config, weights)
    peers = {"transformers eager": (model, model, None)}
    if compiled:  # the prompt in eager mode, as transformers itself does it
        cache = StaticCache(model.config, max_cache_len=max_length)
        peers["transformers compiled"] = (model, torch.compile(model, fullgraph=True), cache)
    return peers


@torch.inference_mode()
def transformers_seconds(model, step, cache, prompt: list[int], new_tokens: int) -> float:
    """Seconds per token of `step`, after the prompt through `model`."""
    if cache is not None:
        cache.reset()
    output = model(torch.tensor([prompt]), past_key_values=cache, use_cache=True)
    for index in range(new_tokens - 1):
        token = output.logits[:, -1:].argmax(-1)
        output = step(token, past_key_values=output.past_key_values, use_cache=True)
        if index == 0:  # warm
            start = time.perf_counter()
    return (time.perf_counter() - start) / (new_tokens - 2)


if __name__ == "__main__":
    main()
