"""llama.cpp and its kin as peers: the same weights as a GGUF, and their own program that measures.

Their programs are the user's to build and to name.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from river_ext.loading.config import ModelConfig
from river_ext.loading.weights import ModelWeights

GGUF_TYPES = {"bf16": "BF16", "4 bit": "Q4_0"}
TENSORS = {
    "input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def add_programs(p: argparse.ArgumentParser) -> None:
    p.add_argument("--llama-bench", type=Path, help="llama.cpp's program of that name")
    p.add_argument("--ik-llama-bench", type=Path, help="ik_llama.cpp's")


def programs_of(args: argparse.Namespace) -> dict[str, Path]:
    programs = {"llama.cpp": args.llama_bench, "ik_llama.cpp": args.ik_llama_bench}
    programs = {name: path for name, path in programs.items() if path is not None}
    for name, path in programs.items():
        if not path.is_file():
            sys.exit(f"{name}: {path} is no file; accepted: the path of its llama-bench program")
    if not programs:
        print("no llama-bench was named (--llama-bench, --ik-llama-bench): transformers alone")
    return programs


def llama_bench_rates(
    program: Path, model: Path, prompts: Sequence[int], new_tokens: int, threads: int, build: dict
) -> dict[str, float]:
    """Tokens per second by llama-bench: of each prompt, and of decoding from an empty cache.

    It warms up before each. What it says about itself goes to `build`.
    """
    lengths = ",".join(map(str, prompts or [0]))
    command = [program, "-m", model, "-p", lengths, "-n", new_tokens, "-r", 1, "-t", threads, "-o", "json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, preexec_fn=use_all_cores)
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
