"""Prompts and decoding on the CPU beside llama.cpp, ik_llama.cpp and transformers, batch 1, in turns.

Random weights in the shape of a 135M model and of Llama-3.2-1B. llama.cpp reads them from a GGUF of the same
bf16 tensors, and 4-bit ones from a GGUF of random Q4_0 blocks: time does not depend on the values. Its
programs are yours to build and to name; which build it was stands in the results.

Tokens per second of a prompt (to the first token), and of decoding after a prompt of 32: medians of turns. x
is river_ext's speed over the peer's with weights of as many bits, the median of what each turn says.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench.cpu.decode import transformers_seconds
from bench.cpu.prefill import SHAPES, taking_turns, transformers_first_token
from bench.lib.common import machine, parser, results_path, save
from bench.lib.peers import llama_around
from bench.lib.weights import random_river, random_weights
from river_ext.engine.generate import Engines, generate
from river_ext.engine.network import Network
from river_ext.loading.config import ModelConfig
from river_ext.loading.weights import ModelWeights

MODES = {"bf16": {"mode": "full"}, "4 bit": {"mode": "full_w4", "river_head": "w4"}}
GGUF_TYPES = {"bf16": "BF16", "4 bit": "Q4_0"}
START = 32  # tokens of the prompt before decoding
TENSORS = {
    "input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def main() -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("--llama-bench", type=Path, help="llama.cpp's program of that name")
    p.add_argument("--ik-llama-bench", type=Path, help="ik_llama.cpp's")
    p.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    p.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 1024])
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--turns", type=int, default=3)
    args = p.parse_args()
    programs = {"llama.cpp": args.llama_bench, "ik_llama.cpp": args.ik_llama_bench}
    programs = {name: path for name, path in programs.items() if path is not None}
    for name, path in programs.items():
        if not path.is_file():
            sys.exit(f"{name}: {path} is no file; accepted: the path of its llama-bench program")
    if not programs:
        print("no llama-bench was named (--llama-bench, --ik-llama-bench): transformers alone")
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
    model = llama_around(config, weights)
    with tempfile.TemporaryDirectory() as folder:
        calls = {}
        for bits, options in MODES.items():
            calls["river_ext", bits] = partial(our_rates, engines, config, options, args)
            file = Path(folder) / f"{bits}.gguf"
            if programs:
                write_gguf(file, config, weights, bits)
            for name, program in programs.items():
                build = builds.setdefault(name, {})
                calls[name, bits] = partial(llama_bench_rates, program, file, args, build)
        calls["transformers", "bf16"] = partial(transformers_rates, model, config, args)
        rates = {key: [] for key in calls}  # by turn, {what: tokens per second}

        def measured(key: tuple[str, str]) -> None:
            rates[key].append(calls[key]())

        taking_turns({key: partial(measured, key) for key in calls}, args.turns)
    return report(shape, {key: turns[1:] for key, turns in rates.items()})  # the first one warmed up


def report(shape: str, rates: dict) -> list[dict]:
    whats = list(next(iter(rates.values()))[0])
    print(f"\n{shape:<6}{'':<14}" + "".join(f"{what:>14}{'x':>6}" for what in whats))
    lines = []
    for (name, bits), turns in rates.items():
        ours, text = rates["river_ext", bits], ""
        for what in whats:
            line = {
                "shape": shape, "runner": name, "bits": bits, "what": what,
                "tokens_per_second": median(turn[what] for turn in turns),
                "x": median(our[what] / turn[what] for our, turn in zip(ours, turns, strict=True)),
                "all": [turn[what] for turn in turns],
            }  # fmt: skip
            lines.append(line)
            text += f"{line['tokens_per_second']:14.1f}{line['x']:6.2f}"
        print(f"{name:<14}{bits:<6}{text}", flush=True)
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


def transformers_rates(model, config: ModelConfig, args) -> dict[str, float]:
    rates = {}
    for count in args.prompt_tokens:
        call = partial(transformers_first_token, model, tokens(config, count))
        rates[f"prompt {count}"] = count / seconds_of(call)
    seconds = transformers_seconds(model, model, None, tokens(config, START), args.new_tokens)
    return rates | {"decoding": 1 / seconds}


def seconds_of(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def llama_bench_rates(program: Path, model: Path, args, build: dict) -> dict[str, float]:
    """The same by llama-bench, which warms up before each; what it says about itself goes to `build`."""
    prompts = ",".join(str(count) for count in args.prompt_tokens)
    command = [program, "-m", model, "-p", prompts, "-n", args.new_tokens, "-r", 1, "-t", args.threads]
    command = [*map(str, command), "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=use_all_cores)
    if done.returncode:
        sys.exit(f"{program} failed: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]}")
    rates = {}
    for test in json.loads(done.stdout):
        build |= {name: test[name] for name in ("build_commit", "build_number") if name in test}
        rates[f"prompt {test['n_prompt']}" if test["n_prompt"] else "decoding"] = test["avg_ts"]
    return rates


def use_all_cores() -> None:
    """A program inherits the cores of the thread that starts it, which OMP_PROC_BIND ties to a single one."""
    os.sched_setaffinity(0, range(os.cpu_count()))


# --- the same weights as a GGUF ---------------------------------------------------------------------------


def write_gguf(file: Path, config: ModelConfig, weights: ModelWeights, bits: str) -> None:
    """A model without a vocabulary; in 4 bits its matrices are random blocks."""
    from gguf import GGMLQuantizationType, GGUFWriter  # only this needs it

    writer = GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, tensor: torch.Tensor) -> None:
        if tensor.dim() == 1:
            return writer.add_tensor(f"{name}.weight", tensor.float().numpy())
        data = tensor.contiguous().view(torch.uint8).numpy() if bits == "bf16" else q4_0_blocks(*tensor.shape)
        kind = GGMLQuantizationType[GGUF_TYPES[bits]]
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)

    add("token_embd", weights.embed_tokens)
    add("output_norm", weights.norm)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for index, layer in enumerate(weights.layers):
        for field, name in TENSORS.items():
            tensor = getattr(layer, field)
            if field in heads:  # llama.cpp rotates neighbours, and not the halves of a head
                tensor = tensor.unflatten(0, (heads[field], 2, -1)).transpose(1, 2).flatten(0, 2)
            add(f"blk.{index}.{name}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def q4_0_blocks(out_features: int, in_features: int) -> np.ndarray:
    """uint8 [out, in / 32 * 18]: an fp16 scale and 32 nibbles in each block."""
    blocks = torch.randint(0, 256, (out_features, in_features // 32, 18), dtype=torch.uint8)
    scale = torch.tensor([0.2 * in_features**-0.5]).half()
    blocks[..., :2] = scale.view(torch.uint8)
    return blocks.flatten(1).numpy()


if __name__ == "__main__":
    main()
