"""A step of others on the same weights, batch 1: whole-step peers of bench/gpu/steps.py, in the same units.

  torch, cuBLAS   the plain torch step of bench/lib/models.py in a CUDA graph
  transformers    Llama with a StaticCache under torch.compile(mode="reduce-overhead"), the usual fast path,
                  in a process of its own that is stopped after --seconds, as compiling may take long
  vLLM            where it is installed: weights that it draws by itself in the same shape, likewise
Greedy, at about the same context. What does not run here, or not in time, is recorded as not run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from bench.lib import gpu
from bench.lib.models import CONFIGS, step_bytes
from bench.lib.peers import TorchStep, llama_around, llama_config
from bench.lib.weights import random_network, random_weights

STEPS = 32  # of transformers, between two synchronisations
WARM = 8  # its steps before that: compiling, and recording the graphs


def torch_step(model: str, context: int, repeats: int) -> gpu.Time:
    network = random_network(CONFIGS[model])
    return gpu.time_graph(gpu.capture(TorchStep(network, 1, context)), 1, repeats)


@torch.no_grad()
def transformers_step(model: str, context: int, repeats: int) -> dict:
    """us of a token: medians of runs of STEPS tokens, each token feeding the next."""
    import transformers

    config = CONFIGS[model]
    with torch.device(gpu.DEVICE):
        llama = llama_around(config, random_weights(config))
    length = context + WARM + STEPS * (repeats + 1)
    cache = transformers.StaticCache(config=llama.config, max_cache_len=length)
    prompt = torch.randint(0, config.vocab_size, (1, context), device=gpu.DEVICE)

    def next_token(tokens: torch.Tensor) -> torch.Tensor:
        return llama(tokens, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    token = next_token(prompt)
    compiled = torch.compile(next_token, mode="reduce-overhead", fullgraph=True)

    def steps(count: int, token: torch.Tensor) -> torch.Tensor:
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            token = compiled(token).clone()
        torch.cuda.synchronize()
        return token

    start = time.perf_counter()
    token = steps(WARM, token)
    compile_seconds, runs = time.perf_counter() - start, []
    for _ in range(repeats):
        start = time.perf_counter()
        token = steps(STEPS, token)
        runs.append(1e6 * (time.perf_counter() - start) / STEPS)
    return {
        "us": statistics.median(runs), "us_all": runs, "compile_seconds": compile_seconds,
        "transformers": transformers.__version__,
    }  # fmt: skip


def vllm_step(model: str, context: int, repeats: int) -> dict:
    """us of a token: what STEPS more of them take, the median of runs. Start and prompt are not in it."""
    try:
        import vllm
    except ModuleNotFoundError as error:
        return {"not_run": f"{error.name} is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        config = llama_config(CONFIGS[model])
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        llm = vllm.LLM(
            folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_num_seqs=1,
            max_model_len=context + 2 * STEPS, enable_prefix_caching=False, seed=0,
        )  # fmt: skip
    prompt = {"prompt_token_ids": torch.randint(0, config.vocab_size, (context,)).tolist()}

    def seconds(count: int) -> float:
        options = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompt, options, use_tqdm=False)
        return time.perf_counter() - start

    seconds(STEPS)
    runs = [1e6 * (seconds(2 * STEPS) - seconds(STEPS)) / STEPS for _ in range(repeats)]
    return {"us": statistics.median(runs), "us_all": runs, "vllm": vllm.__version__}


APART = {"transformers, compiled": transformers_step, "vLLM": vllm_step}


def in_time(seconds: float, peer: str, model: str, context: int, repeats: int) -> dict:
    """One of APART in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "bench.gpu.peers", "--answer", str(answer), "--model", model]
        command += ["--peer", peer, "--context", str(context), "--repeats", str(repeats)]
        try:
            done = subprocess.run(command, timeout=seconds, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            return {"not_run": f"no result within {seconds:.0f} s"}
        if answer.exists():
            return json.loads(answer.read_text())
        lines = (done.stderr or done.stdout).strip().splitlines()
        return {"not_run": lines[-1][:300] if lines else f"exit status {done.returncode}"}


def main() -> None:
    p = gpu.parser(__doc__.splitlines()[0])
    p.add_argument("--model", choices=CONFIGS, default="1B")
    p.add_argument("--contexts", type=int, nargs="+", default=[32, 1024])
    p.add_argument(
        "--seconds", type=float, default=90, help="for each of the others, per context (default: 90)"
    )
    p.add_argument("--repeats", type=int, default=10)
    p.add_argument("--peer", choices=APART, help=argparse.SUPPRESS)
    p.add_argument("--context", type=int, help=argparse.SUPPRESS)
    p.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.quick:
        args.contexts = args.contexts[:1]
    gpu.require_cuda()
    if args.answer:
        args.answer.write_text(json.dumps(APART[args.peer](args.model, args.context, args.repeats)))
        return
    results, layers = gpu.Results("peers", args), CONFIGS[args.model].num_hidden_layers
    for context in args.contexts:
        common = {"model": args.model, "context": context, "rows": 1}
        common["bytes"] = step_bytes(CONFIGS[args.model], layers, context)
        peers = {
            "torch, cuBLAS, CUDA graph": lambda context=context: torch_step(
                args.model, context, args.repeats
            ).fields(),
        }
        peers |= {
            name: partial(in_time, args.seconds, name, args.model, context, args.repeats) for name in APART
        }
        for name, measure in peers.items():
            line = {"peer": name, **common, **measure()}
            torch.cuda.empty_cache()
            speed = "us" in line and f"{line['us']:7.0f} us, {line['bytes'] / line['us'] / 1e3:5.0f} GB/s"
            text = f"{args.model} context {context:>4} {name:<26} {speed or line['not_run']}"
            results("peer", text, **line)


if __name__ == "__main__":
    main()
