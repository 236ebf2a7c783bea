"""Captured steps on a CPU: what calls of ops cost beside their work is paid once, not in every step."""

import threading
from collections.abc import Callable
from typing import TypeVar

from .. import ops

Outputs = TypeVar("Outputs")


class _Capture(threading.local):
    graph: "CpuGraph | None" = None  # of this thread


_capture = _Capture()


class CpuGraph:
    """On a CPU what a `torch.cuda.CUDAGraph` is on a GPU."""

    def __init__(self) -> None:
        self._ops = ops._C.Graph()
        self._calls: list[tuple[int, Callable[[], object]]] = []  # each with the number of ops before it

    def capture(self, run: Callable[[], Outputs]) -> Outputs:
        """Calls `run`, whose ops do not run: they are added to the graph, with their tensors."""
        before, _capture.graph = _capture.graph, self
        try:
            return self._ops.capture(run)
        finally:
            _capture.graph = before

    @property
    def is_capturing(self) -> bool:
        return self._ops.is_capturing

    def add(self, function: Callable[[], object]) -> None:
        self._calls.append((len(self._ops), function))

    def replay(self) -> None:
        """Ops that no call stands between run by threads that stay together."""
        done = 0
        for before, function in self._calls:
            self._ops.replay(done, before)
            function()
            done = before
        self._ops.replay(done, len(self._ops))


def call(function: Callable[[], object]) -> None:
    """What a step does beside ops of this package: now, or in each replay of the graph being captured.

    On a GPU torch captures by itself what is launched here.
    """
    graph = _capture.graph
    if graph is not None and graph.is_capturing:  # an interrupt may have left one behind
        graph.add(function)
    else:
        function()
