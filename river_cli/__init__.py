"""The command `river`. Results go to standard output, progress and notes to standard error.

Exit code 0 is success; 2 bad input, or a machine that cannot do it, with one line `river: error: ...`; 1 a
reader that has gone, such as `head`; 130 an interrupt. With --json standard output holds one JSON document
and nothing else; `chat` writes one for each turn, in a line of its own.

This package is not a part of river_ext because importing river_ext imports torch, which takes seconds:
arguments and prompts are read, and refused, before that. Only the modules that run a command (generate, chat,
serve, info, convert, evaluate, calibrate) and shared, which they share, import it.
"""

import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType

from .arguments import parse
from .errors import UsageError
from .threads import hint, set_count, set_waiting


def program() -> None:
    """What the installed script calls: `main` in a process of its own."""
    signal.signal(signal.SIGINT, _leave_at_once)
    try:
        _prepare_streams()
        code = main()
    except UsageError as error:
        code = _fail(str(error))
    except KeyboardInterrupt:  # a second one, while main was at the first
        code = 130
    try:
        sys.stdout.flush()
    except (OSError, AttributeError):  # said already; the interpreter's end would fail on it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done but the interpreter's own end
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command: its exit code."""
    try:
        with suppress(SystemExit):  # argparse has printed a help
            _run(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        return 1
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        return _fail(message)
    return 0


def _run(argv: Sequence[str] | None) -> None:
    arguments = parse(argv)
    set_waiting()
    module = _imported(arguments.module)
    if signal.getsignal(signal.SIGINT) is _leave_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    set_count(arguments.threads)
    module.run(arguments)
    if arguments.module != "info":
        hint()


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(f".{name}", __name__)
    except Exception as error:  # without memory, the import of torch fails in all possible ways
        raise UsageError(f"river_ext cannot be loaded: {type(error).__name__}: {error}") from error


def _message(error: Exception) -> str | None:
    """The one line for an error that is nobody's bug, else None."""
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    errors = sys.modules.get("river_ext.errors")
    if errors and isinstance(error, errors.RiverError):
        return str(error)
    if errors and errors.is_out_of_memory(error):
        return f"not enough memory ({error})" if str(error) else "not enough memory"
    return None


def _fail(message: str) -> int:
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    line = line if len(line) <= 600 else line[:597] + "..."
    with suppress(OSError):  # standard error may be as broken as what this is about
        print(f"river: error: {line}", file=sys.stderr, flush=True)
    return 2


# --- the process ----------------------------------------------------------------------------------------


def _interrupted() -> int:
    with suppress(OSError):
        print("\nriver: interrupted", file=sys.stderr, flush=True)
    return 130


def _leave_at_once(number, frame) -> None:
    """For an interrupt before a command runs. There is nothing to undo yet, and imports survive no exception:
    a part of them swallows it or makes another error of it."""
    os._exit(_interrupted())


def _prepare_streams() -> None:
    """Descriptors that the caller has closed are filled, or the next files would be taken for streams."""
    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)
    if sys.stdout is None:
        os.open(os.devnull, os.O_WRONLY)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it stays open)
    if sys.stdout is None:
        raise UsageError("standard output is closed")
    sys.stderr.reconfigure(errors="replace")  # a character that the encoding lacks becomes a question mark
    raw, encoding = io.BufferedWriter(_Output(1, "w", closefd=False)), sys.stdout.encoding
    sys.stdout = io.TextIOWrapper(raw, encoding, "replace", line_buffering=sys.stdout.isatty())


class _Output(io.FileIO):
    """Standard output, with its name in its errors."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = "standard output"
            raise
