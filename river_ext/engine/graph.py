"""Steps as captured graphs, and the memory that they work on.

A graph holds addresses, not values. So all that a step reads and writes lies in a `Runner`, which has the
graphs captured on it. What is captured are the functions at the end of this file. Where the host decides on
exits, a step is the backbone in parts and then the tail of its exit depth; where the device does, a graph is
one whole step or two. Steps that draw through filters are captured apart, and so are those that keep logits;
the filters' settings are values.
"""

import gc
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import TypeVar

import numpy
import torch
from torch import Tensor

from .. import ops
from ..errors import RiverError
from .cache import KVCache
from .cpu_graph import CpuGraph, call
from .network import Decision, Network, Place
from .offload import network_of_engine
from .sampling import Drawing, draw
from .step import Row

RECORDS = 8  # steps whose results the device keeps for the host
LEAST_STOP_TOKENS = 16
POLLS = 1000  # between two looks at how the device is
PATIENCE = 120.0  # seconds without a result

Value = TypeVar("Value")


class Memory:
    """What the runners of one engine share: the cache, and on a GPU the stream and the graphs' memory."""

    def __init__(self, network: Network, slots: int, max_len: int):
        self.network = network_of_engine(network)
        self.cache = KVCache(network.config, slots, max_len, network.dtype, network.device)
        self.rope = network.rope(max_len)
        on_gpu = network.device.type == "cuda"
        self.stream = torch.cuda.Stream(network.device) if on_gpu else None
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None

    def check(self, rows: Sequence[Row]) -> None:
        """Here because an op on a GPU could not without waiting for it."""
        slots, max_len = self.cache.slots, self.cache.max_len
        if len({row.slot for row in rows}) < len(rows):
            raise RiverError("two rows have the same slot")
        for row in rows:
            if not (0 <= row.slot < slots and row.position >= 0 and row.position + row.remaining <= max_len):
                raise RiverError(
                    f"slot {row.slot}, position {row.position} and {row.remaining} more tokens are outside "
                    f"of the cache of {slots} slots x {max_len} positions"
                )

    def on_stream(self) -> AbstractContextManager:
        """Work is given to the steps' stream while this is entered."""
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    def follow_caller(self) -> None:
        """What the caller's stream has been given comes before what the steps' stream is given next."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def lead_caller(self) -> None:
        """The other way round."""
        if self.stream:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def synchronise(self) -> None:
        if self.stream:
            self.stream.synchronize()
            self.network.synchronise()


class Graphs(ABC):
    """Captured parts, on a stream of their own; the caller's stream is the current one elsewhere."""

    def __init__(self, memory: Memory):
        self.memory = memory
        self.graphs: OrderedDict[tuple, Graph] = OrderedDict()  # that used last comes last
        # 3 a layer are what rows of one rule need that decides after every layer, 60 those of cycles
        self.most_graphs = 4 * (memory.network.config.num_hidden_layers + 14)

    @torch.inference_mode()
    def warm_up(self, *parts: tuple) -> None:
        """Every op once, without active rows: in a capture no kernel may load and no workspace grow."""
        if self.memory.stream is None:
            return
        self.memory.follow_caller()
        with self.memory.on_stream():
            for part, *arguments in parts:
                part(self, *arguments)
        self.memory.synchronise()

    @abstractmethod
    def fetches(self, part: Callable, *arguments) -> bool:
        """Whether part(self, *arguments) fetches layers: then it is called each time, not captured.

        What there is to copy depends on what the calls before have left there.
        """

    @torch.inference_mode()
    def replay(self, part: Callable, *arguments) -> "Graph":
        """Replays the graph of part(self, *arguments), captured when it is first needed."""
        key = (part, *arguments)
        with self.memory.on_stream():
            if key in self.graphs:
                self.graphs.move_to_end(key)
            else:
                self._make_room()
                captured = not self.fetches(part, *arguments)
                self.graphs[key] = Graph(partial(part, self, *arguments), captured, self.memory.pool)
            self.graphs[key].replay()
        return self.graphs[key]

    def _make_room(self) -> None:
        """For a graph. Rules by layer have any number of them, each with the logits of its own."""
        while len(self.graphs) >= self.most_graphs:
            self.memory.synchronise()  # it may be in flight
            self.graphs.popitem(last=False)

    def poll(self, read: Callable[[], Value], arrived: Callable[[Value], bool]) -> Value:
        """What `read` gives as soon as it is what the device was to write."""
        start, polls, stream = time.monotonic(), 0, self.memory.stream
        while not arrived(value := read()):
            polls += 1
            if polls % POLLS == 0:
                ended = stream is None or stream.query()  # raises if a kernel has failed
                if (ended and not arrived(read())) or time.monotonic() - start > PATIENCE:
                    raise RiverError(f"no result from {self.memory.network.device} after {polls} polls")
        return value


class Runner(Graphs):
    """What steps of `rows` rows read and write, and the graphs captured on it. Unused rows have slot -1.

    The host polls `records` and `seen`, which are pinned memory on a GPU.
    """

    def __init__(self, memory: Memory, rows: int, stop_tokens: int, together: bool):
        super().__init__(memory)
        network, config = memory.network, memory.network.config
        layers, device = config.num_hidden_layers, network.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.network, self.rows, self.layers = network, rows, layers
        self.hidden = zeros(rows, config.hidden_size, dtype=network.dtype)  # embeddings that go in
        self.between = torch.zeros_like(self.hidden)  # what the backbone's last part gave
        self.slots, self.positions = zeros(rows) - 1, zeros(rows)
        self.draw_positions, self.remaining = zeros(rows), zeros(rows)
        self.drawing = Drawing.greedy(self.draw_positions)
        self.river_heads = zeros(rows, dtype=torch.bool)  # rows that draw by the river's head
        self.stop_tokens = zeros(rows, stop_tokens, dtype=torch.int64) - 1
        # by layer: what has to be exceeded after the layer before it; layer 0 comes after none
        self.thresholds = zeros(layers, rows, dtype=torch.float32)
        self.decision = Decision(
            thresholds=self.thresholds[0],
            min_layers=zeros(rows),
            limit=zeros(rows),
            exited=zeros(layers, rows),
            similarities=zeros(layers, rows, dtype=torch.float32),
            together=together,
        )
        self.decisions = [self.decision._replace(thresholds=own) for own in self.thresholds]  # by layer
        self.steps_taken = zeros(1)
        host = {"device": "cpu", "pin_memory": device.type == "cuda"}  # whatever torch's default device is
        self.records = torch.zeros(RECORDS, 1 + 2 * rows + layers * rows, dtype=torch.int32, **host)
        # similarities that the host decides by
        self.seen = torch.zeros(layers, rows, dtype=torch.float32, **host)
        self.place = Place(memory.cache, self.slots, self.positions, memory.rope)
        # where rows are on both paths: those of either one
        self.on_backbone = self.place._replace(slots=zeros(rows) - 1)
        self.on_river = self.place._replace(slots=zeros(rows) - 1)
        steps_by_either_head = (whole_steps, 1, True, False, None)
        resident = network.first_fetched
        self.warm_up((backbone_part, 0, resident, True), (tail_part, 0, False), steps_by_either_head)

    def fetches(self, part: Callable, *arguments) -> bool:
        return part is backbone_part and arguments[1] > self.network.first_fetched  # its depth

    @torch.inference_mode()
    def start(self, rows: Sequence[Row]) -> None:
        """Takes the state of these rows, which are at most as many as the runner has; it is idle."""
        self.memory.check(rows)
        self.memory.synchronise()  # rows that were dropped may have steps in flight, which write records
        count, decision = len(rows), self.decision
        self.steps_taken.zero_()
        self.records.zero_()  # the stamps of earlier steps
        self.slots.fill_(-1)
        self.stop_tokens.fill_(-1)
        self.hidden[:count] = self.network.embed(self.slots.new_tensor([row.token for row in rows]))
        for tensor, values in (
            (self.slots, [row.slot for row in rows]),
            (self.positions, [row.position for row in rows]),
            (self.draw_positions, [row.position + 1 for row in rows]),
            (self.remaining, [row.remaining for row in rows]),
            (self.river_heads, [row.request.river_head for row in rows]),
            (decision.min_layers, [row.request.rule.min_layers for row in rows]),
            (decision.limit, [row.request.rule.limit for row in rows]),
        ):
            tensor[:count] = tensor.new_tensor(values)
        by_row = self.thresholds.new_tensor([row.request.rule.thresholds for row in rows])
        self.thresholds[1:, :count] = by_row.T[:-1]
        for index, row in enumerate(rows):
            stop_tokens = sorted(row.request.stop_tokens)
            self.stop_tokens[index, : len(stop_tokens)] = self.stop_tokens.new_tensor(stop_tokens)
        self.drawing.fill([row.request.sampling for row in rows])
        self.memory.follow_caller()

    @torch.inference_mode()
    def drop(self, row: int) -> None:
        """Nothing more of this row, from the next step given on."""
        with self.memory.on_stream():
            self.slots[row] = -1

    @torch.inference_mode()
    def route(self, staying: Sequence[int], leaving: Sequence[int]) -> None:
        """Says which rows the coming mixed parts take through the backbone, and which through the river."""
        with self.memory.on_stream():
            for place, rows in ((self.on_backbone, staying), (self.on_river, leaving)):
                place.slots.fill_(-1)
                for row in rows:
                    place.slots[row] = self.slots[row]

    def record(self, number: int) -> tuple[list[int], list[int], list[list[float]]]:
        """Of step `number`, counted from 1: exit depths and tokens by row, similarities by row and layer."""
        record, rows = self.records[(number - 1) % RECORDS], self.rows
        self.poll(record[0].item, number.__eq__)
        values = record.numpy()  # whose parts are lists sooner than torch's
        depths, tokens = values[1 : 1 + 2 * rows].reshape(2, rows).tolist()
        similarities = values[1 + 2 * rows :].view(numpy.float32).reshape(-1, rows)
        return depths, tokens, similarities.T.tolist()


class Graph:
    """A part of a step, captured once and replayed. `outputs` lie at the same place after every replay."""

    def __init__(self, run: Callable[[], tuple[Tensor, ...]], captured: bool, pool):
        if not captured:  # but called again; the outputs are those of the last replay
            self.replay = partial(self._run, run)
            return
        if pool is None:
            cpu_graph = CpuGraph()
            self.outputs = cpu_graph.capture(run)
            self.replay = cpu_graph.replay
            return
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph() would also synchronise, collect garbage and empty the cache, before every one
        collects = gc.isenabled()
        gc.disable()  # an engine that is collected waits for its stream, which a capture may forbid
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            before = ops._C.set_overlap("prefetch")  # nobody writes weights while steps run
            try:
                self.outputs = run()
            except BaseException:
                with suppress(RuntimeError):  # that the capture is void: why it is says more
                    graph.capture_end()
                raise
            finally:
                ops._C.set_overlap(before)
            graph.capture_end()
        finally:
            if collects:
                gc.enable()
        self.replay = graph.replay

    def _run(self, run: Callable[[], tuple[Tensor, ...]]) -> None:
        self.outputs = run()


# --- what is captured ------------------------------------------------------------------------------------


def backbone_part(runner: Runner, first: int, depth: int, mixed: bool) -> tuple:
    """Decoder blocks first..depth-1; mixed: of some rows, the others go through the exit layers there."""
    hidden, similarities = runner.between if first else runner.hidden, []
    for layer in runner.network.layers[first:depth]:
        runner.network.fetch(layer.index, depth)
        hidden, similarity = layer.block(hidden, runner.on_backbone if mixed else runner.place)
        if mixed:
            hidden, _ = layer.exit(hidden, runner.on_river)
        similarities.append(similarity)

    between, seen = runner.between, runner.seen[first:depth]  # a graph that held the runner would keep both

    def hand_over() -> None:
        between.copy_(hidden)
        together = (
            torch.stack(similarities) if depth - first > 1 else similarity[None]
        )  # one copy, not one each
        seen.copy_(together, non_blocking=True)

    call(hand_over)
    return ()


def tail_part(
    runner: Runner, first: int, filters: bool, logits: bool = False, river_head: bool | None = False
) -> tuple[Tensor]:
    """The river from layer `first` on, the head, and the next token's embedding: the step's logits."""
    hidden = runner.between if first else runner.hidden
    for layer in runner.network.layers[first:]:
        hidden, _ = layer.exit(hidden, runner.place)
    # the last layer's similarities are the host's business: it has those of every block
    return draw_and_advance(runner, hidden, hidden, filters, logits, river_head)


def whole_steps(
    runner: Runner, count: int, filters: bool, logits: bool = False, river_head: bool | None = False
) -> tuple[Tensor]:
    """Steps whose layers choose their own path; from one to the next the device waits for no graph to start.

    The logits are the last step's.
    """
    for _ in range(count):
        before, hidden = None, runner.hidden
        for layer, decision in zip(runner.network.layers, runner.decisions, strict=True):
            before, hidden = hidden, layer.dual(hidden, before, decision, runner.place)
        outputs = draw_and_advance(runner, before, hidden, filters, logits, river_head)
    return outputs


def draw_and_advance(
    runner: Runner, before: Tensor, hidden: Tensor, filters: bool, logits: bool, river_head: bool | None
) -> tuple[Tensor]:
    """The end of a step: tokens, the record, and what the next step starts from.

    With filters there is a kernel more, and logits are written: what draws without them does not pay. Nor
    does it pay for two heads, unless its rows draw by different ones (river_head None).
    """
    network, decision = runner.network, runner.decision
    heads = runner.river_heads if river_head is None else river_head
    tokens, all_logits, _ = draw(network, hidden, runner.drawing, filters, logits, heads)
    ops.advance(
        before=before,
        after=hidden,
        tokens=tokens,
        embed_tokens=network.embed_tokens,
        stop_tokens=runner.stop_tokens,
        hidden=runner.hidden,
        slots=runner.slots,
        positions=runner.positions,
        draw_positions=runner.draw_positions,
        remaining=runner.remaining,
        exited=decision.exited,
        similarities=decision.similarities,
        step=runner.steps_taken,
        records=runner.records,
    )
    return (all_logits,)
