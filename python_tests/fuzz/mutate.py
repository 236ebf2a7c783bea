"""Changes to bytes and to JSON documents that are hard on whoever reads them."""

import json
from random import Random
from typing import Any

HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 63, 64, 65, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64,
    -(2**63), 0.0, -0.0, 0.5, 1.0, 64.0, 1e-45, 1e-300, 1e38, 1e39, 1e300, -1e300, float("inf"),
    float("-inf"), float("nan"), "", " ", "0", "64", "x", "a" * 5000, "\x00", "\ud800", "../../etc/passwd",
    "/dev/zero", "line\nbreak", "é€😀\ufeff", [], [0], [[]], [None], [1, 2, 3], ["x"], {}, {"": 0}, {"x":
    {}},

]  # fmt: skip


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """One to three edits: flipped bits, pieces cut, doubled, zeroed, or strange bytes put in."""
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        at, length = random.randrange(len(data) + 1), random.choice((1, 2, 8, 100))
        edit = random.randrange(6)
        if edit == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif edit == 1:
            del data[at : at + length]
        elif edit == 2:
            data[at:at] = data[at : at + length]
        elif edit == 3:
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif edit == 4:
            data[at:at] = random.choice(
                (b"\x00", b"\xff", b"\xef\xbb\xbf", b"[", b"{", b'"', b"\\u0000", b"1e999")
            )
        else:
            del data[at:]
    return bytes(data)


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON document."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    found = []
    for key, value in items:
        found.append((document, key))
        if isinstance(value, (dict, list)):
            found += places(value)
    return found


def mutate_json(random: Random, document: Any) -> Any:
    """One or two values replaced, dropped, wrapped, or put elsewhere, in a copy."""
    document = json.loads(json.dumps(document))
    for _ in range(random.choice((1, 1, 2))):
        found = places(document)
        if not found:
            return random.choice(HOSTILE)
        container, key = random.choice(found)
        edit = random.randrange(8)
        if edit == 0:
            del container[key]
        elif edit == 1:
            other, from_key = random.choice(found)
            container[key] = json.loads(json.dumps(other[from_key]))
        elif edit == 2:
            container[key] = random.choice(([container[key]], {"x": container[key]}))
        elif edit == 3 and isinstance(container[key], (int, float)):
            value = container[key]
            container[key] = random.choice(
                (float(value), str(value), value + 1, -value, value * 2, value / 2, bool(value))
            )
        elif edit == 4 and isinstance(container, dict):
            container[random.choice((key.upper(), key + "_", "", "x" * 300))] = random.choice(HOSTILE)
        elif edit == 5 and isinstance(container[key], str):
            container[key] = random.choice(
                (container[key] * 2, container[key][1:], container[key].upper(), container[key] + "\x00")
            )
        else:
            container[key] = random.choice(HOSTILE)
    return document


def dump_json(random: Random, document: Any) -> bytes:
    """As text: plain, or with what JSON parsers treat differently."""
    text = json.dumps(document)
    style = random.randrange(12)
    if style == 0:
        text = "\ufeff" + text
    elif style == 1:
        text = text.replace("{", "{" + '"x": ' + "[" * 3000 + "]" * 3000 + ", ", 1).replace(", }", "}")
    elif style == 2 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]  # every key twice
    return text.encode("utf-8", "surrogatepass")
