"""Streams of a GPU, pretended on the CPU: work is done at once, and what no one has put in order is found.

Ops run as they come. Beside them, each stream and the host have a clock of what they may rely on: what was
given to them before, and what they have waited for. An op that touches memory which another one has written,
or writes what another one has read, must know of that by its clock. If it does not, a GPU might do the two in
the other order, or at once.
"""

from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from river_ext.engine import graph

READS_NUMBER = ("aten::_local_scalar_dense", "aten::item")  # the latter in inference mode


class Agent:
    """A stream, or the host: what it has done, and what it knows to be done, by agent."""

    device = None

    def __init__(self, name: str):
        self.name, self.knows = name, defaultdict(int)

    def learn(self, known: dict) -> None:
        for agent, done in known.items():
            self.knows[agent] = max(self.knows[agent], done)


class Access(NamedTuple):
    """What an op has done to some bytes of a storage."""

    agent: Agent
    number: int  # of the agent's ops
    knows: dict
    op: str

    def known_to(self, agent: Agent) -> bool:
        return self.number <= agent.knows[self.agent]


class Stream(Agent):
    def __init__(self, name: str, streams: "Streams"):
        super().__init__(name)
        self.streams = streams

    def wait_stream(self, other: "Stream") -> None:
        self.learn(self.streams.host.knows)
        self.learn(other.knows)

    def synchronize(self) -> None:
        self.streams.host.learn(self.knows)

    def query(self) -> bool:
        return True


class Graph:
    """In place of graph.Graph: a replay is another run, whose outputs go to the same place."""

    def __init__(self, run, captured, pool):
        self.run, self.outputs = run, None

    def replay(self) -> None:
        outputs = self.run()
        self.outputs = self.outputs or outputs
        for kept, new in zip(self.outputs, outputs, strict=True):
            kept.copy_(new)


class Streams(TorchDispatchMode):
    """Watches all ops while it is entered. `races` says which of them were in no order."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.host, self.current = Agent("the host"), Stream("the caller's stream", self)
        self.races: list[str] = []
        self._written = defaultdict(dict)  # by storage: the last write of (first byte, end)
        self._read = defaultdict(dict)  # and its reads since, by agent
        self._polled = set()  # storages that the host reads while they are written
        self._alive = {}  # whatever was seen, so that no address is used twice
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: Stream("a stream for copies", self))
        monkeypatch.setattr(torch.cuda, "stream", self._entered)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(graph, "Graph", Graph)
        new_memory = graph.Memory.__init__

        def with_a_stream(memory, *arguments, **named):
            new_memory(memory, *arguments, **named)
            memory.stream = Stream("the steps' stream", self)

        monkeypatch.setattr(graph.Memory, "__init__", with_a_stream)

    @contextmanager
    def _entered(self, stream: Stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        named = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
        written = {a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write}
        accesses = [  # before the op runs, which may change where
            (place, name in written)
            for name, value in named.items()
            for tensor in tree_leaves(value)
            if isinstance(tensor, torch.Tensor)
            for place in self._places(name, tensor, named)
        ]
        result = op(*args, **kwargs)
        if any(returned.alias_info and not returned.alias_info.is_write for returned in op._schema.returns):
            return result  # a view
        new = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        self._do(op, named, accesses + [(self._place(tensor), True) for tensor in new])
        return result

    def _places(self, name: str, tensor: torch.Tensor, named: dict) -> list[tuple]:
        """Of a cache, the slots of the active rows; of records, the one that is written."""
        rows = [tensor]
        if name in ("k_cache", "v_cache"):
            rows = [tensor[slot] for slot in named["slots"].tolist() if slot >= 0]
        if name == "records":
            rows = [tensor[named["step"].item() % len(tensor)]]
            self._polled.add(tensor.untyped_storage().data_ptr())
        if named.get("non_blocking") and name == "self" and self.current.name == "the steps' stream":
            self._polled.add(tensor.untyped_storage().data_ptr())
        return [self._place(row) for row in rows]

    def _place(self, tensor: torch.Tensor) -> tuple[int, int, int]:
        """A storage, and the bytes from the first to the end."""
        storage, size = tensor.untyped_storage(), tensor.element_size()
        self._alive.setdefault(storage.data_ptr(), storage)
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        length = 1 + sum((n - 1) * stride for n, stride in strides) if tensor.numel() else 0
        first = tensor.storage_offset() * size
        return storage.data_ptr(), first, first + length * size

    def _do(self, op, named: dict, accesses: list) -> None:
        reads_number = op.name() in READS_NUMBER
        by_host = (
            any(place[0] in self._polled for place, _ in accesses)
            and self.current.name != "the steps' stream"
        )
        agent = self.host if by_host else self.current
        agent.learn(self.host.knows)  # the host gives the op to its stream
        if reads_number and by_host:  # it has waited for what it finds
            for access in self._last_writes(accesses[0][0]):
                agent.learn(access.knows)
            return
        agent.knows[agent] += 1
        access = Access(agent, agent.knows[agent], dict(agent.knows), op.name())
        for place, writes in accesses:
            self._touch(place, writes, access)
        if reads_number:
            self.host.learn(agent.knows)

    def _last_writes(self, place: tuple[int, int, int]) -> list[Access]:
        storage, first, end = place
        return [access for (a, b), access in self._written[storage].items() if a < end and first < b]

    def _touch(self, place: tuple[int, int, int], writes: bool, access: Access) -> None:
        storage, first, end = place
        before = self._last_writes(place)
        if writes:
            before += [
                read
                for (a, b), reads in self._read[storage].items()
                if a < end and first < b
                for read in reads.values()
            ]
        self.races += [
            f"{access.op} of {access.agent.name} does not wait for {other.op} of {other.agent.name}"
            for other in before
            if not other.known_to(access.agent)
        ]
        if writes:
            self._written[storage][first, end] = access
        else:
            self._read[storage].setdefault((first, end), {})[access.agent] = access


class Landing(TorchDispatchMode):
    """Copies of a stream of their own that land at once, or as late as a wait for that stream allows.

    For ops that no dispatcher sees, such as those of an emulated GPU: there every other op is done at once.
    """

    def __init__(self, monkeypatch, late: bool):
        super().__init__()
        self.late, self.copying, self.waiting = late, False, []
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: self)
        monkeypatch.setattr(torch.cuda, "stream", self._entered)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Caller(self))

    def wait_stream(self, other) -> None:
        """The work of any other stream is done already."""

    def land(self) -> None:
        for copy in self.waiting:
            copy()
        self.waiting.clear()

    @contextmanager
    def _entered(self, stream):
        before, self.copying = self.copying, stream is self
        try:
            yield
        finally:
            self.copying = before

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if self.copying and self.late and op.name() == "aten::copy_":
            self.waiting.append(partial(op, *args, **(kwargs or {})))
            return args[0]
        return op(*args, **(kwargs or {}))


class Caller:
    """The stream of everything else; one and the same, whenever it is asked for."""

    def __init__(self, copies: Landing):
        self.copies = copies

    def __eq__(self, other):
        return isinstance(other, Caller)

    def __hash__(self):
        return 0

    def wait_stream(self, other) -> None:
        self.copies.land()
