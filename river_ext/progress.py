"""Progress of what takes long: a bar on a terminal, elsewhere a plain line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

BAR_AFTER, LINE_EVERY = 1.0, 15.0  # seconds; what is over before that shows nothing


@contextmanager
def progress_bar(label: str, total: int, wanted: bool = True) -> Iterator[Callable[[], None]]:
    """Yields what to call after each of `total` steps."""
    if not wanted or sys.stderr is None:
        yield lambda: None
        return
    with ExitStack() as stack:
        terminal = sys.stderr.isatty()
        start = last = time.monotonic()
        done, update = 0, None

        def advance() -> None:
            nonlocal done, last, update
            done += 1
            now = time.monotonic()
            if terminal:
                if update is None and now - start > BAR_AFTER:
                    update = stack.enter_context(_bar(label, total))
                if update is not None:
                    update(done)
            elif now - last > LINE_EVERY:
                last = now
                with suppress(OSError):
                    print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)

        yield advance


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, completed=done)
