"""What the other areas look for, in turn: the runner's own tests know what it must report."""

import os
import time
from pathlib import Path
from random import Random

from . import ACCEPTED, REFUSED, expect, expect_one_line

INPUTS = (
    "refused",
    "finding",
    "accepted",
    "an error",
    "an abort",
    "no end",
    "two lines",
    "an exit",
    "accepted",
)


def prepare(folder: Path) -> list[str]:
    return list(INPUTS)


def attempt(state: list[str], random: Random) -> str:
    what = state[number_of(random)]
    if what == "finding":
        expect(False, "found it")
    elif what == "an error":
        raise ValueError("of a kind that\nnobody caught")
    elif what == "an abort":
        os.abort()
    elif what == "no end":
        time.sleep(1000)
    elif what == "two lines":
        expect_one_line(ValueError("two\nlines"))
    elif what == "an exit":
        raise SystemExit(0)
    return REFUSED if what == "refused" else ACCEPTED


def number_of(random: Random) -> int:
    """Of the input that this is."""
    states = [Random(f"planted/0/{number}").getstate() for number in range(len(INPUTS))]
    return states.index(random.getstate())
