"""Prompts and steps of a network without an engine around them."""

from river_ext.engine.decoder import HostDecoder
from river_ext.engine.graph import Memory
from river_ext.engine.prefill import Prefill
from river_ext.engine.request import Request, request
from river_ext.engine.sequence import Sequence
from river_ext.engine.step import NewToken, Row, RowOutput


def asked(network, prompt=(0,), **options) -> Request:
    """A request for one new token, unless the options say otherwise."""
    return request(network.config, None, list(prompt), {"max_new_tokens": 1, **options})


def at_depth(depth: int) -> dict:
    """Options by which every decoded token exits there."""
    return {"threshold": -2, "min_layers": depth} if depth else {"mode": "full_w4"}


def poisoned_memory(network, slots: int, max_len: int) -> Memory:
    memory = Memory(network, slots, max_len)
    for part in (memory.cache.k, memory.cache.v):
        part.fill_(float("nan"))
    return memory


def first_row(memory: Memory, slot: int, request: Request) -> Row:
    """Prefills a slot: the row that comes next."""
    sequence = Sequence(request, None)
    sequence.take(RowOutput([Prefill(memory.network, memory.cache, slot, request).advance()]))
    return sequence.row(slot)


def step(decoder) -> list[NewToken]:
    """The token that a step gives each row: one of each, as there are no drafts."""
    outputs = decoder.step()
    assert all(output.drafts == 0 for output in outputs)
    return [new for (new,) in (output.tokens for output in outputs)]


def one_at_a_time(network, prompt, depth: int, slot: int = 1) -> tuple[list[NewToken], Memory]:
    """What the steps give that are fed a prompt in place of their own tokens."""
    memory = poisoned_memory(network, slot + 1, len(prompt))
    decoder = HostDecoder(memory, together=False)
    request = asked(network, return_logits=True, **at_depth(depth))
    news = []
    for position, token in enumerate(prompt):
        decoder.start([Row(token, position, slot, request, remaining=1)])
        news += step(decoder)
    return news, memory
