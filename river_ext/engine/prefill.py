"""Prefill: all tokens of one prompt through the layers, at one exit depth for the whole sequence.

Layer by layer: a layer takes all tokens before the next one starts, so that the depth may be decided from
all of them. The work goes in pieces, a block of tokens through one layer each, so that other sequences may
decode in between. On the CPU the tokens go through the decoding ops, which take many rows there: bit for bit
what decoding them one at a time gives. On a GPU they go through matrix products (matmul.py).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .. import ops
from ..progress import progress_bar
from .cache import KVCache
from .matmul import MatmulPrompt
from .network import Network, Place
from .request import Request
from .sampling import Drawing, draw
from .step import NewToken

Piece = Callable[[int, Tensor], Tensor]  # one layer, for a block of rows [n, hidden_size] from that row on


class OpsPrompt:
    """The tokens of a prompt at positions start..length-1 of a slot, through the decoding ops."""

    rows_at_a_time = 256  # weights come from memory once for all of them
    cuts_change_bits = False  # nor is a step another way to write K and V

    def __init__(self, network: Network, cache: KVCache, slot: int, start: int, length: int):
        self.network, self.cache = network, cache
        self.rope = network.prompt_rope(length, cache.max_len)
        self.positions = torch.arange(start, length, dtype=torch.int32, device=network.device)
        self.slots = torch.full_like(self.positions, slot)

    def decoder_block(self, index: int) -> Piece:
        """A backbone layer, which writes K and V of the rows."""
        return lambda first, hidden: self.network.layers[index].block(hidden, self._place(first, hidden))[0]

    def exit_layer(self, index: int) -> Piece:
        """The same for its exit layer."""
        return lambda first, hidden: self.network.layers[index].exit(hidden, self._place(first, hidden))[0]

    def _place(self, first: int, hidden: Tensor) -> Place:
        rows = slice(first, first + len(hidden))
        return Place(self.cache, self.slots[rows], self.positions[rows], self.rope)


def prompt_kind(network: Network) -> type[OpsPrompt | MatmulPrompt]:
    return MatmulPrompt if network.device.type == "cuda" else OpsPrompt


class Prefill:
    """Fills the positions of a prompt in all layers, and draws the first new token.

    Positions before `start` hold K and V already. The new token's exit depth is the prompt's, its
    similarities are those of the last prompt token. With `progress`, standard error shows how far it is, if
    it takes long. Of the last `keep` tokens `kept` has the hidden states after all layers, in the end.
    """

    def __init__(
        self,
        network: Network,
        cache: KVCache,
        slot: int,
        request: Request,
        start: int = 0,
        progress: bool = False,
        keep: int = 1,
    ):
        self.network, self.request, self.start, self.progress = network, request, start, progress
        self.keep, self.kept = keep, None  # [keep, hidden_size]
        self._prompt = prompt_kind(network)(network, cache, slot, start, len(request.prompt))
        self._pieces = self._run()
        # rows that layers still have to take, each in each layer
        self._left = (len(request.prompt) - start) * network.config.num_hidden_layers

    @property
    def rows_left(self) -> float:
        """Of whole passes."""
        return self._left / self.network.config.num_hidden_layers

    @torch.inference_mode()
    def advance(self, rows: float = math.inf) -> NewToken | None:
        """Does the work of so many rows of a whole pass, or a little more; the new token once all is done."""
        last = self._left - rows * self.network.config.num_hidden_layers
        while self._left > last or self._left == 0:  # the token takes no rows
            try:
                self._left -= next(self._pieces)
            except StopIteration as end:
                return end.value
        return None

    def _run(self) -> Iterator[int]:
        """Yields after each piece the number of its rows; the value is the new token."""
        rows = len(self.request.prompt) - self.start
        pieces = math.ceil(rows / self._prompt.rows_at_a_time) * self.network.config.num_hidden_layers
        with progress_bar("prompt", pieces, self.progress) as self._done_piece:
            hidden, similarities = yield from self._layers()
        self.kept = hidden[-self.keep :].clone()  # without the rest of the prompt
        return self._first_token(self.kept[-1:], similarities)

    def _layers(self) -> Iterator[int]:
        """The value: hidden states after all layers, and the last token's similarities of the backbone's."""
        policy = self.request.prefill
        rule = replace(self.request.rule, limit=policy.limit)  # that of its own is for decoding
        tokens = torch.tensor(self.request.prompt[self.start :], device=self.network.device)
        hidden, similarities = self.network.embed(tokens), []
        for index in range(policy.limit):
            before, depth = hidden, index + 1
            certain = depth if policy.judged else policy.limit
            hidden = yield from self._layer(self._fetched(index, certain), hidden)
            similarities.append(ops.state_similarity(before[-1:], hidden[-1:]))
            if policy.judged and rule.may_leave(depth):
                rows = slice(-1, None) if policy.judged == "last" else slice(None)
                if rule.leaves(depth, lowest_similarity(before[rows], hidden[rows])):
                    break
        depth = len(similarities)
        for index in range(depth, self.network.config.num_hidden_layers):
            hidden = yield from self._layer(self._prompt.exit_layer(index), hidden)
        return hidden, torch.cat(similarities).tolist() if depth else []

    def _fetched(self, index: int, certain: int) -> Piece:
        """A backbone layer; before each piece, as others may have fetched another one in between."""
        block = self._prompt.decoder_block(index)

        def piece(first: int, hidden: Tensor) -> Tensor:
            self.network.fetch(index, certain)
            return block(first, hidden)

        return piece

    def _layer(self, piece: Piece, hidden: Tensor) -> Iterator[int]:
        """All rows through one layer: the value is [rows, hidden_size]."""
        blocks = []
        for block in hidden.split(self._prompt.rows_at_a_time):
            blocks.append(piece(len(blocks) * self._prompt.rows_at_a_time, block))
            self._done_piece()
            yield len(block)
        return torch.cat(blocks)

    def _first_token(self, hidden: Tensor, similarities: list[float]) -> NewToken:
        request = self.request
        position = torch.tensor([len(request.prompt)], dtype=torch.int32, device=hidden.device)
        drawing = Drawing.greedy(position)
        drawing.fill([request.sampling])
        river_head = request.river_head and request.rule.limit == 0  # where all else is the river, too
        drawn, logits, _ = draw(
            self.network, hidden, drawing, request.sampling.filters, request.wants_logits, river_head
        )
        kept = logits[0] if request.wants_logits else None
        return NewToken(drawn.item(), len(similarities), similarities, kept)


def lowest_similarity(before: Tensor, after: Tensor) -> float:
    """Of the rows of before and after, [n, hidden_size] each."""
    blocks = zip(before.split(ops.MAX_ROWS), after.split(ops.MAX_ROWS), strict=True)
    return min(ops.state_similarity(x, y).min().item() for x, y in blocks)
