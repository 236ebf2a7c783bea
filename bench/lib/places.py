"""The places in documents that a script fills: they stand between `<!--report:NAME-->` and `<!--end-->`."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from river_ext.errors import RiverError

LIKE_A_MARKER = re.compile(r"<!--\s*(?:report|end)\b.*?(?:-->|$)", re.M | re.I)
BEGIN, END = re.compile(r"<!--report:(\S+)-->"), "<!--end-->"


class Place(NamedTuple):
    name: str
    where: str  # DOCUMENT:LINE of its beginning
    start: int  # what stands there is text[start:stop]
    stop: int


def places(text: str, document: str) -> Iterator[Place]:
    """In their order. RiverError where a marker is missing, doubled or misspelt, with its line."""
    name, where, start = None, "", 0
    for marker in LIKE_A_MARKER.finditer(text):
        here = f"{document}:{text.count(chr(10), 0, marker.start()) + 1}"
        begin = BEGIN.fullmatch(marker[0])
        if not begin and marker[0] != END:
            raise RiverError(f"{here}: {marker[0]}; accepted: <!--report:NAME--> and {END}")
        if begin and name:
            break
        if begin:
            name, where, start = begin[1], here, marker.end()
        elif name:
            yield Place(name, where, start, marker.start())
            name = None
        else:
            raise RiverError(f"{here}: {END} without a <!--report:NAME--> before it")
    if name:
        raise RiverError(f"{where}: <!--report:{name}--> without its {END} after it")
