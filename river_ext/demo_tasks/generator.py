"""Text for the bundled demo model: arithmetic word problems and short Python functions.

Both kinds come from templates filled by a `random.Random`. A stable hash of the template and its numbers, not
of the names and things around them, puts an item into the train or the held-out part, so that the parts are
disjoint in what has to be computed. A prompt ends at ``Answer:`` or at the closing quotes of the docstring;
its completion is followed by ``<s>`` (id 0), which also separates documents.
"""

import hashlib
import random

from .functions import Function, function, score_function
from .word_problems import Problem, problem, score_problem

__all__ = [
    "Function",
    "Problem",
    "function",
    "held_out_functions",
    "held_out_problems",
    "is_held_out",
    "problem",
    "score_function",
    "score_problem",
    "train_item",
]

HELD_OUT_SHARE = 10  # one key in ten is held out


def is_held_out(key: str) -> bool:
    """True if the problem with this key belongs to the held-out part (the same on every machine and run)."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % HELD_OUT_SHARE == 0


def _draw(make, rng, held_out):
    """One item of the wanted part."""
    while True:
        item = make(rng)
        if is_held_out(item.key) == held_out:
            return item


def train_item(rng: random.Random, functions: float = 0.2) -> Problem | Function:
    """One item of the train part; a share `functions` of them are functions."""
    return _draw(function if rng.random() < functions else problem, rng, held_out=False)


def _held_out(make, n, seed):
    rng, items, seen = random.Random(seed), [], set()
    while len(items) < n:
        item = _draw(make, rng, held_out=True)
        if item.prompt not in seen:
            seen.add(item.prompt)
            items.append(item)
    return items


def held_out_problems(n: int, seed: int = 0) -> list[Problem]:
    """The first `n` distinct held-out word problems of a seed."""
    return _held_out(problem, n, seed)


def held_out_functions(n: int, seed: int = 0) -> list[Function]:
    """The first `n` distinct held-out functions of a seed."""
    return _held_out(function, n, seed)
