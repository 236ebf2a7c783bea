"""Designs that are compared in one run: switches of the extension, `name=value`, "" for how it is by itself.

A captured graph keeps the design that it was captured with, so each gets graphs, and a runner, of its own;
their replays take turns, so that a slow moment of the machine hits all alike.
"""

import argparse
import contextlib
from collections.abc import Callable

from bench.lib import gpu
from river_ext import ops

DEFAULT = ""
OF_STEPS = ("paired_steps",)  # they show in whole steps alone


def switch(text: str) -> tuple[str, list[int]]:
    """NAME=VALUE[,VALUE...] of a command line."""
    name, _, values = text.partition("=")
    if name not in gpu.variants():
        raise argparse.ArgumentTypeError(f"no variant {name!r}; accepted: {', '.join(gpu.variants())}")
    try:
        return name, [int(value) for value in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=0,1") from None


def add_argument(p: argparse.ArgumentParser, whole_steps: bool = False) -> None:
    p.add_argument(
        "--variants", nargs="*", type=switch, metavar="NAME=0,1",
        default=[(name, [0, 1]) for name in gpu.variants() if whole_steps or name not in OF_STEPS],
        help="what to compare (default: 0 and 1 of every variant that can show here; no NAME: nothing)",
    )  # fmt: skip


def designs(args: argparse.Namespace) -> list[str]:
    """The default first, then what differs from it in one switch."""
    others = [
        f"{name}={value}"
        for name, values in args.variants
        for value in values
        if value != gpu.variants()[name]
    ]
    return [DEFAULT, *others]


@contextlib.contextmanager
def using(design: str):
    if not design:
        yield
        return
    name, _, value = design.partition("=")
    before = ops._C.set_variant(name, int(value))
    try:
        yield
    finally:
        ops._C.set_variant(name, before)


def time_rotated(
    designs: list[str], call: Callable, items: list, size: float, repeats: int
) -> dict[str, gpu.Time]:
    """gpu.time_rotated of every design."""
    graphs = {}
    for design in designs:
        with using(design):
            graphs[design] = (*gpu.capture_rotated(call, items, size), gpu.nothing)
    return gpu.time_together(graphs, repeats)
