"""Prompts to outputs and streams, through an engine that is lent for the time of a call."""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..checks import choice, integer, short
from ..errors import RiverError
from ..loading.text import Text
from .decoder import HostDecoder, power_of_two
from .engine import Engine
from .graph import Memory
from .kv_strategies import KV_DECODERS
from .network import Network
from .prefill import Prefill
from .prompt import is_batch, is_chat, prompt_tokens
from .request import Request, request, requests
from .sequence import GenerationOutput, Piece, Sequence
from .step import Exits, NewToken, Row, not_finite

SCORE_BY = ("steps", "prefill")
LEAST_POSITIONS = 256  # of an engine that is lent, so that most of the requests to come fit it


class Score(NamedTuple):
    """Teacher forcing: row i belongs to token prompt_length + i of the sequence."""

    logits: Tensor  # fp32 [tokens after the prompt, vocab_size], before that token was seen
    exit_depths: list[int]


class Engines:
    """Lends engines to the calls of one model, and keeps the last one for the next call."""

    def __init__(self, network: Network, text: Text | None):
        self.network, self.text = network, text
        self.idle: deque[Engine] = deque(maxlen=1)

    @contextmanager
    def lend(
        self, requests: list[Request], batch_policy: str, exit_control: str, progress: bool = False
    ) -> Iterator[Engine]:
        """The idle engine if it fits the requests, else a new one; it is idle again afterwards."""
        slots = power_of_two(min(len(requests), ops.MAX_ROWS))
        positions = max(request.positions for request in requests)
        engine = self._idle(slots, positions, batch_policy)
        if engine is None:
            max_len = min(max(LEAST_POSITIONS, power_of_two(positions)), self.network.config.max_length)
            engine = Engine(
                self.network, self.text, slots=slots, max_len=max_len,
                batch_policy=batch_policy, exit_control=exit_control,
            )  # fmt: skip
        engine.use(exit_control)
        engine.progress = progress
        try:
            yield engine
        finally:
            engine.clear()
            self.idle.append(engine)

    def _idle(self, slots: int, positions: int, batch_policy: str) -> Engine | None:
        with suppress(IndexError):  # none is idle
            engine = self.idle.pop()
            fits = engine.slots == slots and engine.max_len >= positions
            current = engine.addresses == self.network.addresses()
            if fits and current and engine.batch_policy == batch_policy:
                return engine
        return None  # and one that does not fit is gone, before there is a second cache


def generate(
    engines: Engines, prompt, options: Mapping, batch_policy: str, exit_control: str, progress: bool = False
) -> GenerationOutput | list[GenerationOutput]:
    """One output for one prompt, a list for a list; an error of one prompt alone is raised."""
    Engine.check(batch_policy, exit_control)
    asked = requests(engines.network.config, engines.text, prompt, options)
    outputs = dict.fromkeys(range(len(asked)))
    with engines.lend(asked, batch_policy, exit_control, progress) as engine:
        for number, one in enumerate(asked):
            engine.add(Sequence(one, engines.text), number)
        for event in engine:
            if event.output:
                outputs[event.id] = event.output
    return list(outputs.values()) if is_batch(prompt) else outputs[0].checked()


class Stream:
    """Iterates over the pieces of one prompt's generation, each as soon as it is certain."""

    def __init__(
        self,
        engines: Engines,
        prompt,
        options: Mapping,
        batch_policy: str,
        exit_control: str,
        progress: bool = False,
    ):
        if is_batch(prompt):
            raise RiverError("stream takes one prompt, not a list of prompts; generate takes a list")
        Engine.check(batch_policy, exit_control)
        (asked,) = requests(engines.network.config, engines.text, prompt, options)
        self._sequence = Sequence(asked, engines.text)
        self._pieces = _pieces(engines, self._sequence, batch_policy, exit_control, progress)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    @property
    def output(self) -> GenerationOutput:
        """What `generate` returns: when the stream has ended, or what there is before."""
        return self._sequence.output()


def _pieces(
    engines: Engines, sequence: Sequence, batch_policy: str, exit_control: str, progress: bool
) -> Iterator[Piece]:
    """A function, not a method: the engine goes back when the stream that holds this is dropped."""
    with engines.lend([sequence.request], batch_policy, exit_control, progress) as engine:
        engine.add(sequence)
        for event in engine:
            if event.piece is None:
                sequence.output().checked()
            yield event.piece


def score(network: Network, tokens, prompt_length: int, by: str, options: Mapping) -> Score:
    """Feeds given tokens instead of the model's own, through the same prefill and steps."""
    config = network.config
    choice("by", by, SCORE_BY)
    if isinstance(tokens, str) or is_chat(tokens):
        raise RiverError(f"tokens is {short(tokens)}; accepted: token ids, as prompt_length counts them")
    tokens = prompt_tokens(config, None, tokens)
    if len(tokens) > config.max_length:
        raise RiverError(f"{len(tokens)} tokens need as many positions; the model has {config.max_length}")
    prompt_length = integer("prompt_length", prompt_length, 1, len(tokens) - 1)
    prefilled = prompt_length if by == "steps" else len(tokens) - 1
    options = {**options, "max_new_tokens": len(tokens) - prefilled, "return_logits": True}
    asked = request(config, None, tokens[:prefilled], options)
    if asked.river_head:
        network.check_river_head()
    memory = Memory(network, slots=1, max_len=asked.positions)
    decoder = KV_DECODERS.get(asked.kv_strategy, HostDecoder)(memory, together=False)
    news, keep = [], 1 + prefilled - prompt_length
    for position in range(prefilled - 1, len(tokens) - 1):
        if not news or position == asked.rotates_anew_after:
            known = replace(asked, prompt=tokens[: position + 1])
            prefill = Prefill(memory.network, memory.cache, 0, known, keep=keep)
            new, keep = prefill.advance(), 1
            news += [*_of_earlier(network, prefill.kept[:-1], asked, new), new]
            exits = Exits()
        else:
            decoder.start([Row(tokens[position], position, 0, asked, remaining=1, exits=exits)])
            news += decoder.step()[0].tokens
        exits.depths.append(news[-1].exit_depth)
    for position, new in enumerate(news, start=prompt_length):
        if new.token < 0:
            raise RiverError(not_finite(network.dtype, position, new.similarities))
    return Score(torch.stack([new.logits for new in news]), [new.exit_depth for new in news])


@torch.inference_mode()
def _of_earlier(network: Network, hidden: Tensor, asked: Request, first: NewToken) -> list[NewToken]:
    """What follows prompt tokens before the last one, of which hidden [T, hidden_size] is after all layers.

    The head and the exit depth are those of `first`, which follows the last one.
    """
    news = []
    for block in hidden.split(ops.MAX_ROWS) if len(hidden) else ():
        tokens, logits, _ = network.head(block, asked.river_head and asked.rule.limit == 0)
        rows = zip(tokens.tolist(), logits, strict=True)
        news += [NewToken(token, first.exit_depth, [], row) for token, row in rows]
    return news
