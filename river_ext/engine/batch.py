"""Sequences that decode together: the rows of a decoder's steps are theirs, in their order."""

import time
from collections.abc import Callable, Hashable, Iterator
from itertools import chain

from .decoder import Decoder
from .prefill import Prefill
from .sequence import Sequence
from .step import Row, RowOutput


class Running:
    """A request in the engine, and its slot once it has one."""

    def __init__(self, id: Hashable, sequence: Sequence):
        self.id, self.sequence = id, sequence
        self.slot = -1
        self.start = 0  # of the prompt, whose positions before it the slot holds already
        self.prefill: Prefill | None = None
        self.prefilled = len(sequence.request.prompt)  # tokens that its last prefill is of
        self.cancelled = False

    @property
    def rows_left(self) -> float:
        """Of its prompt: what its prefill still has to do."""
        return self.prefill.rows_left if self.prefill else len(self.sequence.known) - self.start


class Batch:
    """Members join and leave between steps; who takes these is chosen when they do."""

    def __init__(self, choose: Callable[[list[Row]], Decoder]):
        self.choose = choose
        self.decoder: Decoder | None = None
        self.members: list[Running] = []
        self._joining: list[Running] = []

    @classmethod
    def of(cls, decoder: Decoder) -> "Batch":
        """Whose steps this one takes."""
        return cls(lambda rows: decoder)

    def __len__(self) -> int:
        return len(self.members) + len(self._joining)

    def __iter__(self) -> Iterator[Running]:
        return chain(self.members, self._joining)

    def join(self, running: Running) -> None:
        """From the next step before which none is in flight."""
        self._joining.append(running)

    def step(self, run_ahead: bool) -> list[tuple[Running, RowOutput]]:
        """The next tokens of every member."""
        start = time.perf_counter()
        changes = self._joining or (self.members and self.decoder.has_room(len(self.members)))
        if changes and not (self.members and self.decoder.in_flight):
            self.members, self._joining, changes = self.members + self._joining, [], False
            rows = [running.sequence.row(running.slot) for running in self.members]
            self.decoder = self.choose(rows)
            self.decoder.start(rows)
        if not self.members:
            return []
        outputs = self.decoder.step(run_ahead and not changes)
        seconds = time.perf_counter() - start
        for running in self.members:
            running.sequence.decode_seconds += seconds
        return list(zip(self.members, outputs, strict=True))

    def drop(self, ended: Running) -> None:
        """Goes on without it."""
        if ended in self.members:
            self.decoder.keep([row for row, running in enumerate(self.members) if running is not ended])
            self.members.remove(ended)
        if ended in self._joining:
            self._joining.remove(ended)

    def clear(self) -> None:
        self.members, self._joining = [], []
