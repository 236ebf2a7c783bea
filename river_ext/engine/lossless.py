"""Lossless decoding: the river drafts, the backbone checks, and the tokens are the backbone's own.

A cycle of one request at position p, of which `token` is known and not yet in the cache:

    draft     the river, exit layers alone, from `token`: d1, d2, ..., dk, each of them drawn as the backbone
              would draw it, with the same noise; where the host has the control, dk may be the first one
              that the river is not sure of. Or all that follow some of these are quoted: the request's own
              text went on so where it had the same last tokens
    verify    one backbone pass over the k + 1 rows token, d1, ..., dk, which writes K and V of positions
              p .. p + k in all layers, over those of the river; it draws the true t1, t2, ..., tk+1
    accept    t1, and each further one as long as the draft before it was right

What is drawn at a position is a function of the backbone's logits, the seed and the position alone, and a
row's bits do not depend on the rows beside it. So the tokens are those of mode="full", bit for bit, whatever
the drafts are; these decide over the speed only.

The host replays a graph for each draft step, looks who goes on, and then one for the verification. Or the
device has the control: a cycle is one graph, and all k drafts are made, unless they are quotes from d1 on.
"""

import time
from collections.abc import Callable, Sequence
from operator import add

import torch
from torch import Tensor

from .. import ops
from .cpu_graph import call
from .decoder import Decoder
from .drafting import draft_cost
from .graph import RECORDS, Graphs, Memory
from .network import Place
from .sampling import Drawing, draw
from .step import NewToken, Row, RowOutput, Work


class CycleRunner(Graphs):
    """What cycles of `requests` requests read and write. Unused ones have slot -1 in all their rows.

    Row i * requests + r of a verification is token i of request r, so that one with k drafts has the first
    (k + 1) * requests rows. Draft steps have a row for each request.
    """

    def __init__(self, memory: Memory, requests: int, stop_tokens: int):
        super().__init__(memory)
        network, config = memory.network, memory.network.config
        device, hidden_size, self.layers = network.device, config.hidden_size, config.num_hidden_layers

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.network, self.requests = network, requests
        self.tokens = ops.MAX_ROWS // requests  # of a request in a verification, at most
        rows = self.tokens * requests
        self.wanted, self.remaining = zeros(requests), zeros(requests)
        self.sure = zeros(requests, dtype=torch.float32)  # the least margin of a draft that one may follow
        self.drafts = zeros(self.tokens, requests, dtype=torch.int64) - 1
        self.stop_tokens = zeros(requests, stop_tokens, dtype=torch.int64) - 1
        self.hidden = zeros(requests, hidden_size, dtype=network.dtype)  # a draft step's input
        self.slots, self.positions, draw_positions = zeros(requests) - 1, zeros(requests), zeros(requests)
        self.drawing = Drawing.greedy(draw_positions)
        self.verify_hidden = zeros(rows, hidden_size, dtype=network.dtype)
        self.verify_slots, self.verify_positions = zeros(rows) - 1, zeros(rows)
        self.verify_drawing = Drawing.greedy(zeros(rows))
        self.cycles_done = zeros(1)
        host = {"device": "cpu", "pin_memory": device.type == "cuda"}
        self.records = torch.zeros(RECORDS, 1 + requests + rows, dtype=torch.int32, **host)
        self.seen = torch.zeros(self.layers * rows, dtype=torch.float32, **host)  # similarities
        self.place = Place(memory.cache, self.slots, self.positions, memory.rope)
        if not self.fetches(cycle):  # the longest cycle: no other has more rows
            self.warm_up((cycle, self.tokens - 1, False), (cycle, 0, True))

    def fetches(self, part: Callable, *arguments) -> bool:
        return self.network.first_fetched < self.layers

    @torch.inference_mode()
    def start(self, rows: Sequence[Row]) -> None:
        """Takes the state of these requests; the runner is idle."""
        self.memory.check(rows)
        self.memory.synchronise()
        self.cycles_done.zero_()
        self.records.zero_()
        for tensor in (self.slots, self.verify_slots, self.stop_tokens, self.drafts):
            tensor.fill_(-1)
        count = len(rows)
        tokens = self.slots.new_tensor([row.token for row in rows])
        self.hidden[:count] = self.verify_hidden[:count] = self.network.embed(tokens)
        positions = self.positions.new_tensor([row.position for row in rows])
        self.positions[:count], self.drawing.positions[:count] = positions, positions + 1
        self.slots[:count] = self.verify_slots[:count] = self.slots.new_tensor([row.slot for row in rows])
        self.remaining[:count] = self.remaining.new_tensor([row.remaining for row in rows])
        for index, row in enumerate(rows):
            stop_tokens = sorted(row.request.stop_tokens)
            self.stop_tokens[index, : len(stop_tokens)] = self.stop_tokens.new_tensor(stop_tokens)
        samplings = [row.request.sampling for row in rows]
        self.drawing.fill(samplings)
        padded = samplings + samplings[:1] * (self.requests - count)
        self.verify_drawing.fill(padded * self.tokens)
        ahead = torch.arange(self.tokens, dtype=torch.int32, device=positions.device)[:, None]
        self.verify_positions.copy_((self.positions + ahead).flatten())
        self.verify_drawing.positions.copy_(self.verify_positions + 1)
        self.memory.follow_caller()

    @property
    def shared(self) -> dict[str, Tensor]:
        """What the end of a draft step and that of a verification both work on, by the names of the ops."""
        return dict(
            embed_tokens=self.network.embed_tokens,
            drafts=self.drafts,
            hidden=self.hidden,
            slots=self.slots,
            positions=self.positions,
            draw_positions=self.drawing.positions,
            verify_hidden=self.verify_hidden,
            verify_slots=self.verify_slots,
        )

    @torch.inference_mode()
    def want(self, wanted: Sequence[int]) -> None:
        """Drafts of the next cycle at most, by request."""
        with self.memory.on_stream():
            self.wanted[: len(wanted)] = self.wanted.new_tensor(wanted)

    @torch.inference_mode()
    def require(self, sure: Sequence[float]) -> None:
        """The least margins of drafts that others may follow, by request; 0 is any."""
        with self.memory.on_stream():
            self.sure[: len(sure)] = self.sure.new_tensor(sure)

    @torch.inference_mode()
    def quote(self, request: int, index: int, tokens: Sequence[int]) -> None:
        """Makes these the drafts of a request from `index` on, and the last ones of this cycle."""
        first, past = index + 1, index + 1 + len(tokens)
        with self.memory.on_stream():
            drafts = self.drafts.new_tensor(tokens)
            self.drafts[first:past, request] = drafts
            rows = slice(first * self.requests + request, past * self.requests, self.requests)
            self.verify_hidden[rows] = self.network.embed(drafts)
            self.verify_slots[rows] = self.slots[request]
            self.slots[request] = -1

    @torch.inference_mode()
    def drafted(self, index: int) -> list[int]:
        """Draft `index` by request, -1 where none is to follow it: the host waits for the device."""
        with self.memory.on_stream():
            return torch.where(self.slots >= 0, self.drafts[index + 1], -1).tolist()

    @torch.inference_mode()
    def drop(self, request: int) -> None:
        """Nothing more of this request, from the next cycle on."""
        with self.memory.on_stream():
            self.slots[request] = self.verify_slots[request] = -1

    def record(self, number: int, drafts: int) -> tuple[list[int], list[list[int]], list[list[float]]]:
        """Of cycle `number`, counted from 1: how many new tokens by request, tokens by place in the request
        and request, similarities by row of the verification and layer."""
        record = self.records[(number - 1) % RECORDS]
        self.poll(record[0].item, number.__eq__)
        values, rows = record.numpy()[1:], (drafts + 1) * self.requests
        tokens = values[self.requests :].reshape(self.tokens, self.requests)
        seen = self.seen.numpy()[: self.layers * rows].reshape(self.layers, rows)
        return values[: self.requests].tolist(), tokens.tolist(), seen.T.tolist()


class LosslessDecoder(Decoder):
    """A Decoder whose step is a cycle, and gives each row one token or more."""

    def __init__(self, memory: Memory):
        super().__init__(memory)
        self.control = "auto"
        self._draft_cost = draft_cost(memory.network)

    def start(self, rows: Sequence[Row]) -> None:
        super().start(rows)
        self.remaining = {index: row.remaining for index, row in self.rows.items()}
        # the host looks at each draft; a GPU would wait for it
        self.by_host = self.control == "host" or (self.control == "auto" and self.memory.stream is None)
        self.runner.require([row.drafting.sure if self.by_host else 0.0 for row in rows])

    def new_runner(self, rows: int, stop_tokens: int) -> CycleRunner:
        return CycleRunner(self.memory, rows, stop_tokens)

    def step(self, run_ahead: bool = True) -> list[RowOutput]:
        runner, seconds = self.runner, None
        start = time.perf_counter()
        wanted = self._want()
        if self.by_host:
            made, quoted = self._draft(wanted)
            seconds = time.perf_counter() - start
        else:
            made, quoted = self._quote(wanted)
        drafts = max(map(add, made, quoted))
        part = verification if self.by_host or not any(made) else cycle
        graph = runner.replay(part, drafts, self.filters, self.logits)
        self.taken += 1
        counts, tokens, similarities = runner.record(self.taken, drafts)
        logits = self.copied(graph.outputs[0]) if self.logits else None
        outputs = []
        for index, row in self.rows.items():
            news = self._news(index, counts[index], tokens, similarities, logits)
            drafted, quotes = made[index], quoted[index]
            row.drafting.learn(drafted, quotes, min(drafted + quotes, len(news) - 1))
            self.remaining[index] -= len(news)
            layers = runner.layers
            work = Work(backbone_rows=(1 + drafted + quotes) * layers, exit_rows=drafted * layers)
            outputs.append(RowOutput(news, drafted + quotes, quotes, seconds, work))
        return outputs

    def _want(self) -> list[int]:
        """How many drafts of the river each request wants: the most, where the host looks at each."""
        wanted = [0] * self.runner.requests
        for index, row in self.rows.items():
            wanted[index] = row.drafting.choose(self._most(index), self._draft_cost, stops_early=self.by_host)
        return wanted

    def _most(self, index: int) -> int:
        """Drafts of a request in a cycle."""
        return min(self.runner.tokens, self.remaining[index]) - 1

    def _draft(self, wanted: list[int]) -> tuple[list[int], list[int]]:
        """Drafts as long as a request goes on: of each, how many the river made, and how many are quotes."""
        runner, made, quoted = self.runner, [0] * len(wanted), [0] * len(wanted)
        drafts: dict[int, list[int]] = {index: [] for index in self.rows}  # that others may follow
        runner.want(wanted)
        for step in range(runner.tokens - 1):
            for index in list(drafts):
                if quote := self.rows[index].drafting.quote(drafts[index], self._most(index) - step):
                    runner.quote(index, step, quote)
                    quoted[index] = len(quote)
                if quote or step == wanted[index]:
                    del drafts[index]
            if not drafts:
                break
            runner.replay(draft_step, step, self.filters)
            made = [count + (index in drafts) for index, count in enumerate(made)]
            drawn = runner.drafted(step)
            drafts = {index: [*own, drawn[index]] for index, own in drafts.items() if drawn[index] >= 0}
        return made, quoted

    def _quote(self, wanted: list[int]) -> tuple[list[int], list[int]]:
        """The same where the device drafts: quotes go before, and are no longer than its drafts."""
        quotes = {index: row.drafting.quote([], self._most(index)) for index, row in self.rows.items()}
        made = [0 if quotes.get(index) else count for index, count in enumerate(wanted)]
        quoted, most = [0] * len(wanted), max(made) or self.runner.tokens
        self.runner.want(made)
        for index, quote in quotes.items():
            if quote:
                self.runner.quote(index, 0, quote[:most])
                quoted[index] = len(quote[:most])
        return made, quoted

    def _news(
        self,
        index: int,
        count: int,
        tokens: list[list[int]],
        similarities: list[list[float]],
        logits: Tensor | None,
    ) -> list[NewToken]:
        """Of one request."""
        wants_logits = logits is not None and self.rows[index].request.wants_logits
        rows = range(index, count * self.runner.requests, self.runner.requests)  # of the verification
        return [
            NewToken(
                token=tokens[place][index],
                exit_depth=self.runner.layers,
                similarities=similarities[row],
                logits=logits[row] if wants_logits else None,
                drafted=place < count - 1,
            )
            for place, row in enumerate(rows)
        ]


# --- what is captured ------------------------------------------------------------------------------------


def cycle(runner: CycleRunner, drafts: int, filters: bool, logits: bool = False) -> tuple[Tensor]:
    """Draft steps, and the verification of what they drew: its logits."""
    for index in range(drafts):
        draft_step(runner, index, filters)
    return verification(runner, drafts, filters, logits)


def draft_step(runner: CycleRunner, index: int, filters: bool) -> tuple:
    """The river alone; `index` drafts are there already."""
    network, hidden = runner.network, runner.hidden
    for layer in network.layers:
        hidden, _ = layer.exit(hidden, runner.place)
    tokens, _, margins = draw(network, hidden, runner.drawing, filters, river_head=True, margins=True)
    ops.draft_advance(
        tokens=tokens, margins=margins, index=index, wanted=runner.wanted, sure=runner.sure, **runner.shared
    )
    return ()


def verification(runner: CycleRunner, drafts: int, filters: bool, logits: bool = False) -> tuple[Tensor]:
    """The backbone over the last accepted tokens and the drafts, and how many of these stay."""
    network, rows, similarities = runner.network, (drafts + 1) * runner.requests, []
    hidden = runner.verify_hidden[:rows]
    place = runner.place._replace(slots=runner.verify_slots[:rows], positions=runner.verify_positions[:rows])
    for layer in network.layers:
        network.fetch(layer.index, runner.layers)
        hidden, similarity = layer.block(hidden, place)
        similarities.append(similarity)
    seen = runner.seen[: runner.layers * rows]
    call(lambda: seen.copy_(torch.cat(similarities), non_blocking=True))
    tokens, all_logits, _ = draw(network, hidden, runner.verify_drawing.head(rows), filters, logits)
    ops.accept(
        tokens=tokens,
        stop_tokens=runner.stop_tokens,
        remaining=runner.remaining,
        verify_positions=runner.verify_positions,
        verify_draw_positions=runner.verify_drawing.positions,
        step=runner.cycles_done,
        records=runner.records,
        **runner.shared,
    )
    return (all_logits,)
