"""What a model takes of a device's memory at batch 1: backbone, full W4, River with and without offloading.

    python -m bench.memory                  Llama-3.1-8B and Llama-3.2-1B
    python -m bench.memory DIR              any checkpoint's config.json; --resident-layers K
    python -m bench.memory DIR --measure    and what a process on the CPU really holds, for bench/results

The tables are arithmetic: every tensor, packed tiles with their scales, zeros and padding, the KV cache, and
with offloading the two buffers that a GPU has then. What steps and prompts need is little beside these.
`--measure` loads the model, whole and offloaded, in a process of its own each.
"""

import math
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import torch

import river_ext
from bench.lib.common import machine, parser, results_path, save
from bench.lib.models import CONFIGS
from river_ext.loading.config import ModelConfig, read_config
from river_ext.loading.offloaded import checked_resident_layers
from river_ext.loading.sizes import kv_bytes_per_token, model_bytes
from river_ext.loading.weights import BlockShape

SHAPES = {
    "Llama-3.1-8B": replace(CONFIGS["8B"], tie_word_embeddings=False),
    "Llama-3.2-1B": CONFIGS["1B"],
}
CONTEXTS = [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10]  # tokens
RESIDENT = 4  # layers, as the paper has it for Llama-3.1-8B
BUFFERS = 2  # that offloaded layers stream through

# GiB at these contexts, by the paper, of Llama-3.1-8B: half a byte for a 4-bit weight, and no scales
PAPER = {
    "backbone": [15.46, 15.96, 16.96, 18.96, 22.96],
    "full W4": [4.97, 5.47, 6.47, 8.47, 12.47],
    "River, 4 layers resident": [7.23, 7.73, 8.73, 10.73, 14.73],
}


def main() -> None:
    p = parser(__doc__.splitlines()[0])
    p.add_argument("model", nargs="?", type=Path, metavar="DIR", help="a checkpoint's directory")
    p.add_argument("--resident-layers", type=int, default=RESIDENT, metavar="K", help="default: %(default)s")
    p.add_argument("--measure", action="store_true", help="load the model, and look at the process")
    args = p.parse_args()
    try:
        run(args)
    except river_ext.RiverError as error:
        p.error(str(error))


def run(args) -> None:
    if args.model is None:
        if args.measure:
            raise river_ext.RiverError("--measure needs a model to load; accepted: a checkpoint's directory")
        for name, config in SHAPES.items():
            print(f"{name}, GiB\n{table(config, args.resident_layers)}\n")
        counted = as_the_paper_counts(SHAPES["Llama-3.1-8B"])
        print(f"Llama-3.1-8B as the paper counts, and has it, GiB\n{text_of(counted)}")
        return
    name, config = args.model.absolute().name, read_config(args.model)
    config = replace(config, dtype=config.dtype or torch.bfloat16)  # what most are stored in
    print(f"{name}, GiB; it has {config.max_length} positions\n{table(config, args.resident_layers)}")
    if args.measure:
        path = results_path(f"memory_{name}", args)
        print(save(path, {"machine": machine(), "model": name} | measured(args)))


# --- by arithmetic ------------------------------------------------------------------------------------------


def table(config: ModelConfig, resident: int) -> str:
    return text_of(needs(config, resident))


def text_of(rows: dict[str, list[int]]) -> str:
    """GiB by context."""
    width = max(map(len, rows)) + 2
    head = "".join(f"{f'{context >> 10}K':>7}" for context in CONTEXTS)
    lines = [
        f"{name:<{width}}" + "".join(f"{size / 2**30:7.2f}" for size in sizes) for name, sizes in rows.items()
    ]
    return "\n".join([" " * width + head, *lines])


def needs(config: ModelConfig, resident: int) -> dict[str, list[int]]:
    """Bytes by context, of every way to run the model."""
    resident = checked_resident_layers(resident, config)
    sizes, item = model_bytes(config), config.dtype.itemsize
    block = sum(map(math.prod, BlockShape.of(config).projections().values())) * item
    small = sizes["backbone"] - config.num_hidden_layers * block  # norms and biases
    embedding = (config.vocab_size + 1) * config.hidden_size * item  # with the last norm
    backbone = sizes["backbone"] + sizes["embedding_and_head"]
    river = sizes["river"] + sizes["river_head"]
    offloaded = config.num_hidden_layers - resident
    streams = min(offloaded, BUFFERS)
    return with_cache(
        config,
        {
            "backbone": backbone,
            "full W4": embedding + small + river,
            "River": backbone + river,
            f"River, {resident} layers resident": backbone + river - (offloaded - streams) * block,
        },
    )


def as_the_paper_counts(config: ModelConfig) -> dict[str, list[int]]:
    """The rows of PAPER. No exit layer at depth 0; in the full 4-bit model the head has 4 bits as well."""
    layers = config.num_hidden_layers
    block = sum(map(math.prod, BlockShape.of(config).projections().values()))
    vocabulary = config.vocab_size * config.hidden_size  # of the embedding, and of the head
    return with_cache(
        config,
        {
            "backbone": 2 * (layers * block + 2 * vocabulary),
            "full W4": (layers * block + vocabulary) // 2 + 2 * vocabulary,
            "River, 4 layers resident": 2 * (4 * block + 2 * vocabulary) + (layers - 1) * block // 2,
        },
    )


def with_cache(config: ModelConfig, weights: dict[str, int]) -> dict[str, list[int]]:
    token = kv_bytes_per_token(config)
    return {name: [size + context * token for context in CONTEXTS] for name, size in weights.items()}


# --- of a process -------------------------------------------------------------------------------------------


def measured(args) -> dict:
    """MiB by what the process has done so far: what it has grown by since before the model was loaded."""
    spawn, lines = multiprocessing.get_context("spawn"), []
    print(f"{'MiB':<24}{'anonymous':>11}{'of files':>10}")
    for resident in (None, args.resident_layers):
        with spawn.Pool(1) as pool:
            stages = pool.apply(grown, (args.model, resident, args.threads))
        name = "whole" if resident is None else f"{resident} layers resident"
        print(name)
        for stage, (anonymous, file) in stages.items():
            print(f"  {stage:<22}{anonymous:11.0f}{file:10.0f}")
            lines.append({"resident_layers": resident, "stage": stage, "anonymous": anonymous, "file": file})
    return {"unit": "MiB", "memory": lines}


def grown(directory: Path, resident: int | None, threads: int) -> dict[str, tuple[float, float]]:
    torch.set_num_threads(threads)
    river_ext.load().generate("Hello", max_new_tokens=2)  # what libraries take at first is nobody's model
    start, stages = in_memory(), {}

    def note(stage: str) -> None:
        stages[stage] = tuple(now - before for now, before in zip(in_memory(), start, strict=True))

    model = river_ext.load(directory, resident_layers=resident)
    note("loaded")
    tokens = list(range(100))
    model.generate(tokens, max_new_tokens=16, threshold=-2, prefill="depth:0")
    note("tokens of depth 1")
    model.generate(tokens, max_new_tokens=1)
    note("a prompt at full depth")
    return stages


def in_memory() -> tuple[float, float]:
    """MiB of this process: anonymous, and of files. Only the latter can the kernel drop, without swap."""
    lines = Path(f"/proc/{os.getpid()}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return kib["Anonymous"] / 1024, (kib["Rss"] - kib["Anonymous"]) / 1024


if __name__ == "__main__":
    main()
