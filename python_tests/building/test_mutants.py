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


@pytest.fixture
def mutant(tmp_path, monkeypatch):
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    (tmp_path / "one.cpp").write_text("a + b")
    return mutate.Mutant("one", "one.cpp", "+", "-", "test_one.py")


def test_what_does_not_compile_is_not_caught(mutant, tmp_path, monkeypatch):
    monkeypatch.setattr(mutate, "built", lambda path: path.read_text() == "a + b")
    with pytest.raises(SystemExit, match=r"one: one\.cpp does not compile"):
        mutate.survives(mutant)
    assert (tmp_path / "one.cpp").read_text() == "a + b"


@pytest.mark.parametrize("code", [0, 1])
def test_a_mutant_survives_if_its_check_passes(mutant, tmp_path, monkeypatch, code):
    monkeypatch.setattr(mutate, "built", lambda path: True)
    seen = []

    def passes(check: str) -> bool:
        seen.append((tmp_path / "one.cpp").read_text())
        return code == 0

    monkeypatch.setattr(mutate, "passes", passes)
    assert mutate.survives(mutant) == (code == 0) and seen == ["a - b"]


def test_a_check_that_pytest_cannot_run_is_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    for check in ("-k nothing", "--no-such-option"):
        with pytest.raises(SystemExit, match="selects no test"):
            mutate.passes(check)
