"""The one thread that steps the engine, and the tickets by which the event loop hears of it.

A client's request has a ticket from its arrival on, a place in the server. The thread makes news of a step's
events, and hands those of a whole step to the loop at once.
"""

import asyncio
import math
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from ..engine.engine import Engine, Event
from ..engine.sequence import GenerationOutput, Sequence
from ..errors import RiverError
from .errors import ApiError, engine_failed
from .metrics import Metrics

JOIN_SECONDS = 30  # that the end of the server waits for a step


class Token(NamedTuple):
    """A new token, and the text that it made certain."""

    id: int
    text: str
    exit_depth: int
    drafted: bool
    logprob: float | None
    likeliest: list[tuple[int, float]]


class News(NamedTuple):
    """What a step has made of a request; with an output it is the last."""

    tokens: list[Token]
    output: GenerationOutput | None


class Ticket:
    """A client's request. Its sequence is the engine's thread's, all else the event loop's."""

    def __init__(self, worker: "Worker"):
        self._worker = worker
        self._news: asyncio.Queue[News | ApiError] = asyncio.Queue()  # as long as its request at most
        self.sequence: Sequence | None = None
        self.told = 0  # tokens that are news no more
        self.arrived = time.perf_counter()
        self.first_token = math.nan  # when it came

    def submit(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self._worker.submit(self)

    def tell(self, news: News | ApiError) -> None:
        self._news.put_nowait(news)

    async def __aiter__(self) -> AsyncIterator[News]:
        """Until the last; raises the error that ends the request."""
        while True:
            news = await self._news.get()
            if isinstance(news, ApiError):
                raise news
            if news.output and news.output.error:
                raise ApiError(500, news.output.error, code="generation_failed")
            yield news
            if news.output:
                return


class Worker:
    """Steps an engine while it has work.

    After an exception in a step, all requests, running, waiting and to come, get it as their error.
    """

    def __init__(self, engine: Engine, waiting: int, metrics: Metrics):
        """waiting: requests beside those in slots; more are refused."""
        self.engine, self.metrics = engine, metrics
        self.failure: ApiError | None = None
        self._places = engine.slots + waiting
        self._tickets: set[Ticket] = set()
        self._wake, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="river engine", daemon=True)

    # --- the event loop's side

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        self._thread.join(JOIN_SECONDS)

    @property
    def taken(self) -> int:
        """Places that requests have, in slots or waiting."""
        return len(self._tickets)

    @contextmanager
    def ticket(self) -> Iterator[Ticket]:
        """A place for a request, which is cancelled if it goes on at the end."""
        self._check()
        if self.taken >= self._places:
            raise ApiError(
                429,
                f"{self.taken} requests are running or waiting; accepted: {self._places}, try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        ticket = Ticket(self)
        self._tickets.add(ticket)
        try:
            yield ticket
        finally:
            self._tickets.remove(ticket)
            with suppress(RiverError):  # it has ended
                self.engine.cancel(ticket)

    def submit(self, ticket: Ticket) -> None:
        self._check()
        self.engine.add(ticket.sequence, ticket)
        self._wake.set()

    def _check(self) -> None:
        if self.failure:
            raise self.failure

    def _deliver(self, news: dict[Ticket, News]) -> None:
        for ticket, one in news.items():
            self.metrics.count(ticket, one)
            ticket.tell(one)

    def _fail(self, failure: ApiError) -> None:
        self.failure = failure
        for ticket in self._tickets:
            ticket.tell(failure)

    # --- the thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                if not self.engine.busy and not self._stopping:
                    self._wake.wait()
                if events := self.engine.step():
                    self._loop.call_soon_threadsafe(self._deliver, news_of(events))
        except BaseException as error:
            traceback.print_exc(file=sys.stderr)
            failure = engine_failed(f"{type(error).__name__}: {error}"[:300])
            self._loop.call_soon_threadsafe(self._fail, failure)


def news_of(events: list[Event]) -> dict[Ticket, News]:
    """Of one step, by ticket."""
    news = {}
    for id, piece, output in events:
        tokens = news[id].tokens if id in news else []
        if piece:
            tokens.append(_token(id, piece.text))
        news[id] = News(tokens, output)
    return news


def _token(ticket: Ticket, text: str) -> Token:
    """The next one that has not been told of."""
    sequence, place = ticket.sequence, ticket.told
    ticket.told += 1
    has_logprobs = sequence.request.logprobs is not None
    return Token(
        id=sequence.tokens[place],
        text=text,
        exit_depth=sequence.exit_depths[place],
        drafted=sequence.drafted[place],
        logprob=sequence.logprobs[place] if has_logprobs else None,
        likeliest=sequence.top_logprobs[place] if has_logprobs else [],
    )
