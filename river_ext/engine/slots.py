"""The slots of an engine: which are free, and what they hold for prompts that begin alike."""

from itertools import takewhile
from os.path import commonprefix
from typing import NamedTuple

from .batch import Running
from .network import Network
from .request import Request


class Contents(NamedTuple):
    """What a slot holds that no request works on."""

    tokens: list[int]  # whose K and V are there, from position 0 on
    by_backbone: int  # at so many positions from 0 on, the backbone alone wrote them
    rotation: int  # of the keys, see Network.rotation


EMPTY = Contents([], 0, 0)


class Slots:
    """Lends slots to requests. reuse: a prompt goes on from what a slot holds of it already."""

    def __init__(self, network: Network, count: int, reuse: bool):
        self.network, self.count, self.reuse = network, count, reuse
        self.clear()

    def clear(self) -> None:
        """All are free and hold nothing."""
        self.free = list(range(self.count))
        self._contents = [EMPTY] * self.count  # of one in use, what it held before

    def keep(self, used: set[int]) -> None:
        """All but these are free."""
        self.free = [slot for slot in range(self.count) if slot not in used]

    def take(self, request: Request) -> tuple[int, int]:
        """A free slot, and how many positions of the prompt it holds already: all but one at most."""
        slot, held = self._choose(request)
        self.free.remove(slot)
        return slot, held

    def give_back(self, running: Running) -> None:
        """That of a request that has ended."""
        self.free.append(running.slot)
        self._contents[running.slot] = self._written(running)

    def _choose(self, request: Request) -> tuple[int, int]:
        prompt = request.prompt
        if not self.reuse:
            return self.free[0], 0
        shared = {}
        for slot in self.free:
            tokens, by_backbone, rotation = self._contents[slot]
            usable = tokens[:by_backbone] if request.full_depth else tokens
            alike = rotation == self.network.rotation(len(prompt))
            shared[slot] = len(commonprefix([usable, prompt[:-1]])) if alike else 0
        slot = max(shared, key=shared.get)
        return slot, shared[slot]

    def _written(self, running: Running) -> Contents:
        """What its slot holds in all layers, for those who may take it over."""
        sequence, before = running.sequence, self._contents[running.slot]
        first = running.prefilled - len(sequence.request.prompt)  # token that the prefill drew
        if len(sequence.tokens) <= first:
            return EMPTY
        by_backbone = min(before.by_backbone, running.start)
        depths, layers = sequence.exit_depths[first:], self.network.config.num_hidden_layers
        if by_backbone == running.start and depths[0] == layers:
            by_backbone = running.prefilled + sum(1 for _ in takewhile(layers.__eq__, depths[1:]))
        written = sequence.known[:-1]
        if sequence.request.kv_strategy != "share":  # which may leave out layers
            written = written[:by_backbone]
        return Contents(written, by_backbone, self.network.rotation(running.prefilled))
