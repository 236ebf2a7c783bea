"""What a user asks for, checked before anything runs: a refusal names the value and what is accepted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from . import ops
from .config import ModelConfig
from .errors import RiverError
from .exit import BATCH_POLICIES, ExitRule
from .prefill import PrefillPolicy
from .sampling import Sampling
from .text import Text

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

    @property
    def needs_logits(self) -> bool:
        """Whether the host sees the logits of every step."""
        return self.return_logits or self.sampling.filters


def is_batch(prompt) -> bool:
    """Whether a prompt is a list of prompts: a list whose first item is no token id."""
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and not isinstance(prompt[0], Real)


def plan(config: ModelConfig, text: Text | None, prompt, options: Options) -> Plan:
    """Checks prompt and options against the model."""
    prompts = list(prompt) if is_batch(prompt) else [prompt]
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
    stop_tokens = [stop_tokens] if isinstance(stop_tokens, Integral) else stop_tokens
    checked = Plan(
        prompts=prompts,
        seeds=per_request("seed", options.seed, len(prompts), integer, -(2**63), 2**63 - 1),
        rule=exit_rule(config, options, len(prompts)),
        prefill=prefill_policy(config, options),
        sampling=sampling(options),
        max_new_tokens=max_new_tokens,
        stop=stop,
        stop_tokens=frozenset(token_ids("stop_tokens", stop_tokens, config)),
        return_logits=bool(options.return_logits),
        exit_control=options.exit_control,
        dtype=config.dtype,
    )
    check_exit_control(checked)
    return checked


def check_exit_control(plan: Plan) -> None:
    choice("exit_control", plan.exit_control, EXIT_CONTROLS)
    if plan.exit_control == "device" and plan.needs_logits:
        top_k, top_p = plan.sampling.top_k, plan.sampling.top_p
        why = "return_logits=True" if plan.return_logits else f"top_k={top_k}" if top_k else f"top_p={top_p}"
        raise RiverError(
            f"exit_control='device' with {why}, which needs every step's logits on the host; "
            "accepted: 'auto' or 'host'"
        )


def prompt_tokens(config: ModelConfig, text: Text | None, prompt) -> list[int]:
    if isinstance(prompt, str):
        if text is None:
            raise RiverError("a text prompt needs a tokenizer, and this checkpoint has no tokenizer.json")
        prompt = text.encode(prompt) if prompt else []
    tokens = token_ids("prompt", prompt, config)
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


def sampling(options: Options) -> Sampling:
    temperature, top_p = number("temperature", options.temperature), number("top_p", options.top_p)
    if not 0 <= temperature < math.inf:
        raise RiverError(f"temperature={temperature}; accepted: a finite number from 0 (greedy)")
    if not 0 < top_p <= 1:
        raise RiverError(f"top_p={top_p}; accepted: above 0, up to 1")
    return Sampling(temperature, integer("top_k", options.top_k, 0), top_p)


def per_request(name: str, value, rows: int, check, *limits) -> list:
    """One checked value per request from one for all or a list."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * rows
    if len(values) != rows:
        raise RiverError(
            f"{name} has {len(values)} values for {rows} prompts; accepted: one, or one per prompt"
        )
    return [check(name, v, *limits) for v in values]


def number(name: str, value) -> float:
    try:
        result = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        result = math.nan
    if math.isnan(result):
        raise RiverError(f"{name}={short(value)}; accepted: a number, not NaN")
    return result


def integer(name: str, value, low: int, high: int | None = None) -> int:
    fits = isinstance(value, Integral) and not isinstance(value, bool)
    if not fits or value < low or (high is not None and value > high):
        raise RiverError(
            f"{name}={short(value)}; accepted: an integer from {low}"
            + (f" to {high}" if high is not None else "")
        )
    return int(value)


def strings(name: str, value) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) and v for v in values):
        raise RiverError(f"{name}={short(value)}; accepted: a string that is not empty, or a list of them")
    return tuple(values)


def token_ids(name: str, value, config: ModelConfig) -> list[int]:
    value = value.tolist() if hasattr(value, "tolist") else value  # a tensor, an array
    if not isinstance(value, (list, tuple, set, frozenset, range)):
        raise RiverError(f"{name} is a {type(value).__name__}; accepted: text or a list of token ids")
    for token in value:
        if not isinstance(token, Integral) or isinstance(token, bool) or not 0 <= token < config.vocab_size:
            raise RiverError(
                f"{name} holds {short(token)}; accepted: token ids from 0 to {config.vocab_size - 1}"
            )
    return [int(token) for token in value]


def choice(name: str, value, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise RiverError(f"{name}={short(value)}; accepted: {', '.join(map(repr, accepted))}")


def short(value) -> str:
    """repr, cut to what fits a one-line message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
