"""Steps as captured graphs, and the memory that they work on.

A graph holds addresses, not values. So all that a step reads and writes lies in a `Runner`, which the network
keeps for the next run together with the graphs captured on it. What is captured are the functions at the end
of this file. Where the host decides on exits, a step is the backbone in parts and then the tail of its exit
depth; where the device does, two steps are a graph. Steps that draw through filters are captured apart;
the filters' settings are values. On the CPU a graph is the function itself, called again.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from .. import ops
from ..errors import RiverError
from .cache import KVCache
from .network import Decision, Network
from .request import Plan
from .sampling import Drawing, Sampling, draw
from .step import Rows

RECORDS = 8  # steps whose results the device keeps for the host
LEAST_LEN = 256  # positions of a runner, so that most of the requests to come fit it
LEAST_STOP_TOKENS = 16
POLLS = 1000  # between two looks at how the device is
PATIENCE = 120.0  # seconds without a result

Value = TypeVar("Value")
Depths = tuple[int, ...]  # of a step: after how many layers the host has looked; the last is where it is now


def lend_runner(network: Network, slots: int, max_len: int, stop_tokens: int) -> "Runner":
    """The idle runner if it fits, else a new one, which takes its place when it comes back."""
    rows = _power_of_two(slots)
    with suppress(IndexError):  # none is idle
        runner = network.idle_runners.pop()
        if runner.fits(rows, max_len, stop_tokens):
            return runner
        del runner  # before there is a second cache
    max_len = min(max(LEAST_LEN, _power_of_two(max_len)), network.config.max_length)
    return Runner(network, rows, max_len, max(LEAST_STOP_TOKENS, _power_of_two(stop_tokens)))


def _power_of_two(n: int) -> int:
    """The lowest one that is not below n."""
    return 1 << max(0, n - 1).bit_length()


class Runner:
    """What the steps of a run read and write, and the graphs captured on it.

    It has a power of two of rows, T, and a slot of the cache for each; unused rows have slot -1. The host
    polls `records` and `seen`, which are pinned memory on a GPU. Steps are on a stream of the runner's own;
    the caller's stream is the current one elsewhere.
    """

    def __init__(self, network: Network, rows: int, max_len: int, stop_tokens: int):
        config, device = network.config, network.device
        layers, on_gpu = config.num_hidden_layers, device.type == "cuda"

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.rows, self.layers = rows, layers
        self.cache = KVCache(config, rows, max_len, network.dtype, device)
        self.hidden = zeros(rows, config.hidden_size, dtype=network.dtype)  # embeddings that go in
        self.slots, self.positions = zeros(rows) - 1, zeros(rows)
        self.draw_positions, self.remaining = zeros(rows), zeros(rows)
        self.drawing = Drawing.of(Sampling(), zeros(rows, dtype=torch.int64), self.draw_positions)
        self.stop_tokens = zeros(rows, stop_tokens, dtype=torch.int64) - 1
        self.thresholds, self.min_layers = zeros(rows, dtype=torch.float32), zeros(rows)
        self.limit, self.exited, self.steps_taken = zeros(rows), zeros(layers, rows), zeros(1)
        self.similarities = zeros(layers, rows, dtype=torch.float32)
        host = {"device": "cpu", "pin_memory": on_gpu}  # whatever torch's default device is
        self.records = torch.zeros(RECORDS, 1 + 2 * rows + layers * rows, dtype=torch.int32, **host)
        # similarities that the host decides by
        self.seen = torch.zeros(layers, rows, dtype=torch.float32, **host)
        self.place = (self.cache, self.slots, self.positions, network.rope(max_len))
        self.decision = Decision(
            thresholds=self.thresholds,
            min_layers=self.min_layers,
            limit=self.limit,
            exited=self.exited,
            similarities=self.similarities,
            together=True,
        )
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self.graphs: dict[tuple, Graph] = {}
        if on_gpu:
            self._warm_up(network)

    @torch.inference_mode()
    def _warm_up(self, network: Network) -> None:
        """Every op once, without active rows: in a capture no kernel may load and no workspace grow."""
        self.follow_caller()
        with torch.cuda.stream(self.stream):
            backbone_part(network, self, (self.layers,))
            tail_part(network, self, (), filters=False)
            whole_step(network, self, filters=True)
        self.stream.synchronize()

    def fits(self, rows: int, max_len: int, stop_tokens: int) -> bool:
        enough = max_len <= self.cache.max_len and stop_tokens <= self.stop_tokens.shape[1]
        return rows == self.rows and enough  # with more rows, every step would cost more

    @torch.inference_mode()
    def start(self, network: Network, rows: Rows, plan: Plan) -> None:
        """Takes the state of a new run; the runner is idle."""
        count, stop_tokens = len(rows.slots), sorted(plan.stop_tokens)
        self.steps_taken.zero_()
        self.records.zero_()  # the stamps of another run
        self.slots.fill_(-1)
        self.stop_tokens.fill_(-1)
        self.hidden[:count] = network.embed(rows.tokens)
        self.slots[:count] = rows.slots
        self.positions[:count] = rows.positions
        self.draw_positions[:count] = rows.positions + 1
        self.drawing.seeds[:count] = rows.seeds
        self.remaining.fill_(plan.max_new_tokens - 1)  # the prefill has drawn the first one
        self.drawing.fill(plan.sampling)
        self.stop_tokens[:, : len(stop_tokens)] = self.stop_tokens.new_tensor(stop_tokens)
        self.thresholds[:count] = self.thresholds.new_tensor(rows.rule.thresholds)
        self.min_layers[:count] = self.min_layers.new_tensor(rows.rule.min_layers)
        self.limit.fill_(rows.rule.limit)
        self.follow_caller()

    def replay(self, network: Network, part: Callable, *arguments) -> "Graph":
        """Replays the graph of part(network, self, *arguments), captured when it is first needed."""
        key = (part, *arguments)
        if key not in self.graphs:
            self.graphs[key] = Graph(partial(part, network, self, *arguments), self.stream, self.pool)
        self.graphs[key].replay()
        return self.graphs[key]

    def state(self, depths: Depths) -> tuple[Tensor | None, Tensor]:
        """Input and output of the last backbone layer so far; at first, no input and the embeddings."""
        return self.graphs[backbone_part, depths].outputs if depths else (None, self.hidden)

    def poll(self, read: Callable[[], Value], arrived: Callable[[Value], bool]) -> Value:
        """What `read` gives as soon as it is what the device was to write."""
        start, polls = time.monotonic(), 0
        while not arrived(value := read()):
            polls += 1
            if polls % POLLS == 0:
                ended = self.stream is None or self.stream.query()  # raises if a kernel has failed
                if (ended and not arrived(read())) or time.monotonic() - start > PATIENCE:
                    raise RiverError(f"no result from {self.cache.k.device} after {polls} polls")
        return value

    def record(self, number: int) -> tuple[list[int], list[int], list[list[float]]]:
        """Of step `number`, counted from 1: depths and tokens by row, similarities by layer and row."""
        record = self.records[(number - 1) % RECORDS]
        self.poll(record[0].item, number.__eq__)
        depths, tokens, similarities = record[1:].split([self.rows, self.rows, self.layers * self.rows])
        similarities = similarities.view(torch.float32).view(self.layers, -1)
        return depths.tolist(), tokens.tolist(), similarities.tolist()

    def follow_caller(self) -> None:
        """What the caller's stream has been given comes before what this stream is given next."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def lead_caller(self) -> None:
        """The other way round."""
        if self.stream:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def synchronise(self) -> None:
        if self.stream:
            self.stream.synchronize()


class Graph:
    """A part of a step, captured once and replayed. `outputs` lie at the same place after every replay."""

    def __init__(self, run: Callable[[], tuple[Tensor, ...]], stream: torch.cuda.Stream | None, pool):
        if stream is None:  # the CPU, where the outputs are those of the last replay
            self.replay = partial(self._run, run)
            return
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph() would also synchronise, collect garbage and empty the cache, before every one
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        before = ops._C.set_overlap("prefetch")  # nobody writes weights while steps run
        try:
            self.outputs = run()
        finally:
            ops._C.set_overlap(before)
            graph.capture_end()
        self.replay = graph.replay

    def _run(self, run: Callable[[], tuple[Tensor, ...]]) -> None:
        self.outputs = run()


# --- what is captured ------------------------------------------------------------------------------------


def backbone_part(network: Network, runner: Runner, depths: Depths) -> tuple[Tensor, Tensor]:
    """Decoder blocks from depths[-2] to depths[-1]: input and output of the last one.

    They start from the output of the graph of depths[:-1]. So there may be several graphs to one depth, but
    no common place to which all of them would have to copy.
    """
    _, hidden = runner.state(depths[:-1])
    first, depth, similarities = (0, *depths)[-2], depths[-1], []
    for index in range(first, depth):
        before = hidden
        hidden, similarity = network.decoder_block(index, hidden, *runner.place)
        similarities.append(similarity)
    together = torch.stack(similarities) if depth - first > 1 else similarity[None]  # one copy, not one each
    runner.seen[first:depth].copy_(together, non_blocking=True)
    return before, hidden


def river_part(network: Network, runner: Runner, depths: Depths) -> tuple[Tensor, Tensor]:
    """Exit layers from depths[-1] on: input and output of the last layer."""
    before, hidden = runner.state(depths)
    for index in range(depths[-1] if depths else 0, runner.layers):
        before = hidden
        hidden, _ = network.exit_layer(index, hidden, *runner.place)
    return before, hidden


def tail_part(network: Network, runner: Runner, depths: Depths, filters: bool) -> tuple:
    """The river from depths[-1] on, the head, and the next token's embedding."""
    before, hidden = river_part(network, runner, depths)
    _draw_and_advance(network, runner, before, hidden, filters)
    return ()


def whole_steps(network: Network, runner: Runner, count: int, filters: bool = False) -> tuple:
    """Several whole steps: from one to the next the device does not wait for a graph to start."""
    for _ in range(count):
        whole_step(network, runner, filters)
    return ()


def whole_step(network: Network, runner: Runner, filters: bool = False) -> tuple:
    """A whole step, each layer by the path that the device chooses."""
    before, hidden = None, runner.hidden
    for index in range(runner.layers):
        after = network.dual_layer(index, hidden, before, runner.decision, *runner.place)
        before, hidden = hidden, after
    _draw_and_advance(network, runner, before, hidden, filters)
    return ()


def _draw_and_advance(
    network: Network, runner: Runner, before: Tensor, hidden: Tensor, filters: bool
) -> None:
    """With filters there is a kernel more, and logits are written: what draws without them does not pay."""
    tokens, _ = draw(network, hidden, runner.drawing, filters)
    advance(network, runner, before, hidden, tokens)


def advance(network: Network, runner: Runner, before: Tensor, hidden: Tensor, tokens: Tensor) -> None:
    """Writes the record of the step and makes the runner ready for the next one."""
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
        exited=runner.exited,
        similarities=runner.similarities,
        step=runner.steps_taken,
        records=runner.records,
    )
