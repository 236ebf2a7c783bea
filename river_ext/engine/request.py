"""What a user asks for, checked before anything runs: a refusal names the value and what is accepted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import torch

from ..checks import (
    FP32_MAX,
    FP32_TINY,
    choice,
    flag,
    fp32,
    integer,
    listed,
    names_keywords,
    number,
    one_each,
    short,
    strings,
    token_ids,
)
from ..errors import RiverError
from ..loading.calibrated import CALIBRATED, MOST_DRAFTS, RIVER_HEADS
from ..loading.config import ModelConfig
from ..loading.text import Text
from .exit_rule import ExitRule, PrefillPolicy
from .prompt import prompt_list, prompt_tokens
from .sampling import Sampling

MODES = ("river", "lossless", "full", "full_w4")
KV_STRATEGIES = ("share", "mask", "recompute", "propagate", "monotone")
DEEP_TOKENS = ("stream", "exit")
CALIBRATED_OPTIONS = ("threshold", "draft_tokens")  # that may be "calibrated"
MAX_LOGPROBS = 20  # as many as servers of the same kind give


@dataclass(frozen=True)
class Options:
    """What is asked for a prompt: keyword arguments of `Model.generate`, where each is described."""

    max_new_tokens: int = 256
    threshold: float | str | Sequence[float] = 0.5
    min_layers: int = 1
    prefill: str = "full"
    mode: str = "river"
    draft_tokens: int | str = "auto"
    river_head: str = "model"
    deep_tokens: str = "stream"
    kv_strategy: str = "share"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: str | Sequence[str] = ()
    stop_tokens: int | Sequence[int] | None = None
    logprobs: int | None = None
    return_logits: bool = False


# options of which a list gives each prompt its own
BY_PROMPT = ("max_new_tokens", "threshold", "min_layers", "temperature", "top_k", "top_p", "min_p", "seed")


@dataclass(frozen=True)
class Request:
    """A prompt and what is asked for it, all checked."""

    prompt: list[int]
    max_new_tokens: int
    rule: ExitRule
    prefill: PrefillPolicy
    sampling: Sampling
    stop: tuple[str, ...]
    stop_tokens: frozenset[int]
    draft_tokens: int | str | None  # None: none are drafted
    river_head: bool  # decoding steps draw by the river's head, not by the model's
    kv_strategy: str
    logprobs: int | None  # of so many of the likeliest tokens, and of the drawn one
    return_logits: bool
    dtype: torch.dtype  # of the model
    rotates_anew_after: int | None = None  # see ModelConfig
    calibrated: bool = False  # its threshold is the calibrated one, which was measured row by row

    @property
    def positions(self) -> int:
        """Places in the cache that it needs: the last new token is never fed back."""
        return len(self.prompt) + self.max_new_tokens - 1

    @property
    def full_depth(self) -> bool:
        """Whether the backbone alone computes it."""
        return (
            self.prefill.judged is None and self.prefill.limit == self.rule.limit and self.rule.never_leaves
        )

    @property
    def wants_logits(self) -> bool:
        return self.return_logits or self.logprobs is not None


def requests(config: ModelConfig, text: Text | None, prompt, options: Mapping) -> list[Request]:
    """A request for each of the prompts; some options may be lists of one value for each."""
    prompts, many = prompt_list(prompt)

    def column(name: str, value) -> list:
        """An option's value for each prompt. For one that is in no list, a list of thresholds is by layer."""
        if name not in BY_PROMPT or (name == "threshold" and not many and is_by_layer(value)):
            return [value] * len(prompts)
        return one_each(name, value, len(prompts))

    columns = {name: column(name, value) for name, value in options.items()}
    return [
        request(config, text, prompt, {name: values[number] for name, values in columns.items()})
        for number, prompt in enumerate(prompts)
    ]


def is_by_layer(threshold) -> bool:
    """Whether an option is a list of thresholds; one of a single number may be that of the only prompt."""
    value = listed("threshold", threshold)
    return isinstance(value, (list, tuple)) and len(value) > 1


def request(config: ModelConfig, text: Text | None, prompt, options: Mapping) -> Request:
    """Checks a prompt and its options against the model."""
    options = names_keywords(Options)(**options)
    calibrated = is_calibrated(options.threshold)
    options = with_calibrated(config, options)
    prompt = prompt_tokens(config, text, prompt)
    max_new_tokens = integer("max_new_tokens", options.max_new_tokens, 1, 2**63 - 1)
    if (length := len(prompt) + max_new_tokens) > config.max_length:
        raise RiverError(
            f"a prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} need {length} positions; "
            f"the model has {config.max_length}"
        )
    stop = strings("stop", options.stop)
    if stop and text is None:
        raise RiverError("stop strings need a tokenizer, and this checkpoint has no tokenizer.json")
    logprobs = options.logprobs
    if logprobs is not None:
        logprobs = integer("logprobs", logprobs, 0, min(MAX_LOGPROBS, config.vocab_size))
    return Request(
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        rule=exit_rule(config, options),
        prefill=prefill_policy(config, options),
        sampling=sampling(config, options),
        stop=stop,
        stop_tokens=stop_tokens(config, options),
        draft_tokens=draft_tokens(options),
        river_head=river_head(options),
        kv_strategy=kv_strategy(options),
        logprobs=logprobs,
        return_logits=flag("return_logits", options.return_logits),
        dtype=config.dtype,
        rotates_anew_after=config.rotates_anew_after,
        calibrated=calibrated,
    )


def is_calibrated(value) -> bool:
    """Whether an option is the word for what `river calibrate` found."""
    return isinstance(value, str) and value == CALIBRATED


def with_calibrated(config: ModelConfig, options: Options) -> Options:
    """The options with the calibrated numbers in place of the word."""
    names = [name for name in CALIBRATED_OPTIONS if is_calibrated(getattr(options, name))]
    if not names:
        return options
    found = config.calibrated
    if found is None:
        raise RiverError(
            f"{names[0]}='calibrated' needs a model that was loaded with calibrated=FILE, which "
            "`river calibrate` writes"
        )
    if "threshold" in names and options.mode == "river":
        for name, value in found.measured_with.items():
            if (given := getattr(options, name)) != value:
                raise RiverError(
                    f"{name}={short(given)} with threshold='calibrated', which was measured with "
                    f"{name}={value!r}; accepted there: that, or a number as threshold"
                )
    return replace(options, **{name: getattr(found, name) for name in names})


def stop_tokens(config: ModelConfig, options: Options) -> frozenset[int]:
    tokens = config.eos_token_ids if options.stop_tokens is None else options.stop_tokens
    tokens = listed("stop_tokens", tokens)
    tokens = [tokens] if isinstance(tokens, Integral) else tokens
    if isinstance(tokens, (set, frozenset)):
        tokens = list(tokens)
    return frozenset(token_ids("stop_tokens", tokens, config.vocab_size))


def exit_rule(config: ModelConfig, options: Options) -> ExitRule:
    """The rule of a mode: "full" and "lossless" never exit, "full_w4" runs no backbone layer.

    With deep_tokens="exit" no token runs an offloaded layer.
    """
    choice("mode", options.mode, MODES)
    by_layer = thresholds(config, options.threshold)
    min_layers = integer("min_layers", options.min_layers, 1, config.num_hidden_layers)
    if options.mode in ("full", "lossless"):
        by_layer = thresholds(config, math.inf)
    deepest = deepest_exit(config, options, min(map(fp32, by_layer)))
    if min_layers > deepest:
        raise RiverError(
            f"min_layers={min_layers} with deep_tokens='exit' and resident_layers={deepest}; accepted: 1 to "
            f"{deepest}"
        )
    return ExitRule(
        thresholds=by_layer,
        min_layers=min_layers,
        limit=0 if options.mode == "full_w4" else deepest,
    )


def thresholds(config: ModelConfig, value) -> tuple[float, ...]:
    """One for each layer, from one for all or a list."""
    value, layers = listed("threshold", value), config.num_hidden_layers
    if not isinstance(value, (list, tuple)):
        return (number("threshold", value),) * layers
    if len(value) != layers:
        raise RiverError(
            f"threshold={short(value)}, a list of {len(value)}; accepted: a number, or a list of {layers}, "
            "one for each layer"
        )
    return tuple(number("threshold", one) for one in value)


def deepest_exit(config: ModelConfig, options: Options, lowest_threshold: float) -> int:
    """Backbone layers that a token may run while it decodes: all of them, or those that are resident."""
    choice("deep_tokens", options.deep_tokens, DEEP_TOKENS)
    if options.deep_tokens == "stream":
        return config.num_hidden_layers
    if config.resident_layers is None:
        raise RiverError("deep_tokens='exit' needs a model that was loaded with resident_layers")
    if lowest_threshold == math.inf and options.mode != "full_w4":
        which = "threshold=inf" if options.mode == "river" else f"mode={options.mode!r}"
        raise RiverError(
            f"deep_tokens='exit' with {which}, where no token exits; accepted there: deep_tokens='stream'"
        )
    return config.resident_layers


def draft_tokens(options: Options) -> int | str | None:
    tokens = listed("draft_tokens", options.draft_tokens)
    if options.mode != "lossless":
        if tokens != "auto":
            raise RiverError(
                f"draft_tokens={short(tokens)} needs mode='lossless'; mode={options.mode!r} drafts nothing"
            )
        return None
    return tokens if tokens == "auto" else integer("draft_tokens", tokens, 1, MOST_DRAFTS)


def river_head(options: Options) -> bool:
    choice("river_head", options.river_head, RIVER_HEADS)
    if options.river_head == "w4" and options.mode not in ("river", "full_w4"):
        raise RiverError(
            f"river_head='w4' needs mode='river' or 'full_w4'; the tokens of mode={options.mode!r} are the "
            "backbone's"
        )
    return options.river_head == "w4"


def kv_strategy(options: Options) -> str:
    """Under all but "share" no exit layer runs, and prompts go through the whole backbone."""
    strategy = options.kv_strategy
    choice("kv_strategy", strategy, KV_STRATEGIES)
    needed = {} if strategy == "share" else {"mode": "river", "prefill": "full", "river_head": "model"}
    for name, value in needed.items():
        if (given := getattr(options, name)) != value:
            raise RiverError(
                f"{name}={given!r} needs kv_strategy='share'; kv_strategy={strategy!r} takes {name}={value!r}"
            )
    return strategy


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
    seed = integer("seed", options.seed, -(2**63), 2**63 - 1)
    return Sampling(fp32(temperature), top_k, top_p, fp32(min_p), seed)
