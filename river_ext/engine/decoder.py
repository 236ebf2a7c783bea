"""Who takes the steps: two decoders with the same tokens, exit depths and similarities.

    HostDecoder     part of the backbone, read similarities, decide, ..., the tail of that exit depth
    DeviceDecoder   whole steps whose layers choose their own path, while the host runs behind

Both replay what graph.py captures.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from .exit_rule import next_decision, still_staying
from .graph import LEAST_STOP_TOKENS, Graph, Graphs, Memory, Runner, backbone_part, tail_part, whole_steps
from .step import NewToken, Row, RowOutput, Work

# Steps in flight beyond the one that the host waits for: with the second of a pair, fewer than graph.RECORDS
RUN_AHEAD = 4


class Decoder(ABC):
    """Takes steps of up to eight rows; every step gives each of its rows a token."""

    def __init__(self, memory: Memory, together: bool = False):
        self.memory, self.together = memory, together
        self.runners: dict[int, Graphs] = {}  # by their number of rows

    def start(self, rows: Sequence[Row]) -> None:
        """The rows of the next steps; none is in flight."""
        self.runner = self._runner(len(rows), max(len(row.request.stop_tokens) for row in rows))
        self.runner.start(rows)
        self._started = self._count(len(rows))
        self.rows = dict(enumerate(rows))  # by their index in the runner, in the order of the outputs
        self.taken = 0  # steps whose output the caller has
        self.filters = any(row.request.sampling.filters for row in rows)
        self.logits = any(row.request.wants_logits for row in rows)
        heads = {row.request.river_head for row in rows}
        self.river_head = heads.pop() if len(heads) == 1 else None

    def _runner(self, rows: int, stop_tokens: int) -> Graphs:
        count = self._count(rows)
        runner = self.runners.get(count)
        if runner is None or runner.stop_tokens.shape[1] < stop_tokens:
            columns = max(LEAST_STOP_TOKENS, power_of_two(stop_tokens))
            runner = self.runners[count] = self.new_runner(count, columns)
        return runner

    def _count(self, rows: int) -> int:
        """On a GPU a power of two of rows: graphs are large, and a row more costs a step little."""
        return rows if self.memory.stream is None else power_of_two(rows)

    def has_room(self, rows: int) -> bool:
        """Whether steps of so many rows, those that are left, would be smaller after a new start."""
        return rows > 0 and self._count(rows) < self._started

    def new_runner(self, rows: int, stop_tokens: int) -> Graphs:
        return Runner(self.memory, rows, stop_tokens, self.together)

    @abstractmethod
    def step(self, run_ahead: bool = True) -> list[RowOutput]:
        """A token for every row, which goes in at the next step. May begin steps beyond, if wanted."""

    @property
    def in_flight(self) -> int:
        """Steps begun beyond those that the caller has."""
        return 0

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with some of the rows of the last step's output, each of which has drawn a token since."""
        kept = [list(self.rows)[row] for row in rows]
        for row in set(self.rows) - set(kept):
            self.runner.drop(row)  # the device does so by itself, unless the host alone knows why
        self.rows = {row: self.rows[row] for row in kept}

    def _outputs(
        self,
        depths: Sequence[int],
        tokens: Sequence[int],
        similarities: Sequence[Sequence[float]],
        graph: Graph,
    ) -> list[RowOutput]:
        """Of the live rows; depths and tokens are by row of the runner, similarities by row and layer."""
        logits = self.copied(graph.outputs[0]) if self.logits else None
        return [
            RowOutput(
                [
                    NewToken(
                        tokens[row],
                        depths[row],
                        similarities[row][: depths[row]],
                        logits[row] if logits is not None and self.rows[row].request.wants_logits else None,
                    )
                ],
                work=self.work(row, depths[row]),
            )
            for row in self.rows
        ]

    def work(self, row: int, depth: int) -> Work:
        """Of a live row that left at this depth."""
        return Work(backbone_rows=depth, exit_rows=self.runner.layers - depth)

    @torch.inference_mode()
    def copied(self, logits: Tensor) -> Tensor:
        """A copy that is the caller's, on its stream; the next replay writes to the same place."""
        self.memory.lead_caller()
        copied = logits.clone()
        self.memory.follow_caller()
        return copied


class HostDecoder(Decoder):
    """Replays the backbone up to the next depth at which a row may leave, and decides there."""

    def step(self, run_ahead: bool = True) -> list[RowOutput]:
        runner, layers, together = self.runner, self.runner.layers, self.together
        rules = [row.request.rule for row in self.rows.values()]
        runner.seen.fill_(math.nan)  # which no similarity is
        depth, depths = 0, [0] * len(rules)
        staying = still_staying(rules, 0, [True] * len(rules), [-math.inf] * len(rules), together)
        while depth < layers and any(staying):
            first, depth = depth, next_decision(rules, depth, staying, together, layers)
            if not all(staying):
                self._route(staying)
            runner.replay(backbone_part, first, depth, not all(staying))
            depths = [depth if stays else left for stays, left in zip(staying, depths, strict=True)]
            if depth < layers:
                staying = still_staying(rules, depth, staying, self._similarities(depth), together)
        graph = runner.replay(tail_part, depth, self.filters, self.logits, self.river_head)
        self.taken += 1
        _, tokens, _ = runner.record(self.taken)
        similarities = runner.seen.numpy().T.tolist()
        return self._outputs(dict(zip(self.rows, depths, strict=True)), tokens, similarities, graph)

    def _route(self, staying: Sequence[bool]) -> None:
        """Tells the device which rows the coming part takes through the backbone."""
        rows = list(zip(self.rows, staying, strict=True))
        self.runner.route([row for row, stays in rows if stays], [row for row, stays in rows if not stays])

    def _similarities(self, depth: int) -> list[float]:
        """Of the live rows at the last of `depth` layers, as soon as they are there."""

        def read() -> list[float]:
            similarities = self.runner.seen[depth - 1].tolist()
            return [similarities[row] for row in self.rows]

        return self.runner.poll(read, lambda similarities: not any(map(math.isnan, similarities)))


class DeviceDecoder(Decoder):
    """Replays whole steps, some of them before the host has seen what the earlier ones gave."""

    def start(self, rows: Sequence[Row]) -> None:
        super().start(rows)
        self.replayed = 0  # steps
        self.pairs = bool(ops._C.variants()["paired_steps"])  # two steps in one graph

    @property
    def in_flight(self) -> int:
        return self.replayed - self.taken

    def step(self, run_ahead: bool = True) -> list[RowOutput]:
        ahead = RUN_AHEAD if run_ahead and not self.logits else 0
        last = max(row.remaining for row in self.rows.values())
        while self.replayed < min(self.taken + 1 + ahead, last):
            count = 2 if self.pairs and ahead and last - self.replayed >= 2 else 1
            self._graph = self.runner.replay(whole_steps, count, self.filters, self.logits, self.river_head)
            self.replayed += count
        self.taken += 1
        return self._outputs(*self.runner.record(self.taken), self._graph)


EXIT_CONTROLS = {"host": HostDecoder, "device": DeviceDecoder}


class StepDecoders:
    """Both decoders of an engine, and the choice between them, which changes no result."""

    def __init__(self, memory: Memory, together: bool):
        self.control = "auto"
        self.first_fetched = memory.network.first_fetched
        self.on_gpu = memory.network.device.type == "cuda"
        self.by_control = {name: kind(memory, together) for name, kind in EXIT_CONTROLS.items()}

    def choose(self, rows: Sequence[Row]) -> Decoder:
        """Where a CPU has nothing to decide, the host's steps have fewer and plainer calls.

        Whatever is asked for, rows that may run a layer that is to be fetched are the host's: it fetches.
        """
        rules = [row.request.rule for row in rows]
        if any(rule.limit > self.first_fetched for rule in rules):
            return self.by_control["host"]
        if self.control != "auto":
            return self.by_control[self.control]
        decides = any(rule.limit > 0 and not rule.never_leaves for rule in rules)
        return self.by_control["device" if decides or self.on_gpu else "host"]


def power_of_two(n: int) -> int:
    """The lowest one that is not below n."""
    return 1 << max(0, n - 1).bit_length()
