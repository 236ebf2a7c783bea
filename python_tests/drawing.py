"""Arguments of ops.sample for tests: rows with options of their own, and logits of many kinds."""

import torch

TINY, HUGE = 1e-42, 3e38


def drawing(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=1, positions=7):
    """The arguments of ops.sample; an option is one number, or a list with one for each row."""

    def per_row(value, dtype):
        values = value if isinstance(value, (list, range)) else [value] * len(logits)
        return torch.tensor(list(values), dtype=dtype)

    return {
        "logits": logits,
        "temperature": per_row(temperature, torch.float32),
        "top_k": per_row(top_k, torch.int32),
        "top_p": per_row(top_p, torch.float32),
        "min_p": per_row(min_p, torch.float32),
        "seeds": per_row(seeds, torch.int64),
        "positions": per_row(positions, torch.int32),
    }


MIXED = {  # eight rows, no two alike
    "temperature": [0.0, 1.0, 0.8, 1.3, 1.0, 0.5, 1e-38, 1e30],
    "top_k": [3, 0, 50, 2**31 - 1, 0, 300, 7, 5],
    "top_p": [0.5, 1.0, 0.9, 0.999999, 0.3, 1e-12, 0.7, 0.9],
    "min_p": [0.0, 0.0, 0.1, 0.0, 1e-40, 0.01, 1.0, 0.5],
    "seeds": [0, 1, -1, 2**62 + 12345, -(2**63), 5, 6, 7],
    "positions": [0, 1, 2, 3, 2**31 - 1, -5, 6, 7],
}


def make_logits(kind, vocab, rows=8, seed=0):
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    return {
        "random": lambda: 3 * x,
        "peaked": lambda: 30 * x,
        "flat": lambda: 1e-3 * x,
        "tied": lambda: (2 * x).round(),
        "equal": lambda: torch.full_like(x, -7.25),
        "both zeros": lambda: torch.where(x > 0, 0.0, -0.0),
        "tiny": lambda: TINY * x,
        "huge": lambda: (1e38 * x).clamp(-HUGE, HUGE),
        "rising": lambda: x.sort().values,
    }[kind]()


KINDS = ("random", "peaked", "flat", "tied", "equal", "both zeros", "tiny", "huge", "rising")


def assert_same(got, expected):
    """The same tokens, and the same bits of log-probabilities."""
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1].view(torch.int32), expected[1].view(torch.int32))


def rows_of(arguments, rows):
    return {name: value[rows].contiguous() for name, value in arguments.items()}
