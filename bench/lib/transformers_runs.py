"""Greedy decoding by transformers, in the ways that it has for one request, and how fast it was."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import StaticCache
from transformers.generation import BaseStreamer

EAGER = "transformers, eager"


@dataclass
class Run:
    tokens: list[int]  # the new ones
    tokens_per_second: float  # of decoding: what comes after those of the first step


class Clock(BaseStreamer):
    """When tokens come: first those of the prompt, then one or more at a time."""

    def __init__(self):
        self.counts, self.times = [], []

    def put(self, tokens: torch.Tensor) -> None:
        self.counts.append(tokens.numel())
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def ways(model, longest: int) -> dict[str, Callable[[list[int], int], Run]]:
    """By name, what takes a prompt and a number of new tokens, `longest` at most together.

    The early exit drafts with the first quarter of the layers and the model's head.
    """
    early = model.config.num_hidden_layers // 4
    return {
        EAGER: partial(by_generate, model, {}),
        "transformers, compiled": Compiled(model, longest),
        "transformers, prompt lookup": partial(by_generate, model, {"prompt_lookup_num_tokens": 10}),
        "transformers, early exit": partial(by_generate, model, {"assistant_early_exit": early}),
    }


def by_generate(model, options: dict, prompt: list[int], new_tokens: int) -> Run:
    clock, tokens = Clock(), torch.tensor([prompt])
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, do_sample=False,
        streamer=clock, **options,
    )  # fmt: skip
    seconds = clock.times[-1] - clock.times[1]
    return Run(output[0, len(prompt) :].tolist(), sum(clock.counts[2:]) / seconds)


class Compiled:
    """torch.compile with a static cache. `generate` has it, too, but compiles for every length."""

    def __init__(self, model, longest: int):
        self.model, self.step = model, torch.compile(model, fullgraph=True)
        self.cache = StaticCache(model.config, max_cache_len=longest)
        stop = model.generation_config.eos_token_id
        self.stop = set(stop if isinstance(stop, list) else [stop])

    @torch.inference_mode()
    def __call__(self, prompt: list[int], new_tokens: int) -> Run:
        self.cache.reset()
        tokens = [self._next(self.model, prompt)]
        start = time.perf_counter()
        while len(tokens) < new_tokens and tokens[-1] not in self.stop:
            tokens.append(self._next(self.step, tokens[-1:]))
        return Run(tokens, (len(tokens) - 1) / (time.perf_counter() - start))

    def _next(self, forward, tokens: list[int]) -> int:
        output = forward(torch.tensor([tokens]), past_key_values=self.cache, use_cache=True)
        return output.logits[0, -1].argmax().item()
