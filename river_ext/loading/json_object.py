"""JSON files that hold one object, and its keys, checked as they are read."""

import json
from collections.abc import Iterable
from pathlib import Path

from ..errors import RiverError
from .files import read_bytes

MAX_JSON_BYTES = 64 << 20


def read_json_object(path: Path) -> dict:
    """The JSON object in a file; anything else is refused."""
    data = read_bytes(path, MAX_JSON_BYTES)
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RiverError(f"{path}: not valid JSON ({str(error)[:160]})") from None
    if not isinstance(value, dict):
        raise RiverError(f"{path}: a JSON object is needed, found {_type_name(value)}")
    return value


def same(one, other) -> bool:
    """Equal as JSON: true is not 1, and 64.0 is not 64."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class Reader:
    """One JSON object whose keys are checked as they are read. `values` is the object."""

    def __init__(self, path: Path, values: dict, prefix: str = ""):
        self.path, self.values, self.prefix = path, values, prefix

    def fail(self, key: str, accepted: str):
        found = json.dumps(self.values[key]) if key in self.values else "missing"
        found = found if len(found) <= 60 else found[:57] + "..."
        raise RiverError(f"{self.path}: {self.prefix}{str(key)[:80]} is {found}; accepted: {accepted}")

    def owner(self, key: str, other: "Reader") -> "Reader":
        """This object if it holds the key, else the other one."""
        return self if self.values.get(key) is not None else other

    def exactly(self, key: str, value, accepted: str | None = None) -> None:
        if key not in self.values or not same(self.values[key], value):
            self.fail(key, accepted or json.dumps(value))

    def choice(self, key: str, accepted: Iterable[str], default: str | None = None) -> str:
        value = default if self.values.get(key) is None else self.values[key]
        if not isinstance(value, str) or value not in accepted:
            self.fail(key, ", ".join(accepted))
        return value

    def strings(self, key: str) -> list[str]:
        value = self.values[key]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(key, "an array of strings")
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.fail(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A number; low and high are normal in fp32, where it is used, so that it is in range there too."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:  # NaN fails both comparisons
            self.fail(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def numbers(self, key: str, count: int, low: float, high: float) -> tuple[float, ...]:
        values = self.values.get(key)
        if not isinstance(values, list) or len(values) != count:
            self.fail(key, f"an array of {count} numbers")
        each = Reader(self.path, dict(enumerate(values)), f"{self.prefix}{key}.")
        return tuple(each.number(index, low, high) for index in range(count))

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, "true or false")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        # ids past the vocabulary exist in public configs (-1 too, for "none"); such an id is never generated
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            self.fail(key, "a token id, a list of token ids or null")
        return tuple(dict.fromkeys(i for i in ids if 0 <= i < vocab_size))


def _type_name(value) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
