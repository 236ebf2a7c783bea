"""Texts in a file: JSON lines, or plain text with blank lines between."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import RiverError
from .files import read_text

MAX_BYTES = 64 << 20  # far more than anything here reads


def read_texts(path: str | Path, fields: Sequence[str] = ("text",)) -> list[str]:
    """The texts of a file, stripped, without empty ones; a file without any is refused.

    A file whose name ends in .jsonl has an object with one of the fields on each line, of which the first one
    counts; in any other file, blank lines separate the texts.
    """
    content = read_text(path, MAX_BYTES).removeprefix("\ufeff")
    texts = (
        _json_lines(path, content, fields) if str(path).endswith(".jsonl") else re.split(r"\n\s*\n", content)
    )
    texts = [text.strip() for text in texts]
    if not any(texts):
        raise RiverError(f"{path}: no text in it; accepted: texts, or JSON lines if it ends in .jsonl")
    return [text for text in texts if text]


def _json_lines(path: str | Path, content: str, fields: Sequence[str]) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RiverError(f"{path}: line {number} is not valid JSON ({str(error)[:160]})") from None
        found = [value[name] for name in fields if name in value] if isinstance(value, dict) else []
        if not found or not isinstance(found[0], str):
            names = " or ".join(f'"{name}"' for name in fields)
            raise RiverError(
                f'{path}: line {number} has no field {names}; accepted: {{"{fields[0]}": "..."}}'
            )
        yield found[0]
