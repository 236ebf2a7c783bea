"""What a user asks for, checked before anything runs: a refusal names the value and what is accepted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from .. import ops
from ..checks import (
    FP32_MAX,
    FP32_TINY,
    choice,
    flag,
    fp32,
    integer,
    listed,
    number,
    one_row,
    per_request,
    strings,
    token_ids,
)
from ..errors import RiverError
from ..loading.config import ModelConfig
from ..loading.text import Text
from .exit_rule import BATCH_POLICIES, ExitRule
from .prefill import PrefillPolicy
from .sampling import Sampling

MODES = ("river", "full", "full_w4")
KV_STRATEGIES = ("share",)
EXIT_CONTROLS = ("auto", "host", "device")


@dataclass(frozen=True)
class Options:
    """The keyword arguments of `Model.generate`, where each is described."""

    max_new_tokens: int = 256
    threshold: float | Sequence[float] = 0.5
    min_layers: int | Sequence[int] = 1
    batch_policy: str = "min"
    prefill: str = "full"
    mode: str = "river"
    kv_strategy: str = "share"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | Sequence[int] = 0
    stop: str | Sequence[str] = ()
    stop_tokens: int | Sequence[int] | None = None
    return_logits: bool = False
    exit_control: str = "auto"


@dataclass(frozen=True)
class Plan:
    """Checked options: one prompt, seed and row of the rule per request, and what all requests share."""

    prompts: list[list[int]]
    seeds: list[int]
    rule: ExitRule
    prefill: PrefillPolicy
    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...]
    stop_tokens: frozenset[int]
    return_logits: bool
    exit_control: str
    dtype: torch.dtype  # of the model


def is_batch(prompt) -> bool:
    """Whether a prompt is a list of prompts: one whose first item is neither token id nor chat message."""
    return prompt_list(prompt)[1]


def prompt_list(prompt) -> tuple[list, bool]:
    """The prompts in what a user gives, and whether that is a list of them."""
    if isinstance(prompt, Mapping):  # as the tokenizers of transformers return
        prompt = encoded(prompt)
    prompt = one_row("prompt", prompt)
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return [prompt], False
    if isinstance(listed("prompt", prompt[0]), Real):  # a token id, which may be an array of one itself
        return [[listed("prompt", token) for token in prompt]], False
    return ([prompt], False) if is_chat(prompt) else (list(prompt), True)


def is_chat(prompt) -> bool:
    """Whether a prompt is a list of chat messages: one whose first item is a dict, but of no token ids."""
    first = prompt[0] if isinstance(prompt, (list, tuple)) and prompt else None
    return isinstance(first, Mapping) and "input_ids" not in first


def encoded(encoding: Mapping):
    """The token ids of an encoding, without those that its attention_mask leaves out."""
    if "input_ids" not in encoding:
        raise RiverError(
            f"prompt is a {type(encoding).__name__} without input_ids; accepted: one with them, or a list of "
            "chat messages"
        )
    ids = one_row("input_ids", encoding["input_ids"])
    mask = encoding.get("attention_mask")
    if mask is None:
        return ids
    mask = one_row("attention_mask", mask)
    try:
        nested = bool(ids) and isinstance(ids[0], (list, tuple))
        pairs = zip(ids, mask, strict=True) if nested else [(ids, mask)]
        kept = [[i for i, keep in zip(*pair, strict=True) if keep] for pair in pairs]
    except (TypeError, ValueError, KeyError):
        raise RiverError("attention_mask does not fit input_ids; accepted: one value per token") from None
    return kept if nested else kept[0]


def plan(config: ModelConfig, text: Text | None, prompt, options: Options) -> Plan:
    """Checks prompt and options against the model."""
    prompts, _ = prompt_list(prompt)
    if len(prompts) > ops.MAX_ROWS:
        raise RiverError(f"{len(prompts)} prompts; accepted: 1 to {ops.MAX_ROWS} at a time")
    prompts = [prompt_tokens(config, text, prompt) for prompt in prompts]
    max_new_tokens = integer("max_new_tokens", options.max_new_tokens, 1)
    for tokens in prompts:
        if len(tokens) + max_new_tokens > config.max_length:
            raise RiverError(
                f"a prompt of {len(tokens)} tokens and max_new_tokens={max_new_tokens} need "
                f"{len(tokens) + max_new_tokens} positions; the model has {config.max_length}"
            )
    stop = strings("stop", options.stop)
    if stop and text is None:
        raise RiverError("stop strings need a tokenizer, and this checkpoint has no tokenizer.json")
    stop_tokens = config.eos_token_ids if options.stop_tokens is None else options.stop_tokens
    stop_tokens = listed("stop_tokens", stop_tokens)
    stop_tokens = [stop_tokens] if isinstance(stop_tokens, Integral) else stop_tokens
    if isinstance(stop_tokens, (set, frozenset)):
        stop_tokens = list(stop_tokens)
    checked = Plan(
        prompts=prompts,
        seeds=per_request("seed", options.seed, len(prompts), integer, -(2**63), 2**63 - 1),
        rule=exit_rule(config, options, len(prompts)),
        prefill=prefill_policy(config, options),
        sampling=sampling(config, options),
        max_new_tokens=max_new_tokens,
        stop=stop,
        stop_tokens=frozenset(token_ids("stop_tokens", stop_tokens, config.vocab_size)),
        return_logits=flag("return_logits", options.return_logits),
        exit_control=options.exit_control,
        dtype=config.dtype,
    )
    check_exit_control(checked)
    return checked


def check_exit_control(plan: Plan) -> None:
    choice("exit_control", plan.exit_control, EXIT_CONTROLS)
    if plan.exit_control == "device" and plan.return_logits:
        raise RiverError(
            "exit_control='device' with return_logits=True, which needs every step's logits on the host; "
            "accepted: 'auto' or 'host'"
        )


def prompt_tokens(config: ModelConfig, text: Text | None, prompt) -> list[int]:
    if isinstance(prompt, str) or is_chat(prompt):
        if text is None:
            raise RiverError("a text prompt needs a tokenizer, and this checkpoint has no tokenizer.json")
        prompt = text.chat(prompt) if is_chat(prompt) else text.encode(prompt) if prompt else []
    elif isinstance(prompt, Mapping):
        prompt = encoded(prompt)
    tokens = token_ids("prompt", one_row("prompt", prompt), config.vocab_size)
    if not tokens:
        raise RiverError("the prompt is empty; accepted: at least one token")
    return tokens


def exit_rule(config: ModelConfig, options: Options, rows: int) -> ExitRule:
    """The rule of a mode: "full" never exits, "full_w4" runs no backbone layer."""
    choice("mode", options.mode, MODES)
    choice("batch_policy", options.batch_policy, BATCH_POLICIES)
    choice("kv_strategy", options.kv_strategy, KV_STRATEGIES)
    layers = config.num_hidden_layers
    thresholds = per_request("threshold", options.threshold, rows, number)
    min_layers = per_request("min_layers", options.min_layers, rows, integer, 1, layers)
    if options.mode == "full":
        thresholds = [math.inf] * rows
    return ExitRule.of(thresholds, min_layers, limit=0 if options.mode == "full_w4" else layers)


def prefill_policy(config: ModelConfig, options: Options) -> PrefillPolicy:
    policy = PrefillPolicy.parse(options.prefill, config.num_hidden_layers)
    if options.mode == "river":
        return policy
    if options.prefill != "full":
        raise RiverError(
            f"prefill={options.prefill!r} needs mode='river'; mode={options.mode!r} fixes the prefill's depth"
        )
    return PrefillPolicy.parse("depth:0", 0) if options.mode == "full_w4" else policy


def sampling(config: ModelConfig, options: Options) -> Sampling:
    """Numbers as the ops will see them, in fp32."""
    temperature = number("temperature", options.temperature)
    top_p, min_p = number("top_p", options.top_p), number("min_p", options.min_p)
    if not 0 <= temperature <= FP32_MAX:
        raise RiverError(f"temperature={temperature}; accepted: a number from 0 (greedy) to {FP32_MAX:.6g}")
    if not 0 < top_p <= 1:
        raise RiverError(f"top_p={top_p}; accepted: above 0, up to 1")
    if not 0 <= min_p <= 1:
        raise RiverError(f"min_p={min_p}; accepted: a number from 0 (off) to 1")
    top_k = min(integer("top_k", options.top_k, 0), config.vocab_size)
    top_p = max(fp32(top_p), FP32_TINY)  # what rounds to 0 keeps one token
    return Sampling(fp32(temperature), top_k, top_p, fp32(min_p))
