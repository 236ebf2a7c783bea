"""Prompts and decoding on the CPU beside llama.cpp, ik_llama.cpp and transformers, batch 1, in turns.

Random weights in the shape of a 135M model and of Llama-3.2-1B. llama.cpp reads them from a GGUF of the same
bf16 tensors, and 4-bit ones from a GGUF of random Q4_0 blocks: time does not depend on the values. Its
programs are yours to build and to name; which build it was stands in the results. transformers runs eagerly
with its default cache, and with --compile also under torch.compile with a static cache (decoding alone: its
prompts are eager in either case).

Tokens per second of a prompt (to the first token), and of decoding after a prompt of 32, llama.cpp's from an
empty cache: medians of turns. x is river_ext's speed over the peer's with weights of as many bits, the median
of what each turn says. What drafts tokens depends on the text: bench/cpu/peers_text.py.
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

from bench.cpu.decode import transformers_models, transformers_seconds
from bench.cpu.prefill import SHAPES, taking_turns, transformers_first_token
from bench.lib.common import machine, parser, results_path, save
from bench.lib.llama_cpp import add_programs, llama_bench_rates, programs_of, write_gguf
from bench.lib.weights import random_river, random_weights
from river_ext.engine.generate import Engines, generate
from river_ext.engine.network import Network
from river_ext.loading.config import ModelConfig

MODES = {"bf16": {"mode": "full"}, "4 bit": {"mode": "full_w4", "river_head": "w4"}}
START = 32  # tokens of the prompt before decoding


def main() -> None:
    p = parser(__doc__.splitlines()[0])
    add_programs(p)
    p.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    p.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 1024])
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--compile", action="store_true", help="also transformers under torch.compile (minutes)")
    args = p.parse_args()
    programs = programs_of(args)
    torch.set_num_threads(args.threads)
    path = results_path("peers", args)
    torch.manual_seed(0)
    print(f"{machine()['processor']}, {args.threads} threads")
    lines, builds = [], {}
    for shape in args.shapes:
        lines += measure(shape, programs, args, builds)
    print(save(path, {"machine": machine(), "turns": args.turns, "builds": builds, "peers": lines}))


def measure(shape: str, programs: dict[str, Path], args, builds: dict) -> list[dict]:
    config = SHAPES[shape]
    weights = random_weights(config)
    engines = Engines(Network(config, weights, random_river(config)), text=None)
    with tempfile.TemporaryDirectory() as folder:
        calls = {}
        for bits, options in MODES.items():
            calls["river_ext", bits] = partial(our_rates, engines, config, options, args)
            file = Path(folder) / f"{bits}.gguf"
            if programs:
                write_gguf(file, config, weights, bits)
            for name, program in programs.items():
                build = builds.setdefault(name, {})
                calls[name, bits] = partial(
                    llama_bench_rates, program, file, args.prompt_tokens, args.new_tokens, args.threads, build
                )
        for name, peer in transformers_models(config, weights, args.compile, START + args.new_tokens).items():
            calls[name, "bf16"] = partial(transformers_rates, peer, config, args)
        rates = {key: [] for key in calls}  # by turn, {what: tokens per second}

        def measured(key: tuple[str, str]) -> None:
            rates[key].append(calls[key]())

        taking_turns({key: partial(measured, key) for key in calls}, args.turns)
    return report(shape, {key: turns[1:] for key, turns in rates.items()})  # the first one warmed up


def report(shape: str, rates: dict) -> list[dict]:
    whats = rates["river_ext", "bf16"][0]
    print(f"\n{shape:<28}" + "".join(f"{what:>14}{'x':>6}" for what in whats))
    lines = []
    for (name, bits), turns in rates.items():
        ours, text = rates["river_ext", bits], ""
        for what in turns[0]:
            line = {
                "shape": shape, "runner": name, "bits": bits, "what": what,
                "tokens_per_second": median(turn[what] for turn in turns),
                "x": median(our[what] / turn[what] for our, turn in zip(ours, turns, strict=True)),
                "all": [turn[what] for turn in turns],
            }  # fmt: skip
            lines.append(line)
            text += f"{line['tokens_per_second']:14.1f}{line['x']:6.2f}"
        print(f"{name:<22}{bits:<6}{text:>{20 * len(whats)}}", flush=True)
    return lines


# --- who runs ---------------------------------------------------------------------------------------------


def tokens(config: ModelConfig, count: int) -> list[int]:
    return torch.randint(0, config.vocab_size, (count,)).tolist()


def our_rates(engines: Engines, config: ModelConfig, options: dict, args) -> dict[str, float]:
    def run(prompt: int, new: int):
        settings = options | {"max_new_tokens": new, "stop_tokens": ()}
        return generate(engines, tokens(config, prompt), settings, batch_policy="row", exit_control="auto")

    rates = {}
    for count in args.prompt_tokens:
        rates[f"prompt {count}"] = count / seconds_of(partial(run, count, 1))
    rates["decoding"] = (args.new_tokens - 1) / run(START, args.new_tokens).stats.decode_seconds
    return rates


def transformers_rates(peer: tuple, config: ModelConfig, args) -> dict[str, float]:
    model, step, cache = peer
    rates = {}
    for count in args.prompt_tokens if cache is None else ():
        call = partial(transformers_first_token, model, tokens(config, count))
        rates[f"prompt {count}"] = count / seconds_of(call)
    seconds = transformers_seconds(model, step, cache, tokens(config, START), args.new_tokens)
    return rates | {"decoding": 1 / seconds}


def seconds_of(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
