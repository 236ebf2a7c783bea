"""The one exception that a user's input can cause, or a machine too small for it."""

from collections.abc import Iterator
from contextlib import contextmanager

# parts of what torch and Python say in a RuntimeError; MemoryError needs no words
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "can't start new thread")


class RiverError(ValueError):
    """Bad input. The message is one line that names the offending file or value and what is accepted.

    Names from files end up in messages, so anything unprintable in them is replaced.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else "?" for c in " ".join(message.split())))


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(part in text for part in OUT_OF_MEMORY)
    )


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Also a decorator. An allocation that fails becomes a RiverError that says what it was for."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RiverError(f"not enough memory for {what} ({str(error)[:200] or 'MemoryError'})") from None
