"""Prompts from files of JSON lines."""

import argparse
import gzip
import json
from itertools import islice
from pathlib import Path


def add_prompts(parser: argparse.ArgumentParser, count: int) -> None:
    """What is measured on: a model, and its prompts."""
    parser.add_argument("--model", type=Path, help="a checkpoint's directory")
    parser.add_argument("--river", type=Path, help="its saved river")
    parser.add_argument("--prompts", type=Path, nargs="+", default=[], help="JSON lines")
    parser.add_argument("--chat", action="store_true", help="prompts go through the chat template")
    parser.add_argument("--count", type=int, default=count, help="prompts of each file")


def read_prompts(file: Path, count: int, chat: bool) -> list:
    """The first `count` prompts of a file (.gz or not): text, or chat messages of a user who says it."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        prompts = [_text_of(json.loads(line)) for line in islice(lines, count)]
    return [[{"role": "user", "content": prompt}] for prompt in prompts] if chat else prompts


def _text_of(item: dict) -> str:
    return next(item[field] for field in ("question", "prompt", "text") if field in item)
