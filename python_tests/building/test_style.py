"""What no formatter sees: comments in C++ that are too long, and files that hold too much."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".cpp", ".cu", ".cuh", ".h")
COLUMNS = 120
LINES = 400
ONE_BY_ONE = ("ops.py", "reference.py")  # these go through the ops


@pytest.mark.parametrize("folder", ["csrc", "python_tests", "bench"])
def test_no_line_is_too_long(folder):
    files = [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]
    assert files
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= COLUMNS, f"{path.relative_to(ROOT)}:{number}"


@pytest.mark.parametrize("folder", ["csrc", "river_ext", "river_cli"])
def test_no_file_is_too_long(folder):
    files = [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (*SUFFIXES, ".py")]
    assert files
    for path in files:
        lines = len(path.read_text().splitlines())
        assert lines <= LINES or path.name in ONE_BY_ONE, f"{path.relative_to(ROOT)} has {lines} lines"
