"""The engine: requests come and go, and each gets the tokens that it would get alone.

A step of the engine takes queued requests into free slots, works on a prompt, and gives every sequence that
decodes its next token:

    submit -> queue -> a slot: prefill, piece by piece -> decode, step by step -> its last event
"""

import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import replace
from itertools import count
from typing import NamedTuple

from .. import ops
from ..checks import choice, flag, integer, short
from ..errors import RiverError, memory_for
from ..loading.text import Text
from .batch import Batch, Running
from .decoder import EXIT_CONTROLS, StepDecoders
from .exit_rule import BATCH_POLICIES
from .graph import Memory
from .kv_strategies import KV_DECODERS
from .lossless import LosslessDecoder
from .network import Network
from .prefill import Prefill
from .request import request
from .sequence import GenerationOutput, Piece, Sequence
from .slots import Slots
from .step import RowOutput

DEFAULT_POSITIONS = 4096  # of a slot, where nobody says and the model has as many
# of a prompt, in one step of the engine: on a CPU a row costs a good part of a step of those that decode
PREFILL_ROWS = {"cpu": 32, "cuda": 512}


class Event(NamedTuple):
    """Something new of one request."""

    id: Hashable
    piece: Piece | None  # a new token; None where it ends without one
    output: GenerationOutput | None  # once it has ended: then no other event of it follows


class Engine:
    """Generates for up to `slots` requests at once; the others wait. `Model.engine` makes one.

    `submit` and `cancel` may be called from any thread, also while another one is in `step`; one thread at a
    time steps. After an exception in a step, a KeyboardInterrupt say, the next one takes up the work: all
    requests get what they would have got, but for one that the exception left in the middle of a token.

    Its graphs hold addresses: as long as it lives, weights may be written, but not given other memory, as
    `weight.data = ...` does.
    """

    def __init__(
        self,
        network: Network,
        text: Text | None,
        *,
        slots: int = 8,
        max_len: int | None = None,
        batch_policy: str = "row",
        exit_control: str = "auto",
        reuse_prompts: bool = False,
    ):
        config = network.config
        self.check(batch_policy, exit_control)
        self.network, self.text, self.batch_policy = network, text, batch_policy
        self.slots = integer("slots", slots, 1, ops.MAX_ROWS)
        self._slots = Slots(network, self.slots, flag("reuse_prompts", reuse_prompts))
        if max_len is None:
            max_len = min(DEFAULT_POSITIONS, config.max_length)
        self.max_len = integer("max_len", max_len, 1, config.max_length)
        self.progress = False  # show on standard error how far long prompts are
        self.addresses = network.addresses()
        self._memory = Memory(network, self.slots, self.max_len)
        together = batch_policy == "min"
        self._decoders = StepDecoders(self._memory, together)
        self._lossless = LosslessDecoder(self._memory)
        self.use(exit_control)
        self._steps = Batch(self._decoders.choose)
        self._cycles = Batch.of(self._lossless)  # of requests in lossless mode
        # of those with another kv_strategy than the river's
        self._compared = {
            name: Batch.of(decoder(self._memory, together)) for name, decoder in KV_DECODERS.items()
        }
        self._batches = [self._steps, self._cycles, *self._compared.values()]
        self._lock = threading.Lock()  # of what other threads see: the queue, the ids, what is cancelled
        self._stepping = threading.Lock()
        self._ids, self._closed = count(), False
        self._queue: deque[Running] = deque()
        self._known: dict[Hashable, Running] = {}  # all that have not ended
        self._prefilling: list[Running] = []
        self._first_came = False  # had the last turn of the prompts
        self._ending: list[Running] = []  # cancelled, or left in the middle of a token
        self._events: list[Event] = []  # of this step
        self._prefill_rows = PREFILL_ROWS[network.device.type]
        self._held_up = 0  # rows of prompts that those that decode have waited for
        self._cut_off = False  # an exception has ended the last step

    @staticmethod
    def check(batch_policy: str = "row", exit_control: str = "auto") -> None:
        choice("batch_policy", batch_policy, BATCH_POLICIES)
        choice("exit_control", exit_control, ("auto", *EXIT_CONTROLS))

    def submit(self, prompt, *, id: Hashable = None, **options) -> Hashable:
        """Queues a prompt with its own options, those of `Model.generate`; returns the id of its events.

        A request that is refused, by a RiverError, changes nothing for the others.
        """
        return self.add(Sequence(request(self.network.config, self.text, prompt, options), self.text), id)

    def add(self, sequence: Sequence, id: Hashable = None) -> Hashable:
        """`submit` for a request that is checked already."""
        needed, prompt = sequence.request.positions, len(sequence.request.prompt)
        if needed > self.max_len:
            raise RiverError(
                f"a prompt of {prompt} tokens and max_new_tokens={sequence.request.max_new_tokens} need "
                f"{needed} positions of a slot; this engine has {self.slots} slots of {self.max_len}"
            )
        if sequence.request.calibrated and self.batch_policy == "min":
            raise RiverError(
                "batch_policy='min' with threshold='calibrated', which was measured row by row; accepted "
                "there: 'row'"
            )
        if sequence.request.river_head:
            self.network.check_river_head()
        with self._lock:
            self._check_open()
            id = next(i for i in self._ids if i not in self._known) if id is None else id
            if self._find(id):
                raise RiverError(f"the request {short(id)} was submitted before, and has not ended")
            self._known[id] = running = Running(id, sequence)
            self._queue.append(running)
        return id

    def cancel(self, id: Hashable) -> None:
        """Ends a request at the next step, with finish_reason "cancelled" and what it has until then."""
        with self._lock:
            self._check_open()
            running = self._find(id)
            if running is None or running.cancelled:
                raise RiverError(f"there is no request {short(id)} to cancel: it has ended, or never was")
            running.cancelled = True
            self._ending.append(running)

    def step(self) -> list[Event]:
        """Works until there is something new: a first token, or one for every sequence that decodes.

        Returns [] after a part of a long prompt, and when no request is left.
        """
        if self._stepping.locked():
            raise RiverError("another thread is in a step of this engine; accepted: one at a time")
        with self._stepping:
            self._check_open()
            if self._cut_off:
                self._begin_anew()
            self._cut_off = True
            self._work()
            self._cut_off = False
            events, self._events = self._events, []
            return events

    def __iter__(self) -> Iterator[Event]:
        """Steps until every request has ended."""
        while self.busy:
            yield from self.step()

    @property
    def busy(self) -> bool:
        """Whether a request has not ended, or nobody has been told that it has."""
        return bool(self._known or self._events)

    def clear(self) -> None:
        """Forgets all requests, wherever they are, without another event."""
        with self._stepping, self._lock:
            self._check_open()
            self._forget()

    def close(self) -> None:
        """Forgets all requests and gives the memory back; whatever is called afterwards says so."""
        with self._stepping, self._lock:
            if self._closed:
                return
            self._forget()
            self._closed = True
            del self._memory, self._decoders, self._lossless, self._steps, self._cycles, self._compared
            del self._batches

    def _forget(self) -> None:
        self._memory.synchronise()
        for place in (
            self._known, self._queue, self._prefilling, *self._batches, self._ending, self._events
        ):  # fmt: skip
            place.clear()
        self._slots.clear()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_memory"):
            self._memory.synchronise()  # steps in flight still write to what is freed now

    def use(self, exit_control: str) -> None:
        """The control of exits from the next start of steps on."""
        self._decoders.control = self._lossless.control = exit_control

    # --- a step -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        self._end_cancelled()
        self._admit()
        self._work_on_prompts()
        if not self._events or self._held_up >= self._prefill_rows:
            self._decode()

    def _begin_anew(self) -> None:
        """All go on from the tokens that they have: what a step computes depends on nothing else."""
        self._memory.synchronise()
        for place in (*self._batches, self._prefilling):
            place.clear()
        with self._lock:
            everyone = list(self._known.values())
            self._queue = deque(running for running in everyone if running.slot < 0)
            self._ending = [
                running for running in everyone if running.cancelled or running.sequence.finish_reason
            ]
        self._slots.keep({running.slot for running in everyone})
        for running in everyone:
            running.prefill = None
            if running.slot >= 0 and running.sequence.needs_prefill:
                self._prefilling.append(running)
            elif running.slot >= 0:
                self._batch(running).join(running)

    def _end_cancelled(self) -> None:
        with self._lock:
            count = len(self._ending)
            # some may have ended by themselves
            ending = [running for running in self._ending if self._known.get(running.id) is running]
        for running in ending:
            if not running.sequence.finish_reason:
                running.sequence.end("cancelled")
            self._end(running)
        with self._lock:
            del self._ending[:count]

    def _admit(self) -> None:
        """Queued requests into free slots, first come, first served."""
        if self._gathering:
            return
        with self._lock:
            while self._queue and self._slots.free:
                self._slots.take(self._queue[0])
                self._prefilling.append(self._queue.popleft())

    @property
    def _gathering(self) -> bool:
        """Whether rows that leave the backbone together wait for each other, to begin together.

        They wait for the prompts that have slots, and for none that come later.
        """
        together = self.batch_policy == "min" and any(self._batches)
        return together and not any(batch.members for batch in self._batches)

    def _work_on_prompts(self) -> None:
        """On one of them, for as long as others may have to wait: who decodes, other prompts, who comes."""
        if not self._prefilling:
            return
        running, start = self._next_prompt(), time.perf_counter()
        sequence, others = running.sequence, any(self._batches)
        try:
            with memory_for("the prompt"):
                if running.prefill is None:
                    running.prefill = self._new_prefill(running)
                new = running.prefill.advance(self._prefill_rows)
        except RiverError as error:
            sequence.fail(str(error))
            self._end(running)
            return
        sequence.prefill_took(time.perf_counter() - start)
        if new is None:
            return
        if others:  # the shortest prompt takes its time, too
            rows = running.prefilled - running.start
            self._held_up += max(rows, self._prefill_rows // ops.MAX_ROWS)
        self._prefilling.remove(running)
        running.prefill = None
        self._batch(running).join(running)
        self._take([(running, RowOutput([new]))])
        if not running.sequence.finish_reason:
            self._slots.note(running)

    def _next_prompt(self) -> Running:
        """By turns the one that came first, so that none starves, and the one that is done soonest."""
        self._first_came = not self._first_came
        if self._first_came:
            return self._prefilling[0]
        return min(self._prefilling, key=lambda running: running.rows_left)

    def _new_prefill(self, running: Running) -> Prefill:
        """Of the prompt; or of all its tokens, where they rotate anew."""
        tokens, memory = running.sequence.known, self._memory
        self._slots.fill(running, memory.cache)
        running.prefilled = len(tokens)
        request = replace(running.sequence.request, prompt=tokens)
        return Prefill(memory.network, memory.cache, running.slot, request, running.start, self.progress)

    def _batch(self, running: Running) -> Batch:
        """Where it decodes."""
        request = running.sequence.request
        if request.draft_tokens is not None:
            return self._cycles
        return self._compared.get(request.kv_strategy, self._steps)

    def _decode(self) -> None:
        """The next tokens of every sequence."""
        self._held_up = 0
        together = self.batch_policy == "min"
        waiting = bool(self._prefilling or (self._queue and self._slots.free))
        if self._gathering and self._prefilling:
            return
        stops = any(running.sequence.request.stop for running in self._steps)
        # A row that ends by a stop string, of which only the host knows, lets the others leave earlier then.
        surprises = together and stops and len(self._steps) > 1
        self._take(self._steps.step(run_ahead=not (waiting or surprises)))
        for batch in self._batches[1:]:
            self._take(batch.step(run_ahead=False))

    def _take(self, outputs: list[tuple[Running, RowOutput]]) -> None:
        """Each sequence takes its new tokens; those that end leave."""
        for running, output in outputs:
            self._events += [Event(running.id, piece, None) for piece in running.sequence.take(output)]
            if running.sequence.finish_reason:
                self._end(running)
            elif running.sequence.needs_prefill:
                self._prefill_anew(running)

    def _prefill_anew(self, running: Running) -> None:
        """All its positions rotate otherwise from its next token on, so what the slot holds is void."""
        self._batch(running).drop(running)
        self._memory.lead_caller()  # a step in flight may still write there
        self._prefilling.append(running)

    def _end(self, running: Running) -> None:
        """Its last event, which is that of its last token unless it failed; and its slot is free."""
        own = [event for event in self._events[-1:] if event.id is running.id and event.output is None]
        if running.sequence.error:
            own = []
        before = len(self._events) - len(own)
        last = Event(running.id, own[0].piece if own else None, running.sequence.output())
        for batch in self._batches:
            batch.drop(running)
        self._memory.lead_caller()  # steps in flight may still write to the slot
        with self._lock:
            if running.slot < 0:
                self._queue.remove(running)
            else:
                if running in self._prefilling:
                    self._prefilling.remove(running)
                self._slots.give_back(running)
            del self._known[running.id]
            self._events[before:] = [last]  # no interrupt comes between these two

    def _find(self, id: Hashable) -> Running | None:
        try:
            return self._known.get(id)
        except TypeError:
            raise RiverError(f"id is a {type(id).__name__}; accepted: what can be a key, a str say") from None

    def _check_open(self) -> None:
        if self._closed:
            raise RiverError("the engine is closed")
