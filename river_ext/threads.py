"""Parallel work that leaves no threads behind, so that the process may be forked afterwards."""

import ctypes
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import wraps
from threading import Event, Lock, Thread

# Held while threads start: until one runs, Python takes it for the one that starts it, and would interrupt
# it in the other's place. It would end at once, and the other wait for it for ever.
_starting = Lock()


def in_own_thread(function: Callable) -> Callable:
    """The function, run by a thread that ends with it.

    OpenMP keeps a pool of threads for every thread that has asked for parallel work, until that thread ends.
    A forked process has a copy of the pool of the thread that forked, but none of the pool's threads: the
    first parallel work there would wait for them for ever.
    """

    @wraps(function)
    def run(*args, **kwargs):
        result, interrupted = Future(), Event()

        def work() -> None:
            try:
                if interrupted.is_set():  # before this thread had begun
                    raise KeyboardInterrupt
                result.set_result(function(*args, **kwargs))
            except BaseException as error:
                result.set_exception(error)

        thread = Thread(target=work, name=f"river_ext {function.__name__}")
        try:
            thread.start()
            wait([result])  # not thread.join(), which after a Ctrl-C takes the thread for ended
        except BaseException:  # it reaches the main thread alone, and the work may take minutes
            interrupted.set()
            while thread.ident is not None and not result.done():
                _interrupt(thread)
                wait([result], timeout=5)  # or again: it is lost in a callback, whose errors Python ignores
            raise
        thread.join()
        return result.result()

    return run


def _interrupt(thread: Thread) -> None:
    identity, error = ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt)
    with _starting:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, error)


def by_threads(function: Callable, items: Iterable, threads: int, **options) -> list:
    """function(item) for each item, by so many threads, which `ThreadPoolExecutor` makes with the options."""
    with ThreadPoolExecutor(threads, **options) as pool:
        with _starting:
            results = pool.map(function, items)
        return list(results)
