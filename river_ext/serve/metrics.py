"""What Prometheus reads at /metrics."""

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

if TYPE_CHECKING:
    from .worker import News, Ticket, Worker

FIRST_TOKEN = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)  # bounds, in seconds
PER_TOKEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
# how requests end: `refused` is a body or a key that is not accepted, `full` a queue that has no place
OUTCOMES = ("stop", "length", "disconnected", "timeout", "refused", "full", "error")


class Metrics:
    """Of one server, in a registry of their own."""

    def __init__(self, layers: int, slots: int, replica: str | None = None):
        """replica: its name becomes a label of all, where several servers answer at one address."""
        self._labels = {} if replica is None else {"replica": replica}
        registry = {"registry": CollectorRegistry()}
        self._registry = registry["registry"]
        self._requests = Counter("river_requests", "Requests by how they ended", ["outcome"], **registry)
        for outcome in OUTCOMES:
            self._requests.labels(outcome)
        self._slots = Gauge("river_slots", "Requests that can run at once", **registry)
        self._slots.set(slots)
        self._running = Gauge("river_requests_running", "Requests that have a slot", **registry)
        self._waiting = Gauge("river_requests_waiting", "Requests that wait for a slot", **registry)
        self._failed = Gauge("river_engine_failed", "1 when the engine has failed", **registry)
        self._prompt_tokens = Counter("river_prompt_tokens", "Tokens of prompts", **registry)
        self._tokens = Counter("river_new_tokens", "Generated tokens", **registry)
        self._drafts = Counter("river_drafts", "Tokens that were proposed", **registry)
        self._quotes = Counter("river_quotes", "Proposed tokens that the text had said before", **registry)
        self._accepted = Counter("river_accepted_drafts", "Proposed tokens that were right", **registry)
        self._first = Histogram(
            "river_time_to_first_token_seconds", "From a request's arrival", buckets=FIRST_TOKEN, **registry
        )
        self._each = Histogram(
            "river_time_per_token_seconds",
            "Between the tokens of a request, the mean of each",
            buckets=PER_TOKEN,
            **registry,
        )
        self._depth = Histogram(
            "river_exit_depth", "Backbone layers that a token ran", buckets=range(layers + 1), **registry
        )

    def ended(self, outcome: str) -> None:
        """One of OUTCOMES."""
        self._requests.labels(outcome).inc()

    def count(self, ticket: "Ticket", news: "News") -> None:
        now = time.perf_counter()
        if news.tokens and math.isnan(ticket.first_token):
            ticket.first_token = now
            self._first.observe(now - ticket.arrived)
            self._prompt_tokens.inc(len(ticket.sequence.request.prompt))
        self._tokens.inc(len(news.tokens))
        for token in news.tokens:
            self._depth.observe(token.exit_depth)
        if news.output:
            stats = news.output.stats
            self._drafts.inc(stats.drafts)
            self._quotes.inc(stats.quotes)
            self._accepted.inc(stats.accepted_drafts)
            if stats.new_tokens > 1:
                self._each.observe((now - ticket.first_token) / (stats.new_tokens - 1))

    def text(self, worker: "Worker") -> bytes:
        """In Prometheus's format."""
        running = min(worker.taken, worker.engine.slots)
        self._running.set(running)
        self._waiting.set(worker.taken - running)
        self._failed.set(worker.failure is not None)
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """What is to be written, as the registry has it, with the labels of all."""
        for metric in self._registry.collect():
            metric.samples = [s._replace(labels=s.labels | self._labels) for s in metric.samples]
            yield metric
