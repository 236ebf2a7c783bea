"""The generation loop: prefill every prompt, then decode all rows together until each has finished."""

import time
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RiverError
from ..loading.stop_strings import StopStrings
from ..loading.text import Text, TextStream
from .cache import KVCache
from .decoder import decoder_for
from .network import Network
from .prefill import prefill
from .request import Options, Plan, exit_rule, integer, is_batch, plan, prefill_policy, prompt_tokens
from .sampling import Sampling
from .sequence import GenerationOutput, Sequence
from .step import Rows, decode_step, not_finite


class Piece(NamedTuple):
    """What a token adds to a stream. Its text may be empty, or may complete what earlier tokens began."""

    text: str
    token: int
    exit_depth: int

    def to_dict(self) -> dict:
        """For `json.dumps`."""
        return self._asdict()


class Score(NamedTuple):
    """Teacher forcing: row i belongs to token prompt_length + i of the sequence."""

    logits: Tensor  # fp32 [tokens after the prompt, vocab_size], before that token was seen
    exit_depths: list[int]


def generate(
    network: Network, text: Text | None, prompt, options: Options
) -> GenerationOutput | list[GenerationOutput]:
    """One output for one prompt, a list for a list; an error of one prompt alone is raised."""
    sequences = _sequences(text, plan(network.config, text, prompt, options))
    for _ in run(network, sequences):
        pass
    outputs = [sequence.output() for sequence in sequences]
    return outputs if is_batch(prompt) else outputs[0].checked()


class Stream:
    """Iterates over the pieces of one prompt's generation, each as soon as it is certain."""

    def __init__(self, network: Network, text: Text | None, prompt, options: Options):
        if is_batch(prompt):
            raise RiverError("stream takes one prompt, not a list of prompts; generate takes a list")
        (self._sequence,) = sequences = _sequences(text, plan(network.config, text, prompt, options))
        self._run = run(network, sequences)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Piece:
        sequence = next(self._run)
        if sequence.error:
            self._run.close()
            raise RiverError(sequence.error)
        return Piece(sequence.news, sequence.tokens[-1], sequence.exit_depths[-1])

    @property
    def output(self) -> GenerationOutput:
        """What `generate` returns: when the stream has ended, or what there is before."""
        return self._sequence.output()


def _sequences(text: Text | None, plan: Plan) -> list[Sequence]:
    stop = StopStrings(plan.stop)
    return [
        Sequence(plan, slot, TextStream(text, prompt, stop) if text else None)
        for slot, prompt in enumerate(plan.prompts)
    ]


def run(network: Network, sequences: list[Sequence]) -> Iterator[Sequence]:
    """Generates; yields a sequence whenever it has a new token, or an error in place of one."""
    plan = sequences[0].plan
    # the last new token is never fed back
    max_len = max(map(len, plan.prompts)) + plan.max_new_tokens - 1
    with closing(decoder_for(network, plan, max_len)) as decoder:
        for sequence in sequences:
            start = time.perf_counter()
            prefill_one(network, decoder.cache, sequence)
            sequence.prefill_seconds = time.perf_counter() - start
            yield sequence
        running = [sequence for sequence in sequences if not sequence.finish_reason]
        if running:
            decoder.start(first_rows(decoder.cache, running))
        while running:
            start = time.perf_counter()
            step = decoder.step()
            for row, (sequence, token) in enumerate(zip(running, step.tokens.tolist(), strict=True)):
                sequence.append(token, step, row)
            stay = [row for row, sequence in enumerate(running) if not sequence.finish_reason]
            seconds = time.perf_counter() - start
            for sequence in running:
                sequence.decode_seconds += seconds
                yield sequence
            if 0 < len(stay) < len(running):
                decoder.keep(stay)
            running = [running[row] for row in stay]


def prefill_one(network: Network, cache: KVCache, sequence: Sequence) -> None:
    plan, slot = sequence.plan, sequence.slot
    step = prefill(
        network,
        cache,
        slot,
        sequence.prompt,
        rule=plan.rule.keep([slot]),
        policy=plan.prefill,
        sampling=plan.sampling,
        seed=plan.seeds[slot],
        return_logits=plan.return_logits,
    )
    sequence.append(step.tokens.item(), step, row=0)


def first_rows(cache: KVCache, running: list[Sequence]) -> Rows:
    """The first new token of every sequence that goes on, right behind its prompt."""
    plan, slots = running[0].plan, [sequence.slot for sequence in running]
    return Rows.of(
        tokens=[sequence.tokens[-1] for sequence in running],
        slots=slots,
        positions=[len(sequence.prompt) for sequence in running],
        seeds=[plan.seeds[slot] for slot in slots],
        rule=plan.rule.keep(slots),
        cache=cache,
    )


def score(network: Network, tokens, prompt_length: int, options: Options) -> Score:
    """Feeds given tokens instead of the model's own, through the same prefill and steps."""
    config = network.config
    rule, policy = exit_rule(config, options, rows=1), prefill_policy(config, options)
    tokens = prompt_tokens(config, None, tokens)
    if len(tokens) > config.max_length:
        raise RiverError(f"{len(tokens)} tokens need as many positions; the model has {config.max_length}")
    prompt_length = integer("prompt_length", prompt_length, 1, len(tokens) - 1)
    cache = KVCache(config, 1, len(tokens) - 1, network.dtype, network.device)
    greedy = Sampling()
    steps = [prefill(network, cache, 0, tokens[:prompt_length], rule, policy, greedy, return_logits=True)]
    for position in range(prompt_length, len(tokens) - 1):
        rows = Rows.of([tokens[position]], [0], [position], [0], rule, cache)
        steps.append(decode_step(network, cache, rows, greedy, return_logits=True))
    for position, step in enumerate(steps, start=prompt_length):
        if step.tokens.item() < 0:
            raise RiverError(not_finite(network.dtype, position, step.similarities[0]))
    return Score(torch.cat([step.logits for step in steps]), [step.exit_depths[0] for step in steps])
