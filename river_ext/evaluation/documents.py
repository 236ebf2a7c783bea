"""The documents of published tasks, from JSON lines on this machine."""

import gzip
import io
import json
import zlib
from pathlib import Path

from ..errors import RiverError
from ..loading.files import read_bytes, read_text

MAX_BYTES = 256 << 20  # of a file, unpacked


def read_documents(data: str | Path, task: str, file: str, fields: tuple[str, ...]) -> list[dict]:
    """The objects of DATA/<task>/<file>.jsonl, or of DATA/<file>.jsonl; the name may end in .gz.

    Args:
        fields: what each object must have, as text.
    """
    return documents_of(_path(Path(data), task, file), fields)


def documents_of(path: Path, fields: tuple[str, ...]) -> list[dict]:
    """The objects of a file, one at least."""
    accepted = f"objects with {', '.join(fields)}" if fields else "objects"
    documents = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            documents.append(_document(f"{path}: line {number}", line, fields, accepted))
    if not documents:
        raise RiverError(f"{path}: no documents in it; accepted: lines of JSON, {accepted}")
    return documents


def _path(data: Path, task: str, file: str) -> Path:
    folders = (data / task, data)
    found = [
        path
        for path in (d / f"{file}{end}" for d in folders for end in (".jsonl", ".jsonl.gz"))
        if path.exists()
    ]
    if not found:
        raise RiverError(
            f"{data}: has no documents of {task}; accepted: a folder with {task}/{file}.jsonl, .jsonl.gz, or "
            f"{file}.jsonl in the folder itself"
        )
    return found[0]


def _text(path: Path) -> str:
    if path.suffix != ".gz":
        return read_text(path, MAX_BYTES)
    try:
        with gzip.open(io.BytesIO(read_bytes(path, MAX_BYTES))) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise RiverError(f"{path}: more than {MAX_BYTES >> 20} MiB; accepted: up to that")
        return data.decode("utf-8")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RiverError(f"{path}: is no valid gzip file ({error})") from None
    except UnicodeDecodeError as error:
        raise RiverError(f"{path}: byte {error.start} is no UTF-8; accepted: UTF-8 text") from None


def _document(where: str, line: str, fields: tuple[str, ...], accepted: str) -> dict:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RiverError(f"{where} is not valid JSON ({str(error)[:160]})") from None
    if not isinstance(document, dict):
        raise RiverError(f"{where} is no object; accepted: {accepted}")
    for name in fields:
        if not isinstance(document.get(name), str):
            raise RiverError(f"{where} has no text {name!r}; accepted: {accepted}")
    return document
