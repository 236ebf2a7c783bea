"""The mistakes that tools/mutate.py plants: each has its place in the code, and tests that look at it."""

from pathlib import Path

import mutate
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutant", mutate.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_has_its_one_place(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    files = [word for word in mutant.check.split() if word.endswith(".py")]
    assert all(len(list((ROOT / "python_tests").rglob(name))) == 1 for name in files)
