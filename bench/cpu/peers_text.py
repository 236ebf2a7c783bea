"""A trained model's decoding on the CPU beside llama.cpp and the ways of transformers, batch 1, in turns.

Every prompt (--prompts: JSON lines with a field "question", "prompt" or "text") goes through every runner in
turn: greedy, the same tokens of the prompt, at most --new-tokens new ones, all of them to the model's stop
tokens. What is compared is decoding alone, all that happens after the first new token: drafting and checking
included, the prompt not. llama-bench decodes as many tokens from an empty cache, which is a little less work.

x is the speed over transformers, eager, the median of the prompts; `same` the number of prompts whose tokens
are those of full depth by the same library. A turn with the first prompt warms up, and compiles (minutes).
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

import river_ext
from bench.lib.common import machine, parser, results_path, save
from bench.lib.llama_cpp import add_programs, llama_bench_rates, programs_of, write_gguf
from bench.lib.prompts import add_prompts, read_prompts
from bench.lib.transformers_runs import EAGER, Run, ways

FULL = "river_ext, full bf16"
MODES = {
    FULL: {"mode": "full"},
    "river_ext, lossless": {"mode": "lossless"},
    "river_ext, River 0.9": {"mode": "river", "threshold": 0.9},
    "river_ext, full W4": {"mode": "full_w4", "river_head": "w4"},
}


def main() -> None:
    p = parser(__doc__.splitlines()[0])
    add_programs(p)
    add_prompts(p, count=4)
    p.add_argument("--new-tokens", type=int, default=64)
    args = p.parse_args()
    if args.model is None or len(args.prompts) != 1:
        p.error(
            f"--model {args.model}, --prompts of {len(args.prompts)} files; accepted: a model and one file"
        )
    programs = programs_of(args)
    torch.set_num_threads(args.threads)
    path = results_path("peers_text", args)
    print(f"{machine()['processor']}, {args.threads} threads")
    model, builds = river_ext.load(args.model, river=args.river), {}
    prompts = [tokens_of(model, one) for one in read_prompts(args.prompts[0], args.count, args.chat)]
    with tempfile.TemporaryDirectory() as folder:
        runners = runners_of(model, max(map(len, prompts)), args)
        runners |= llama_runners(model, programs, Path(folder), args.threads, builds)
        for name, run in runners.items():
            start = time.perf_counter()
            run(prompts[0], args.new_tokens)
            print(f"{name:<30}{time.perf_counter() - start:8.1f} s to warm up", flush=True)
        runs = {name: [] for name in runners}
        for prompt in prompts:  # in turns, so that a slow minute hits all alike
            for name, run in runners.items():
                runs[name].append(run(prompt, args.new_tokens))
    lines = report(runs)
    print(save(path, {
        "machine": machine(), "model": args.model.name, "file": args.prompts[0].name, "count": len(prompts),
        "chat": args.chat, "new_tokens": args.new_tokens, "prompt_tokens": list(map(len, prompts)),
        "transformers": version(), "builds": builds, "peers": lines,
    }))  # fmt: skip


def tokens_of(model, prompt: str | list) -> list[int]:
    return model.text.encode(prompt) if isinstance(prompt, str) else model.text.chat(prompt)


def version() -> str:
    import transformers

    return transformers.__version__


def runners_of(model, longest: int, args) -> dict:
    from transformers import AutoModelForCausalLM  # takes seconds, and a refusal does not wait for it

    peer = AutoModelForCausalLM.from_pretrained(args.model, dtype=model.config.dtype)
    ours = {name: partial(our_run, model, options) for name, options in MODES.items()}
    return ours | ways(peer, longest + args.new_tokens)


def our_run(model, options: dict, prompt: list[int], new_tokens: int) -> Run:
    output = model.generate(prompt, max_new_tokens=new_tokens, **options)
    return Run(output.tokens, output.stats.tokens_per_second)


def llama_runners(model, programs: dict[str, Path], folder: Path, threads: int, builds: dict) -> dict:
    runners = {}
    for bits in ("bf16", "4 bit") if programs else ():
        file = folder / f"{bits}.gguf"
        write_gguf(file, model.config, model.weights, bits)
        for name, program in programs.items():
            build = builds.setdefault(name, {})
            runners[f"{name}, {bits}"] = partial(llama_run, program, file, threads, build)
    return runners


def llama_run(
    program: Path, file: Path, threads: int, build: dict, prompt: list[int], new_tokens: int
) -> Run:
    return Run([], llama_bench_rates(program, file, (), new_tokens, threads, build)["decoding"])


def report(runs: dict[str, list[Run]]) -> list[dict]:
    print(f"\n{'':<30}{'tok/s':>8}{'x eager':>9}{'same':>6}{'tokens':>8}")
    lines = []
    for name, own in runs.items():
        full = runs[FULL if name in MODES else EAGER]
        tokens = sum(len(run.tokens) for run in own)
        line = {
            "runner": name,
            "tokens_per_second": median(run.tokens_per_second for run in own),
            "x": median(
                run.tokens_per_second / eager.tokens_per_second
                for run, eager in zip(own, runs[EAGER], strict=True)
            ),
            "same": sum(a.tokens == b.tokens for a, b in zip(own, full, strict=True)) if tokens else None,
            "new_tokens": tokens or None,
            "all": [run.tokens_per_second for run in own],
        }
        lines.append(line)
        same = "" if line["same"] is None else f"{line['same']}"
        print(
            f"{name:<30}{line['tokens_per_second']:8.1f}{line['x']:9.2f}{same:>6}{tokens or '':>8}",
            flush=True,
        )
    return lines


if __name__ == "__main__":
    main()
