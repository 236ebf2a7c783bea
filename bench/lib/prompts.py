"""Prompts from files of JSON lines."""

import gzip
import json
from itertools import islice
from pathlib import Path


def read_prompts(file: Path, count: int, chat: bool) -> list:
    """The first `count` prompts of a file (.gz or not): text, or chat messages of a user who says it."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        prompts = [_text_of(json.loads(line)) for line in islice(lines, count)]
    return [[{"role": "user", "content": prompt}] for prompt in prompts] if chat else prompts


def _text_of(item: dict) -> str:
    return next(item[field] for field in ("question", "prompt", "text") if field in item)
