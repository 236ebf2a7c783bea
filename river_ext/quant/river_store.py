"""The files of a saved river, and how one river takes the place of another: by a single rename.

    river.json                     the facts; `sha256` is of the tensors
    river-<sha256>.safetensors     the tensors, named by the first 16 digits of that

New tensors get a name of their own beside the old ones, and the rename of river.json switches from these to
those: whoever reads, and whoever is killed at whatever point, finds a whole river or, in a new directory,
none. A lock makes writers wait for each other. What a killed writer left behind goes when the next one has
the lock.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import RiverError
from ..loading.files import flush
from ..loading.json_object import read_json_object
from ..threads import by_threads

FACTS, LOCK = "river.json", ".lock"
UNFINISHED = ".calibration"  # a directory: exit layers of a river that is not whole yet
SCRATCH = ".new"  # a directory: save_file writes to a temporary file of a name of its own
TENSORS = re.compile(r"river(-[0-9a-f]{16})?\.safetensors")  # the first format version had no hash
WAIT_SECONDS = 60.0


def tensors_file(path: Path, sha256: str) -> Path:
    return path / f"river-{sha256[:16]}.safetensors"


def sha256_of(tensors: dict[str, torch.Tensor]) -> str:
    """Over name, dtype, shape and every byte of all tensors, by name; each tensor's bytes in a thread."""

    def line(name: str) -> str:
        tensor = tensors[name]
        digest = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()
        return f"{name} {tensor.dtype} {list(tensor.shape)} {digest}\n"

    lines = by_threads(line, sorted(tensors), torch.get_num_threads())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def refuse_other_content(path: Path) -> None:
    """Only nothing, an empty directory or a saved river, whole or not, may be at `path`."""
    if not os.path.lexists(path):
        return
    if os.path.islink(path) or not os.path.isdir(path) or not all(map(_is_ours, os.listdir(path))):
        raise RiverError(
            f"{path}: exists and is not a saved river; accepted: a new directory, or one to replace"
        )


def write_river(path: Path, tensors: dict[str, torch.Tensor], facts: dict) -> None:
    """Makes the directory `path` hold these, all of them, or leaves what is there if that fails.

    Args:
        path: nothing, an empty directory or a saved river.
        tensors: on the CPU.
        facts: what river.json holds; `sha256` is that of the tensors.
    """
    with _locked(path):
        refuse_other_content(path)  # again: it may have come while another writer had the lock
        _sweep(path)
        try:
            scratch = path / SCRATCH
            scratch.mkdir()
            new_facts, new_tensors = scratch / FACTS, scratch / "tensors"
            new_facts.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            save_file(tensors, new_tensors)
            os.chmod(new_tensors, new_facts.stat().st_mode & 0o777)  # what the umask allows
            flush(new_facts)
            flush(new_tensors)
            os.replace(new_tensors, tensors_file(path, facts["sha256"]))
            flush(path)
            os.replace(new_facts, path / FACTS)
            flush(path)
            shutil.rmtree(path / UNFINISHED, ignore_errors=True)
        finally:
            _sweep(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Makes the directory and holds its lock; a new one that is empty at the end goes again."""
    made, deadline = False, time.monotonic() + WAIT_SECONDS
    while True:
        if not path.exists():
            path.mkdir(parents=True, exist_ok=True)
            made = True
        try:
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the directory went with another writer that failed
            if time.monotonic() > deadline:
                raise
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(lock, path / LOCK):
                break
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(lock)
                raise RiverError(f"{path}: another process has been writing to it for long") from None
            time.sleep(0.05)
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(path / LOCK)  # while it is held: who waits for it sees that it is gone
        if made:
            with suppress(OSError):  # not empty: it holds the river
                os.rmdir(path)
        os.close(lock)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sweep(path: Path) -> None:
    """Removes what no river.json names; the caller has the lock."""
    try:
        keep = _named(path)
    except RiverError:  # unreadable: nobody knows which tensors were its own
        keep = None
    shutil.rmtree(path / SCRATCH, ignore_errors=True)
    for name in os.listdir(path):
        if TENSORS.fullmatch(name) and keep is not None and name not in keep:
            with suppress(OSError):
                os.unlink(path / name)


def _named(path: Path) -> set[str]:
    """The tensor files that the facts in place speak of."""
    if not os.path.lexists(path / FACTS):
        return set()
    sha256 = read_json_object(path / FACTS).get("sha256")
    return {tensors_file(path, sha256).name if isinstance(sha256, str) else "river.safetensors"}


def _is_ours(name: str) -> bool:
    return name in (FACTS, LOCK, SCRATCH, UNFINISHED) or TENSORS.fullmatch(name) is not None
