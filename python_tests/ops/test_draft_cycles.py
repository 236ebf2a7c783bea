"""Cycles of drafts and verifications give the tokens that one-at-a-time decoding gives, whatever is drafted.

The models are functions of a request's text and of the position of a draw, and the embedding of a token is
its number: only the two ops, and what they write, are at stake.
"""

from dataclasses import dataclass
from hashlib import blake2b
from random import Random

import pytest
import torch
from cycles import GRIDS, VOCAB, Requests

from river_ext import ops, reference


@dataclass
class Models:
    """A backbone that sometimes draws no token, and a river that often draws the same token."""

    seed: int
    agreement: float
    failures: float = 0.01

    def backbone(self, text, position):
        failed = self.number("fails", text, position) < self.failures
        return -1 if failed else int(self.number("token", text, position) * VOCAB)

    def river(self, text, position):
        if self.number("agrees", text, position) < self.agreement:
            return self.backbone(text, position)
        return int(self.number("draft", text, position) * (VOCAB + 1)) - 1

    def number(self, *place):
        """From 0 to 1, a hash of its arguments."""
        digest = blake2b(repr((self.seed, *place)).encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") / 2**32


@dataclass
class Job:
    text: list[int]  # the prompt, and then the new tokens
    stop_tokens: list[int]
    limit: int

    def one_at_a_time(self, models):
        text, new = list(self.text), []
        while not new or (new[-1] not in (-1, *self.stop_tokens) and len(new) < self.limit):
            new.append(models.backbone(text, len(text)))
            text.append(new[-1])
        return new


class Decoding(Requests):
    """Jobs that take turns in the rows of R requests, in cycles."""

    def __init__(self, module, models, requests, length, jobs):
        super().__init__(requests, length, stops=2, size=4)
        self.module, self.models, self.queue = module, models, list(enumerate(jobs))
        self.embed_tokens = torch.arange(VOCAB, dtype=torch.float32)[:, None].repeat(1, 4)
        self.slots.fill_(-1)
        self.verify_slots.fill_(-1)
        self.jobs, self.new = [-1] * requests, [[] for _ in jobs]
        self.cache = [{} for _ in range(requests)]  # of slots: {position: (who wrote it, token)}
        self.sure = torch.zeros(requests)
        self.cycles = 0

    def admit(self):
        """Puts jobs into free rows. Row r has slot R - 1 - r."""
        for r in (self.slots < 0).nonzero().flatten().tolist()[: len(self.queue)]:
            self.jobs[r], job = self.queue.pop(0)
            slot, last = self.requests - 1 - r, len(job.text) - 1
            self.cache[slot] = {p: ("backbone", token) for p, token in enumerate(job.text[:-1])}
            self.stop_tokens[r] = torch.tensor(job.stop_tokens)
            self.remaining[r] = job.limit
            self.slots[r] = self.verify_slots[r] = slot
            self.hidden[r] = self.verify_hidden[r] = self.embed_tokens[job.text[-1]]
            places = last + torch.arange(self.length)
            self.verify_positions[r :: self.requests] = places
            self.verify_draw_positions[r :: self.requests] = places + 1
            self.positions[r], self.draw_positions[r] = last, last + 1

    def cycle(self, wanted):
        self.wanted = torch.tensor(wanted, dtype=torch.int32)
        drafts = max(wanted)
        for index in range(drafts):
            tokens = self.draw("river", self.hidden, self.slots, self.positions, self.draw_positions)
            self.margins = self.random(0, 3, self.requests).float()
            self.draft_advance(self.module, tokens, index)
        rows = slice((drafts + 1) * self.requests)
        verified = (self.verify_hidden, self.verify_slots, self.verify_positions, self.verify_draw_positions)
        self.accept(self.module, self.draw("backbone", *(tensor[rows] for tensor in verified)))
        stamp, counts, tokens = self.record(self.cycles)
        self.cycles += 1
        assert stamp == self.cycles
        for job, count, new in zip(self.jobs, counts, tokens, strict=True):
            self.new[job] += [-1 if token == -2 else token for token in new[: max(count, 0)]]

    def draw(self, model, hidden, slots, positions, draw_positions):
        """All rows write the cache before any reads it. The backbone must find nothing there of the river."""
        rows = list(zip(slots.tolist(), positions.tolist(), draw_positions.tolist(), strict=True))
        for (slot, position, _), vector in zip(rows, hidden, strict=True):
            if slot >= 0:
                self.cache[slot][position] = model, int(vector[3])
        tokens = []
        for slot, position, draw_position in rows:
            seen = [self.cache[slot][p] for p in range(position + 1)] if slot >= 0 else []
            assert model == "river" or all(writer == "backbone" for writer, _ in seen)
            tokens.append(getattr(self.models, model)([token for _, token in seen], draw_position))
        return torch.tensor(tokens)

    def run(self, choose_wanted):
        self.admit()
        while (self.slots >= 0).any():
            self.cycle(choose_wanted())
            self.admit()
        return self.new


def some_jobs(random, count):
    return [
        Job(
            [random.randrange(VOCAB) for _ in range(random.randint(1, 5))],
            random.choice([[-1, -1], [3, -1], [5, 8]]),
            random.randint(1, 25),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("agreement", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("requests, length", GRIDS)
def test_cycles_give_what_one_at_a_time_gives(requests, length, agreement, module):
    random = Random(10 * requests + length)
    jobs, models = some_jobs(random, 3 * requests), Models(length, agreement)
    decoding = Decoding(module, models, requests, length, jobs)
    decoding.sure = torch.arange(requests) % 2.0  # some drafts of every second one are not sure
    new = decoding.run(lambda: [random.randrange(length) for _ in range(requests)])
    assert new == [job.one_at_a_time(models) for job in jobs]


def test_the_jobs_end_in_every_way():
    models = Models(0, 0)
    ends = set()
    for job in some_jobs(Random(0), 200):
        new = job.one_at_a_time(models)
        ends.add("none" if new[-1] == -1 else "stop" if new[-1] in job.stop_tokens else "limit")
    assert ends == {"none", "stop", "limit"}


@pytest.mark.parametrize("requests, length", GRIDS)
def test_a_river_that_is_always_right_saves_every_pass_that_it_can(requests, length):
    jobs = [Job([1 + r], [-1, -1], 24) for r in range(requests)]
    decoding = Decoding(ops, Models(1, 1.0, failures=0.0), requests, length, jobs)
    new = decoding.run(lambda: [length - 1] * requests)
    assert [len(tokens) for tokens in new] == [24] * requests
    assert decoding.cycles == -(-24 // length)
