"""Files that somebody else wrote: only regular ones are opened, and no more is read than makes sense.

Opening a FIFO waits for a writer, and reading a device may never end. A link to a regular file is one.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from ..errors import RiverError

KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def path_of(value, what: str, accepted: str = "the path of a directory") -> Path:
    """An argument that is a path. An empty one would be the present directory, which nobody means."""
    try:
        if value and isinstance(value, (str, os.PathLike)) and b"\0" not in os.fsencode(value):
            return Path(os.fsdecode(value))
    except UnicodeEncodeError:  # not even the bytes that some file systems have for names
        pass
    raise RiverError(f"{what} {str(value)[:80]!r}; accepted: {accepted}")


def is_regular(path: str | Path) -> bool:
    """Whether a regular file is at `path`: False where nothing is, and RiverError for anything else."""
    try:
        _require_regular(path, os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise RiverError(f"{path}: a link to nothing; accepted: a regular file") from None
        return False
    except OSError as error:
        raise _unreadable(path, error) from None
    return True


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file to read its bytes; never waits, whatever is at `path`."""
    try:
        _require_regular(path, os.stat(path))  # before it is opened: to open a device may do something
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _require_regular(path, os.fstat(descriptor))
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise _unreadable(path, error) from None


def read_bytes(path: str | Path, max_bytes: int) -> bytes:
    """What a regular file holds, at most `max_bytes`."""
    try:
        with open_regular(path) as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(data) > max_bytes:
        size = f"{max_bytes >> 20} MiB" if max_bytes >> 20 else f"{max_bytes} bytes"
        raise RiverError(f"{path}: larger than {size}, the most that is read of such a file")
    return data


def read_text(path: str | Path, max_bytes: int) -> str:
    """The same as text, which must be UTF-8."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RiverError(f"{path}: byte {error.start} is no UTF-8; accepted: UTF-8 text") from None


def flush(path: str | Path) -> None:
    """Brings a file or a directory onto the disk: a rename must not get there before what it names."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_regular(path: str | Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise RiverError(f"{path}: is {kind}; accepted: a regular file")


def _unreadable(path: str | Path, error: OSError) -> RiverError:
    return RiverError(f"{path}: cannot be read ({error.strerror})")
