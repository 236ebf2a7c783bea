"""The decoding loop of `generate` in transformers: generate(..., custom_generate=river_ext.custom_generate).

`generate` prepares prompts, processors of logits and stopping criteria, and calls what it was given. What it
has prepared says what to do, wherever that came from: an argument, a GenerationConfig, the model's own one.
An engine does it, and what no engine can do is refused.
"""

import inspect
import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checks import integer, listed, short
from .engine.engine import Engine
from .engine.request import requests
from .engine.sequence import Sequence
from .errors import RiverError, memory_for
from .loading.in_memory import state_of
from .model import KEPT, Kept, Model, load

# Processors of transformers, in the order in which both apply them, and the option that each holds
WARPERS = {
    "TemperatureLogitsWarper": "temperature",
    "TopKLogitsWarper": "top_k",
    "TopPLogitsWarper": "top_p",
    "MinPLogitsWarper": "min_p",
}
# Inputs of forward passes that do not take place, and what the prompts hold already
WITHOUT_EFFECT = {
    "attention_mask", "position_ids", "cache", "past_key_values", "cache_position", "use_cache",
    "logits_to_keep", "tokenizer", "synced_gpus",
}  # fmt: skip
MAX_SEED = 2**63 - 1

NOTHING_KEPT = Kept(model=None, options={}, state=[])

_making = threading.Lock()  # of rivers, one after the other


@memory_for("the prompts and their new tokens")
def custom_generate(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: list,
    stopping_criteria: list,
    generation_config,
    *,
    mode: str = "lossless",
    threshold: float | str | list = 0.5,
    min_layers: int | list[int] = 1,
    prefill: str = "full",
    draft_tokens: int | str = "auto",
    river_head: str = "model",
    kv_strategy: str = "share",
    batch_policy: str = "row",
    exit_control: str = "auto",
    seed: int | list[int] | None = None,
    streamer=None,
    **model_kwargs,
):
    """What `generate` of transformers calls in the place of its own loop, and what it then returns.

    The options from `mode` to `seed` are given to `generate`, and mean what they mean in `Model.generate`.
    The first call makes the river, which stays beside the model while that lives, and is made anew when a
    weight has been replaced or changed in place.

    Args:
        seed: of the first row, from which the others count on, or one for each row. None draws seeds from
            torch's own generator, so that `torch.manual_seed` decides.

    Raises:
        RiverError: for what the river does not do: beams, penalties and other processors of logits, ...
    """
    streamer = _argument_of_generate("streamer") if streamer is None else streamer
    try:
        _refuse_others(generation_config, model_kwargs)
        prompts = _prompts(input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"))
        ends = Ends.of(stopping_criteria, generation_config, input_ids)
        options = _sampling(logits_processor, generation_config) | dict(
            mode=mode, threshold=threshold, min_layers=min_layers, prefill=prefill, draft_tokens=draft_tokens,
            river_head=river_head, kv_strategy=kv_strategy, max_new_tokens=ends.max_new_tokens,
            seed=_seeds(seed, len(prompts), generation_config.do_sample),
            return_logits=_keeps_logits(generation_config),
        )  # fmt: skip
        Engine.check(batch_policy, exit_control)
        river = river_of(model)
        stop_tokens = [token for token in ends.tokens if 0 <= token < river.config.vocab_size]
        asked = requests(river.config, None, prompts, options | {"stop_tokens": stop_tokens})
        rows = Rows(input_ids, ends, streamer)
        with river._engines.lend(asked, batch_policy, exit_control) as engine:
            for number, one in enumerate(asked):
                engine.add(Sequence(one, None), number)
            rows.follow(engine)
    finally:
        if streamer is not None:
            streamer.end()  # who reads it does not wait for ever
    return _result(rows, logits_processor, generation_config)


def river_of(module: nn.Module) -> Model:
    """What `load` has made of a model in memory, made now if there is none of its present weights."""
    with _making:
        kept = KEPT.get(module, NOTHING_KEPT)
        if kept.model and kept.state == state_of(module):
            return kept.model
        kept = KEPT[module] = kept._replace(model=None)  # its river goes before there is a second one
        return load(module, **kept.options)


@dataclass
class Ends:
    """When rows end."""

    max_new_tokens: int
    tokens: list[int]
    others: list  # criteria that are asked after every token; a list that is called like one of them
    padding: int  # what follows in a row that ends before others

    @classmethod
    def of(cls, criteria: list, config, input_ids: Tensor) -> "Ends":
        """As stopping criteria of transformers have it: a length is that of a row with its padding."""
        own = ("MaxLengthCriteria", "EosTokenCriteria")
        tokens = [t for c in criteria if _name(c) == "EosTokenCriteria" for t in c.eos_token_id.tolist()]
        others = type(criteria)(c for c in criteria if _name(c) not in own)
        rows, length = input_ids.shape
        longest = min(c.max_length for c in criteria if _name(c) == "MaxLengthCriteria")
        padding = config.pad_token_id if config.pad_token_id is not None else next(iter(tokens), None)
        if padding is None and others and rows > 1:
            raise RiverError(
                f"pad_token_id=None for {rows} rows, which {_name(others[0])} may end; accepted: a token id"
            )
        return cls(max(1, longest - length), tokens, others, padding or 0)


class Rows:
    """What the rows of a call have so far."""

    def __init__(self, input_ids: Tensor, ends: Ends, streamer):
        rows, self.start = input_ids.shape
        self._ends, self._streamer, self._shown = ends, streamer, 0
        size = (rows, self.start + ends.max_new_tokens)
        self.ids = input_ids.new_full(size, ends.padding, dtype=torch.long)
        self.ids[:, : self.start] = input_ids
        self.counts = [0] * rows  # of new tokens
        self._ended = [False] * rows
        self.logits: list[Tensor | None] = [None] * rows  # [new tokens, vocab_size]

    @property
    def sequences(self) -> Tensor:
        return self.ids[:, : self.start + max(self.counts)].clone()

    def follow(self, engine: Engine) -> None:
        """Takes what an engine has for the rows, whose numbers are the ids of their requests."""
        while engine.busy:
            events = engine.step()
            for row, piece, output in events:
                if piece and not self._ended[row]:
                    self._append(row, piece.token)
                if output:
                    self._ended[row] = True
                    self.logits[row] = output.checked().logits
            still_running = {event.id for event in events} - {event.id for event in events if event.output}
            for row in still_running:
                if self._ended[row]:
                    engine.cancel(row)
            self._show()

    def _append(self, row: int, token: int) -> None:
        end = self.start + self.counts[row]
        self.ids[row, end] = token
        self.counts[row] += 1
        if self._ends.others:
            known = self.ids[row : row + 1, : end + 1]
            self._ended[row] = bool(self._ends.others(known, None).all())

    def _show(self) -> None:
        """Streams the tokens of a place once every row has its own, or has ended."""
        if self._streamer is None:
            return
        going = [count for count, ended in zip(self.counts, self._ended, strict=True) if not ended]
        for place in range(self._shown, min(going, default=max(self.counts))):
            self._streamer.put(self.ids[:, self.start + place].cpu())
            self._shown = place + 1


def _result(rows: Rows, logits_processor: list, config):
    """The sequences; with return_dict_in_generate among what else was asked for."""
    sequences = rows.sequences
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    logits = _by_place(rows) if _keeps_logits(config) else None
    scores = None
    if config.output_scores:
        known = (sequences[:, : rows.start + place] for place in range(len(logits)))
        scores = tuple(map(logits_processor, known, (row.clone() for row in logits)))
    return GenerateDecoderOnlyOutput(
        sequences=sequences, scores=scores, logits=logits if config.output_logits else None
    )


def _by_place(rows: Rows) -> tuple[Tensor, ...]:
    """The logits [rows, vocab_size] of each new token; zeros where a row has ended."""
    kept = [logits[:count] for logits, count in zip(rows.logits, rows.counts, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(kept).to(rows.ids.device).unbind()


def _keeps_logits(config) -> bool:
    return bool(config.return_dict_in_generate and (config.output_logits or config.output_scores))


def _argument_of_generate(name: str):
    """What the calling `generate` was given: it keeps the streamer and more to itself."""
    frame = inspect.currentframe()
    while frame and frame.f_code.co_name != "generate":
        frame = frame.f_back
    return frame.f_locals.get(name) if frame else None


def _refuse_others(config, model_kwargs: dict) -> None:
    """Ways to generate, results and inputs that are none of a river's."""
    kind = config.get_generation_mode(_argument_of_generate("assistant_model")).value
    if kind not in ("greedy_search", "sample"):
        raise RiverError(
            f"generate asks for {kind}; accepted: greedy_search and sample, with num_beams=1 and no assistant"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise RiverError(f"{name}=True; accepted: output_logits and output_scores")
    for name, value in model_kwargs.items():
        if value is not None and name not in WITHOUT_EFFECT:
            raise RiverError(f"{name} cannot be used; accepted as inputs: input_ids and attention_mask")
    for name in ("cache", "past_key_values"):
        cache = model_kwargs.get(name)
        if cache is not None and (length := cache.get_seq_length()):
            raise RiverError(f"{name} holds {length} positions; accepted: an empty cache, which stays empty")


def _prompts(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> list[list[int]]:
    """The token ids of each row, without those that are masked: padding on the left."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise RiverError(
            f"attention_mask has shape {list(attention_mask.shape)}; accepted: that of input_ids, "
            f"{list(input_ids.shape)}"
        )
    kept = attention_mask.bool()
    if not kept[:, -1:].all():
        row = int(kept[:, -1].int().argmin())
        raise RiverError(f"attention_mask of row {row} ends with 0; accepted: padding on the left")
    counted = kept.cumsum(-1) - 1
    if position_ids is not None and not torch.equal(position_ids[kept], counted[kept]):
        raise RiverError("position_ids are not those of the prompt's tokens; accepted: none, or 0, 1, 2, ...")
    return [ids[keep].tolist() for ids, keep in zip(input_ids, kept, strict=True)]


def _sampling(logits_processor: list, config) -> dict:
    """The options that processors of logits stand for; none where the likeliest token is taken."""
    names = [_name(processor) for processor in logits_processor]
    for name in names:
        if name not in WARPERS:
            raise RiverError(
                f"{name}{_asked_by(name, config)} changes logits; accepted: temperature, top_k, top_p, min_p"
            )
    for name, processor in zip(names, logits_processor, strict=True):
        if (least := getattr(processor, "min_tokens_to_keep", 1)) != 1:
            raise RiverError(f"{name} with min_tokens_to_keep={least}; accepted: 1")
    if names != [name for name in WARPERS if name in names]:
        raise RiverError(
            f"logits_processor is {', '.join(names)}; accepted: each once, in the order {', '.join(WARPERS)}"
        )
    if not config.do_sample:
        return {}
    held = {WARPERS[name]: getattr(p, WARPERS[name]) for name, p in zip(names, logits_processor, strict=True)}
    return {"temperature": 1.0} | held


def _asked_by(name: str, config) -> str:
    """The field of a GenerationConfig that a processor's name begins with, or that begins with its name."""
    stem = name.removesuffix("LogitsProcessor").removesuffix("LogitsWarper").lower()
    for field, value in vars(config).items():
        flat = field.replace("_", "")
        if stem and value is not None and (flat.startswith(stem) or stem.startswith(flat)):
            return f" ({field}={short(value)})"
    return ""


def _seeds(seed: int | list[int] | None, rows: int, do_sample: bool) -> list[int]:
    if not do_sample:
        return [0] * rows
    if seed is None:
        return torch.randint(MAX_SEED, (rows,)).tolist()
    seed = listed("seed", seed)
    if isinstance(seed, (list, tuple)):
        return list(seed)
    first = integer("seed", seed, -MAX_SEED, MAX_SEED - rows)
    return [first + row for row in range(rows)]


def _name(thing) -> str:
    return type(thing).__name__
