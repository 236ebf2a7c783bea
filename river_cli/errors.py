"""The error of a command that was called in a wrong way, found before river_ext is loaded."""

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(Exception):
    """The message is one line that names the value and what is accepted, as that of a RiverError."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about a name that is none of these: the closest one, if any is close."""
    close = get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""
