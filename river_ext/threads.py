"""Parallel work that leaves no threads behind, so that the process may be forked afterwards."""

import ctypes
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import wraps
from threading import Thread


def in_own_thread(function: Callable) -> Callable:
    """The function, run by a thread that ends with it.

    OpenMP keeps a pool of threads for every thread that has asked for parallel work, until that thread ends.
    A forked process has a copy of the pool of the thread that forked, but none of the pool's threads: the
    first parallel work there would wait for them for ever.
    """

    @wraps(function)
    def run(*args, **kwargs):
        result = Future()

        def work() -> None:
            try:
                result.set_result(function(*args, **kwargs))
            except BaseException as error:
                result.set_exception(error)

        thread = Thread(target=work, name=f"river_ext {function.__name__}")
        thread.start()
        try:
            wait([result])  # not thread.join(), which after a Ctrl-C takes the thread for ended
        except BaseException:  # it reaches the main thread alone, and the work may take minutes
            identity = ctypes.c_ulong(thread.ident)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, ctypes.py_object(KeyboardInterrupt))
            wait([result])
            raise
        thread.join()
        return result.result()

    return run
