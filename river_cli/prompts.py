"""Prompts of arguments, files and standard input, as texts."""

import os
import stat
import sys

from .errors import UsageError

MAX_BYTES = 16 << 20  # far more than the positions of any model hold


def read_prompts(prompts: list[str], files: list[str]) -> list[str]:
    """The texts of arguments, where - is standard input, then those of files."""
    texts = [_text("standard input", _read_input()) if prompt == "-" else prompt for prompt in prompts]
    texts += [_text(name, _read_file(name)) for name in files]
    for text in texts:
        if not text:
            raise UsageError("the prompt is empty; accepted: at least one token")
        refuse_surrogates("prompt", text)
    return texts


def refuse_surrogates(name: str, text: str) -> None:
    """They are what Python makes of an argument's bytes that are no UTF-8."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UsageError(f"{name} {text[:40]!r} is no UTF-8; accepted: UTF-8 text")


def _read_input() -> bytes:
    if sys.stdin is None:
        raise UsageError("standard input is closed; accepted: an open one for the prompt -")
    try:
        return _limited("standard input", sys.stdin.buffer.read(MAX_BYTES + 1) or b"")
    except OSError as error:
        raise UsageError(f"standard input: {error.strerror}") from None


def _read_file(name: str) -> bytes:
    """Of regular files alone: a pipe may never say anything, and a device never stop."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UsageError(f"{name}: no regular file; accepted: a file, or the prompt - for standard input")
        with open(descriptor, "rb", closefd=False) as file:
            return _limited(name, file.read(MAX_BYTES + 1))
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _limited(name: str, data: bytes) -> bytes:
    if len(data) > MAX_BYTES:
        raise UsageError(f"{name}: more than {MAX_BYTES >> 20} MiB; accepted: prompts of up to that")
    return data


def _text(name: str, data: bytes) -> str:
    """Without what an editor adds: a byte order mark, "\\r" before "\\n", the newline at the end."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: byte {error.start} is no UTF-8; accepted: UTF-8 text") from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n")
