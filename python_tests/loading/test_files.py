"""What is opened of somebody else's files, and how much of it is read."""

import os

import pytest

from river_ext.errors import RiverError
from river_ext.loading.files import is_regular, open_regular, path_of, read_bytes, read_text


def refused(function, *arguments) -> str:
    with pytest.raises(RiverError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_a_regular_file(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    assert not is_regular(file) and not is_regular(file / "below")
    file.write_text("täxt")
    assert not is_regular(file / "below")
    link.symlink_to(file)
    for path in (file, link, str(file)):
        assert is_regular(path) and read_text(path, 5) == "täxt" and read_bytes(path, 100) == "täxt".encode()
        with open_regular(path) as opened:
            assert opened.read(1) == b"t"


def test_nothing_hangs(tmp_path, fifo):
    for function, arguments in (
        (is_regular, ()),
        (open_regular, ()),
        (read_bytes, (10,)),
        (read_text, (10,)),
    ):
        assert "is a FIFO; accepted: a regular file" in refused(function, fifo, *arguments)
        assert "is a device" in refused(function, "/dev/zero", *arguments)
        assert "is a directory" in refused(function, tmp_path, *arguments)


def test_a_file_that_becomes_a_fifo_while_it_is_opened(tmp_path, fifo, monkeypatch):
    file = tmp_path / "file"
    file.write_text("text")
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *flags: real(fifo, *flags))
    before = len(os.listdir("/proc/self/fd"))
    assert "is a FIFO" in refused(open_regular, file)
    assert len(os.listdir("/proc/self/fd")) == before


def test_links_and_missing_files(tmp_path):
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    assert "a link to nothing" in refused(is_regular, tmp_path / "dangling")
    assert "cannot be read" in refused(is_regular, tmp_path / "loop")
    assert "cannot be read (No such file" in refused(read_text, tmp_path / "absent", 10)
    assert "cannot be read" in refused(is_regular, tmp_path / ("x" * 300))


def test_what_is_too_large_or_no_text(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"ab\xff")
    assert "byte 2 is no UTF-8" in refused(read_text, file, 3)
    assert "larger than 2 bytes" in refused(read_bytes, file, 2)
    os.truncate(file, 20 << 30)
    assert "larger than 3 MiB" in refused(read_text, file, 3 << 20)
    assert len(read_bytes("/proc/self/cmdline", 1 << 20)) > 0  # regular, of size 0 for stat
    assert "larger than 1 bytes" in refused(read_bytes, "/proc/self/cmdline", 1)


def test_paths(tmp_path):
    assert path_of(str(tmp_path), "river") == path_of(tmp_path, "river") == tmp_path
    for value in ("", None, 3, b"x", "a\0b", "\ud800", ["x"]):
        assert refused(path_of, value, "river").startswith("river ")
