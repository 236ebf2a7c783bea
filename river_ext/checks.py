"""Values that a user gives: checked, and in the form that the engine wants."""

import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from numbers import Integral, Real
from typing import ParamSpec, TypeVar

import torch

from .errors import RiverError

MAX_CHARACTERS = 1 << 16  # of all strings of an option together
FP32_MAX, FP32_TINY = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny

P = ParamSpec("P")
Result = TypeVar("Result")


def names_keywords(function: Callable[P, Result]) -> Callable[P, Result]:
    """A decorator: the TypeError about an unknown keyword names the closest known one, and all of them."""
    known = [name for name in signature(function).parameters if name != "self"]

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Result:
        for name in kwargs:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise TypeError(f"no argument {name!r}; accepted: {', '.join(known)}{hint}")
        return function(*args, **kwargs)

    return checked


def one_each(name: str, value, prompts: int) -> list:
    """One value for each prompt, from one for all or a list."""
    value = listed(name, value)
    if isinstance(value, (list, tuple, range)):
        values = list(value)
    elif isinstance(value, Iterable) and not isinstance(value, str):
        raise RiverError(
            f"{name} is a {type(value).__name__}; accepted: one value, or a list of one per prompt"
        )
    else:
        values = [value] * prompts
    if len(values) != prompts:
        raise RiverError(
            f"{name} has {len(values)} values for {prompts} prompts; accepted: one, or one per prompt"
        )
    return values


def listed(name: str, value):
    """A tensor's or an array's values as lists or as a number; anything else as it is."""
    if not hasattr(value, "tolist") or isinstance(value, type):
        return value
    try:
        return value.tolist()
    except Exception as error:  # a tensor without data, say
        why = str(error).partition("\n")[0][:100]
        raise RiverError(f"{name} is a {type(value).__name__} that cannot be read ({why})") from None


def number(name: str, value) -> float:
    value = listed(name, value)
    try:
        result = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        result = math.nan
    if math.isnan(result):
        raise RiverError(f"{name}={short(value)}; accepted: a number, not NaN")
    return result


def flag(name: str, value) -> bool:
    value = listed(name, value)
    if not isinstance(value, bool):
        raise RiverError(f"{name}={short(value)}; accepted: True or False")
    return value


def integer(name: str, value, low: int, high: int | None = None) -> int:
    value = listed(name, value)
    fits = isinstance(value, Integral) and not isinstance(value, bool)
    if not fits or value < low or (high is not None and value > high):
        raise RiverError(
            f"{name}={short(value)}; accepted: an integer from {low}"
            + (f" to {high}" if high is not None else "")
        )
    return int(value)


def strings(name: str, value) -> tuple[str, ...]:
    value = listed(name, value)
    values = (value,) if isinstance(value, str) else value
    many = isinstance(values, (list, tuple, set, frozenset))
    if not many or not all(isinstance(v, str) and v for v in values):
        raise RiverError(f"{name}={short(value)}; accepted: a string that is not empty, or a list of them")
    if (size := sum(map(len, values))) > MAX_CHARACTERS:
        raise RiverError(f"{name} has {size} characters; accepted: {MAX_CHARACTERS} in all strings")
    return tuple(values)


def token_ids(name: str, value, vocab_size: int) -> list[int]:
    if not isinstance(value, (list, tuple, range)):
        text = "text or " if name == "prompt" else ""
        raise RiverError(f"{name} is a {type(value).__name__}; accepted: {text}a list of token ids")
    for token in value:
        if not isinstance(token, Integral) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise RiverError(f"{name} holds {short(token)}; accepted: token ids from 0 to {vocab_size - 1}")
    return [int(token) for token in value]


def choice(name: str, value, accepted: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in accepted:
        raise RiverError(f"{name}={short(value)}; accepted: {', '.join(map(repr, accepted))}")


def short(value) -> str:
    """repr, cut to what fits a one-line message."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits, an object that is not finished
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 60 else text[:57] + "..."


def one_row(name: str, value):
    """An array as a list; one of shape [1, n], as models take it, as a list of n."""
    values = listed(name, value)
    if values is not value and isinstance(values, list) and values and isinstance(values[0], list):
        if len(values) > 1 or any(isinstance(item, list) for item in values[0]):
            shape = list(getattr(value, "shape", [len(values)]))
            raise RiverError(f"{name} is an array {shape}; accepted: [n] or [1, n], and lists of these")
        values = values[0]
    return values


def fp32(value: float) -> float:
    """The nearest number that fp32 has."""
    return torch.tensor(value, dtype=torch.float64).float().item()
