"""What no formatter sees of the C++ files: it leaves comments as long as they are."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".cpp", ".cu", ".cuh", ".h")
COLUMNS = 120


@pytest.mark.parametrize("folder", ["csrc", "python_tests", "bench"])
def test_no_line_is_too_long(folder):
    files = [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]
    assert files
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= COLUMNS, f"{path.relative_to(ROOT)}:{number}"
