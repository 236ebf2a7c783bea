"""The slots of an engine: which are free, and what they hold for prompts that begin alike."""

from itertools import takewhile
from os.path import commonprefix
from typing import NamedTuple

from .batch import Running
from .cache import KVCache
from .network import Network
from .prefill import prompt_kind
from .request import Request


class Contents(NamedTuple):
    """What a slot holds, that prompts may take over while nothing else is written there."""

    tokens: list[int]  # whose K and V are there, from position 0 on
    by_backbone: int  # at so many positions from 0 on, the backbone alone wrote them, as a prompt would
    rotation: int  # of the keys, see Network.rotation


EMPTY = Contents([], 0, 0)


class Slots:
    """Lends slots to requests, whose prompts go on from what a slot holds of them already.

    A prompt takes over what its own prefill would write, bit for bit, if it is a prompt that goes through
    the backbone alone: on a CPU that is what the backbone wrote, whoever's it was; on a GPU the whole blocks
    of rows of other such prompts. With `reuse`, it takes over all there is, also what exit layers wrote; then
    tokens may depend on earlier requests.
    """

    def __init__(self, network: Network, count: int, reuse: bool):
        self.network, self.count, self.reuse = network, count, reuse
        kind = prompt_kind(network)
        self.block = kind.rows_at_a_time if kind.cuts_change_bits and not reuse else 1
        self.clear()

    def clear(self) -> None:
        """All are free and hold nothing."""
        self.free = list(range(self.count))  # the one that has been so for longest first
        self._contents = [EMPTY] * self.count

    def keep(self, used: set[int]) -> None:
        """All but these are free."""
        self.free = [slot for slot in range(self.count) if slot not in used]

    def take(self, running: Running) -> None:
        """A free slot for a request: that of its conversation, or of what others need the least.

        It is the one that holds most of the prompt. But where that is less than half of what the slot holds,
        the rest may be another's conversation, which goes on; what the two share can be copied.
        """
        held = [self._held(running.sequence.request, slot) for slot in range(self.count)]
        slot = max(self.free, key=held.__getitem__)
        if held[slot] < len(self._contents[slot].tokens) / 2:
            slot = self.free[0]
        running.start = max(held)  # so far: a slot may hold more of it when its prefill begins
        running.slot = slot
        self.free.remove(slot)

    def fill(self, running: Running, cache: KVCache) -> None:
        """Before its prefill: its slot gets what any slot holds of the prompt, running.start positions.

        That is nothing where all of a sequence's tokens rotate anew.
        """
        own, request = running.slot, running.sequence.request
        held = [0 if running.sequence.tokens else self._held(request, slot) for slot in range(self.count)]
        source = own if held[own] == max(held) else held.index(max(held))
        found, running.start = self._contents[source], held[source]
        if source != own:
            self._contents[own] = EMPTY  # also if an exception ends this
            cache.copy(source, own, running.start)
        by_backbone = min(found.by_backbone, running.start)
        self._contents[own] = Contents(request.prompt[: running.start], by_backbone, found.rotation)

    def note(self, running: Running) -> None:
        """What the slot holds of a request whose prompt is there."""
        self._contents[running.slot] = self._written(running)

    def give_back(self, running: Running) -> None:
        """That of a request that has ended."""
        self.free.append(running.slot)
        self.note(running)

    def _held(self, request: Request, slot: int) -> int:
        """Positions of a prompt that a slot holds and that it may take over: all but one at most."""
        tokens, by_backbone, rotation = self._contents[slot]
        taken_over = self.reuse or self._is_exact(request)
        if not taken_over or rotation != self.network.rotation(len(request.prompt)):
            return 0
        if not self.reuse or request.full_depth:
            tokens = tokens[:by_backbone]
        held = len(commonprefix([tokens, request.prompt[:-1]]))
        return held - held % self.block

    def _is_exact(self, request: Request) -> bool:
        """Whether its prefill would write what the backbone wrote."""
        prefill, layers = request.prefill, self.network.config.num_hidden_layers
        return prefill.judged is None and prefill.limit == layers

    def _written(self, running: Running) -> Contents:
        """What its slot holds in all layers, for those who may take it over."""
        sequence, before = running.sequence, self._contents[running.slot]
        first = running.prefilled - len(sequence.request.prompt)  # token that the prefill drew
        if len(sequence.tokens) <= first:
            return before  # positions before the prefill's alone
        by_backbone = min(before.by_backbone, running.start)
        depths, layers = sequence.exit_depths[first:], self.network.config.num_hidden_layers
        if by_backbone == running.start and depths[:1] == [layers]:
            steps = sum(1 for _ in takewhile(layers.__eq__, depths[1:])) if self.block == 1 else 0
            by_backbone = running.prefilled + steps
        written = sequence.known[:-1]
        if sequence.request.kv_strategy != "share" or not self.reuse:
            written = written[:by_backbone]
        return Contents(written, by_backbone, self.network.rotation(running.prefilled))
