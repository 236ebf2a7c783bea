"""Speed of a model by mode: full depth, lossless, full W4 and River, on the same prompts by the same kernels.

The settings take turns on every prompt, in an order drawn anew for each turn, so that whatever else the
machine does meets all of them alike. A plain read of the model's weights takes a turn as well: it is what
their speed is measured against. Prompts run one at a time, and their tokens are timed as a caller of `stream`
gets them.
"""

import os
import platform
import random
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, quantiles

import torch
from torch import Tensor

from . import ops
from .engine.sequence import GenerationOutput
from .evaluation.measure import Setting, Share, full_name
from .loading.sizes import kv_bytes_per_token
from .model import Model


@dataclass(frozen=True)
class Run:
    """One prompt through one setting. What needs a second token is None without one."""

    prompt: int  # its number
    tokens: list[int]
    first_token_ms: float
    prompt_tokens_per_second: float
    token_ms: list[
        float
    ]  # of each token after the first: the wait for those that come with it, over their number
    tokens_per_second: float | None  # new tokens after the first, as the next two
    gb_per_second: float | None  # weights and KV cache that the steps read
    exit_depth: float | None  # mean
    drafts: int
    quotes: int  # of these
    accepted_drafts: int
    read_gb_per_second: float  # of the plain read in the same turn


@dataclass(frozen=True)
class Result:
    """What one setting did. Speeds and times are medians of the runs, `token_ms_*` percentiles of all
    their tokens."""

    name: str
    options: dict
    first_token_ms: float
    prompt_tokens_per_second: float
    token_ms_p50: float | None
    token_ms_p95: float | None
    tokens_per_second: float | None
    x_full: float | None  # speed over the first setting's: the median over runs of the same turn and prompt
    gb_per_second: float | None
    percent_of_read: float | None  # the same over the plain read's of that turn
    exit_depth: float | None  # mean over the new tokens after the first
    acceptance: Share | None  # drafts that were right
    same_output: Share  # runs with the tokens of the first setting's
    weight_bytes: int  # of the tensors that the setting uses
    runs: list[Run]

    def as_dict(self) -> dict:
        """For JSON."""
        acceptance = self.acceptance and self.acceptance.as_dict()
        return asdict(self) | {"acceptance": acceptance, "same_output": self.same_output.as_dict()}


def settings_of(
    model: Model, thresholds: Sequence[float], min_layers: int = 1, river_head: str = "model"
) -> list[Setting]:
    """Full depth first, and a River for each threshold. Names say so where the river's head draws."""
    head = {"river_head": river_head}
    suffix = "" if river_head == "model" else ", W4 head"
    layers = "" if min_layers == 1 else f" from layer {min_layers}"
    rivers = [
        Setting(f"River {t:g}{layers}{suffix}", {"threshold": t, "min_layers": min_layers, **head})
        for t in thresholds
    ]
    return [
        Setting(full_name(model), {"mode": "full"}),
        Setting("lossless", {"mode": "lossless"}),
        Setting(f"full W4{suffix}", {"mode": "full_w4", **head}),
        *rivers,
    ]


def benchmark(
    model: Model,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[Setting],
    *,
    turns: int,
    on_run: Callable[[], None] = lambda: None,
    **options,
) -> list[Result]:
    """One result for each setting; the first one is the reference of the others.

    Args:
        prompts: token ids.
        turns: of all prompts through all settings.
        on_run: called after each run.
        options: more keyword arguments of `Model.generate`, for all settings.
    """
    runs: list[list[Run]] = [[] for _ in settings]
    longest = max(prompts, key=len)
    for setting in settings:  # the first call of a path is slower, and a longer cache is made anew
        model.generate(longest, **options | setting.options)
    shuffle = random.Random(0).shuffle
    for _ in range(turns):
        for number, prompt in enumerate(prompts):
            read = read_speed(model)
            order = list(zip(settings, runs, strict=True))
            shuffle(order)
            for setting, own in order:
                own.append(_run(model, number, prompt, options | setting.options, read))
                on_run()
    return [_result(model, setting, own, runs[0]) for setting, own in zip(settings, runs, strict=True)]


# --- one run ------------------------------------------------------------------------------------------------


def _run(model: Model, number: int, prompt: Sequence[int], options: dict, read: float) -> Run:
    start = time.perf_counter()
    stream = model.stream(prompt, **options)
    stamps = [time.perf_counter() for _ in stream]
    output = stream.output.checked()
    first, decoding = stamps[0] - start, stamps[-1] - stamps[0]
    decoded = len(stamps) - 1
    return Run(
        prompt=number,
        tokens=output.tokens,
        first_token_ms=1e3 * first,
        prompt_tokens_per_second=len(prompt) / first,
        token_ms=_waits(stamps),
        tokens_per_second=decoded / decoding if decoded else None,
        gb_per_second=_bytes_read(model, output, options) / decoding / 1e9 if decoded else None,
        exit_depth=fmean(output.exit_depths[1:]) if decoded else None,
        drafts=output.stats.drafts,
        quotes=output.stats.quotes,
        accepted_drafts=output.stats.accepted_drafts,
        read_gb_per_second=read,
    )


def _waits(stamps: Sequence[float]) -> list[float]:
    """In ms, of each token after the first. A burst counts as often as it has tokens."""
    bursts = ((1e3 * (stamps[b] - stamps[a]), b - a) for a, b in pairwise(_bursts(stamps)))
    return [ms / tokens for ms, tokens in bursts for _ in range(tokens)]


def _bursts(stamps: Sequence[float]) -> list[int]:
    """Places of the first token and of the last one of every burst. Tokens come together after a step of
    lossless decoding, and where the device has run ahead of the host: less than a tenth of the mean apart."""
    last = len(stamps) - 1
    together = (stamps[-1] - stamps[0]) / max(1, last) / 10
    return [i for i in range(last + 1) if i in (0, last) or stamps[i + 1] - stamps[i] > together]


def _bytes_read(model: Model, output: GenerationOutput, options: dict) -> float:
    """By the steps of one request alone: the weights of what ran, and the cache of what came before."""
    stats, network, layers = output.stats, model.network, model.config.num_hidden_layers
    draft_steps = stats.drafts - stats.quotes  # quotes read nothing, but for the rows of their verification
    block, exit_layer = _size(vars(model.weights.layers[0])), _size(vars(model.river[0]))
    head = model.weights.lm_head.nbytes
    if options.get("mode") == "lossless":  # a pass of the backbone reads its weights once for all its rows
        draft = layers * exit_layer + network.river_head_bytes
        weights = stats.steps * (layers * block + head) + draft_steps * draft
    else:
        used = network.river_head_bytes if options.get("river_head") == "w4" else head
        token = stats.backbone_rows * block + stats.exit_rows * exit_layer + used
        weights = (stats.new_tokens - 1) * token
    context = stats.prompt_tokens + stats.new_tokens / 2
    return weights + (stats.steps + draft_steps) * context * kv_bytes_per_token(model.config)


def _size(tensors: dict[str, Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values() if tensor is not None)


def read_speed(model: Model) -> float:
    """GB/s of a plain read of the backbone's layers and of the river's, by torch's fastest reduction."""
    tensors = [
        tensor.view(torch.uint8).flatten().view(torch.int32)
        for layer in (*model.weights.layers, *model.river)
        for tensor in vars(layer).values()
        if tensor is not None and tensor.dim() > 1 and tensor.device == model.network.device
    ]
    _wait(model)
    start = time.perf_counter()
    for tensor in tensors:
        tensor.amax()
    _wait(model)
    return sum(tensor.nbytes for tensor in tensors) / (time.perf_counter() - start) / 1e9


def _wait(model: Model) -> None:
    if model.network.device.type == "cuda":
        torch.cuda.synchronize(model.network.device)


# --- all runs -----------------------------------------------------------------------------------------------


def _result(model: Model, setting: Setting, runs: list[Run], full: list[Run]) -> Result:
    def middle(values) -> float | None:
        found = [value for value in values if value is not None]
        return median(found) if found else None

    pairs = list(zip(runs, full, strict=True))
    waits = [ms for run in runs for ms in run.token_ms]
    drafts = sum(run.drafts for run in runs)
    depths = [run.exit_depth for run in runs if run.exit_depth is not None]
    return Result(
        name=setting.name,
        options=setting.options,
        first_token_ms=median(run.first_token_ms for run in runs),
        prompt_tokens_per_second=median(run.prompt_tokens_per_second for run in runs),
        token_ms_p50=middle(waits),
        token_ms_p95=quantiles(waits, n=20, method="inclusive")[-1] if len(waits) > 1 else middle(waits),
        tokens_per_second=middle(run.tokens_per_second for run in runs),
        x_full=middle(
            run.tokens_per_second / other.tokens_per_second
            for run, other in pairs
            if run.tokens_per_second and other.tokens_per_second
        ),
        gb_per_second=middle(run.gb_per_second for run in runs),
        percent_of_read=middle(
            run.gb_per_second and 100 * run.gb_per_second / run.read_gb_per_second for run in runs
        ),
        exit_depth=fmean(depths) if depths else None,
        acceptance=Share(sum(run.accepted_drafts for run in runs), drafts) if drafts else None,
        same_output=Share(sum(run.tokens == other.tokens for run, other in pairs), len(pairs)),
        weight_bytes=_weight_bytes(model, setting.options),
        runs=runs,
    )


def _weight_bytes(model: Model, options: dict) -> int:
    """Of all tensors that a setting uses for prompts and tokens, each once."""
    weights, river, mode = model.weights, model.river, options.get("mode", "river")
    used = [weights.embed_tokens, weights.norm]
    for layer, exit_layer in zip(weights.layers, river, strict=True):
        small = mode == "full_w4"  # norms and biases are the backbone's
        used += [t for t in vars(layer).values() if t is not None and not (small and t.dim() > 1)]
        used += [] if mode == "full" else vars(exit_layer).values()
    river_head = mode == "lossless" or options.get("river_head") == "w4"
    model_head = mode != "full_w4" or options.get("river_head") != "w4"
    used += [weights.lm_head] * model_head + [river.lm_head] * (river_head and river.lm_head is not None)
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in used}.values())


# --- the machine --------------------------------------------------------------------------------------------


def machine() -> dict:
    """The processor and everything that the numbers depend on."""
    build, cpuinfo = ops._C.build_info(), Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {
        "processor": facts.get("model name") or platform.processor(),
        "cpu_family": facts.get("cpu family"),  # 25 is Zen 4, 26 Zen 5: both may be "AMD EPYC"
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_isa": build["cpu_isa"],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch": torch.__version__,
        "river_ext": build["version"],
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Of the process so far: on the GPU that computes, else in the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
