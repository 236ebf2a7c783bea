"""Requests of lossless mode in random states, for the tests of draft_advance and accept."""

import torch
from blocks import int32

VOCAB = 12  # few tokens: they often are a stop token, or the draft
NO_TOKENS = (-1, VOCAB, 2**32 + 5, -(2**63))
GRIDS = [(requests, length) for requests in range(1, 9) for length in range(1, 9) if requests * length <= 8]
DRAFTING = ("drafts", "hidden", "slots", "positions", "draw_positions", "verify_hidden", "verify_slots")
ACCEPTING = (
    *("drafts", "remaining", "hidden", "slots", "positions", "draw_positions", "verify_hidden"),
    *("verify_slots", "verify_positions", "verify_draw_positions", "step", "records"),
)


class Requests:
    """What the two ops read and write, in any state: nothing happens to agree but tokens and drafts."""

    def __init__(self, requests=2, length=4, dtype=torch.float32, seed=0, size=24, stops=3, step=0):
        g = self.generator = torch.Generator().manual_seed(seed)
        rows = requests * length
        self.requests, self.length = requests, length
        self.embed_tokens, self.hidden, self.verify_hidden = (
            torch.randn(n, size, generator=g).to(dtype) for n in (VOCAB, requests, rows)
        )
        self.wanted = self.random(0, length, requests).int()
        self.stop_tokens = self.random(-1, VOCAB, requests, stops)
        self.remaining = self.random(1, length + 2, requests).int()
        self.drafts = self.random(-1, VOCAB, length, requests)
        self.slots = self.some_inactive(9 + torch.randperm(requests, generator=g))
        self.positions = self.random(10, 100, requests).int()
        self.draw_positions = self.random(100, 200, requests).int()
        self.verify_slots = self.some_inactive(20 + torch.randperm(rows, generator=g))
        self.verify_positions = self.random(200, 300, rows).int()
        self.verify_draw_positions = self.random(300, 400, rows).int()
        self.step = int32([step])
        self.records = torch.full((3, 1 + requests + rows), -9, dtype=torch.int32)
        self.margins, self.sure = (self.random(0, 3, requests).float() for _ in range(2))  # often alike

    def random(self, *range_and_size):
        low, high, *size = range_and_size
        return torch.randint(low, high, size, generator=self.generator)

    def some_inactive(self, slots):
        return torch.where(torch.rand(len(slots), generator=self.generator) < 0.8, slots, -1).int()

    def tokens(self, rows):
        """Random ones: some follow a right draft, some are none."""
        tokens = self.random(0, VOCAB, rows)
        right = self.drafts.flatten().roll(-self.requests)[:rows]  # the draft of the row behind
        tokens = torch.where(torch.rand(rows, generator=self.generator) < 0.6, right, tokens)
        none = torch.tensor(NO_TOKENS)[self.random(0, len(NO_TOKENS), rows)]
        return torch.where(torch.rand(rows, generator=self.generator) < 0.1, none, tokens)

    def drafting(self, tokens, index):
        """The arguments of draft_advance, in order."""
        read = {"tokens": tokens, "margins": self.margins, "index": index, "wanted": self.wanted}
        read |= {"sure": self.sure, "embed_tokens": self.embed_tokens}
        return read | {name: getattr(self, name) for name in DRAFTING}

    def accepting(self, tokens):
        """The arguments of accept, in order."""
        drafts, *written = ((name, getattr(self, name)) for name in ACCEPTING)
        read = {"embed_tokens": self.embed_tokens, "stop_tokens": self.stop_tokens}
        return {"tokens": tokens} | dict([drafts]) | read | dict(written)

    def draft_advance(self, module, tokens, index):
        module.draft_advance(*self.drafting(tokens, index).values())
        return self

    def accept(self, module, tokens):
        module.accept(*self.accepting(tokens).values())
        return self

    def record(self, step=0):
        """Stamp, numbers of new tokens, new tokens of each request."""
        stamp, *rest = self.records[step % len(self.records)].tolist()
        counts, tokens = rest[: self.requests], rest[self.requests :]
        return stamp, counts, [tokens[r :: self.requests] for r in range(self.requests)]


def differing(a: Requests, b: Requests) -> list[str]:
    """The names of tensors that are not the same bits."""
    return [
        name
        for name, value in vars(a).items()
        if isinstance(value, torch.Tensor)
        and not torch.equal(value.view(torch.uint8), getattr(b, name).view(torch.uint8))
    ]
