"""Greedy decoding by `generate` of transformers, in the ways that it has, and how fast it was."""

import time
from dataclasses import dataclass

import torch
from transformers.generation import BaseStreamer, CompileConfig


class Clock(BaseStreamer):
    """When tokens come: first those of the prompt, then one or more at a time."""

    def __init__(self):
        self.counts, self.times = [], []

    def put(self, tokens: torch.Tensor) -> None:
        self.counts.append(tokens.numel())
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass
class Run:
    tokens: list[int]  # the new ones
    tokens_per_second: float  # of decoding: what comes after the first ones


def ways(layers: int) -> dict[str, dict]:
    """By name, what `generate` takes."""
    compiled = CompileConfig(fullgraph=True, mode="default")
    compiled._compile_all_devices = True  # it compiles for GPUs alone without it
    return {
        "transformers, eager": {},
        "transformers, compiled": {"cache_implementation": "static", "compile_config": compiled},
        "transformers, prompt lookup": {"prompt_lookup_num_tokens": 10},
        "transformers, early exit": {"assistant_early_exit": layers // 4},
    }


def generated(model, prompt: list[int], new_tokens: int, options: dict) -> Run:
    clock, tokens = Clock(), torch.tensor([prompt])
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, do_sample=False,
        streamer=clock, **options,
    )  # fmt: skip
    decoded = sum(clock.counts[2:])
    return Run(output[0, len(prompt) :].tolist(), decoded / (clock.times[-1] - clock.times[1]))
