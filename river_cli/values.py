"""The values of options, as argparse reads them: each function is the `type` of some."""

import argparse
import os


def given(text: str) -> str:
    """A shell's unset variable is no name of a file."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; accepted: a value, or to leave the option out")
    return text


def count_or_auto(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 6 else text


def count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 8 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}; accepted: a number from 1 to 9999999")
    return int(text)


def threshold(text: str) -> float | str:
    if text == "calibrated":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"invalid float value: {text!r}; accepted: one, or calibrated"
        ) from None


def share(text: str) -> float:
    """A share in percent, 5%, or as a number, 0.05."""
    number, percent = text.removesuffix("%"), text.endswith("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}; accepted: above 0 and below 1, such as 5% or 0.05")
    return value


def threads(text: str) -> int:
    cores = len(os.sched_getaffinity(0))
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= cores):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}; accepted: 1 to {cores}, the cores here")
    return int(text)
