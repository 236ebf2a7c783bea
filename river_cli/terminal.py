"""What commands print with: JSON, tables, sizes, and text that a terminal can take."""

import json
import math
import sys
from contextlib import suppress
from unicodedata import category


def size_text(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def print_json(document: dict) -> None:
    print(json.dumps(_finite(document), allow_nan=False))


def _finite(value):
    """JSON has no infinities: they become text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def printable(text: str) -> str:
    """Text of a model or a file, on a terminal without the control characters that would steer it."""
    if not sys.stdout.isatty():
        return text
    return "".join("\ufffd" if category(c) == "Cc" and c not in "\n\t" else c for c in text)


def note(text: str) -> None:
    """For the reader; that there is none, or no room, is no error.

    What was printed before goes out first: both streams may end in one file, in the order of writing.
    """
    sys.stdout.flush()
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def new_console():
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def print_table(table) -> None:
    console = new_console()
    if not console.is_terminal:
        console.width = 200  # a file has no edge to wrap at
    console.print(table)
