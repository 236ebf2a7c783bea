"""Hostile input by the thousand, and that the fuzzer would notice."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from fuzz import AREAS, runner

INPUTS = {
    "configs": 800, "checkpoints": 200, "rivers": 200, "imports": 100, "saves": 120, "tokenizer_files": 120,
    "requests": 380, "commands": 300, "op_calls": 700,
}  # fmt: skip


@pytest.fixture(scope="module")
def reports():
    with ThreadPoolExecutor(2) as pool:  # the workers are processes
        found = pool.map(lambda area: runner.run(area, seed=0, first=0, count=INPUTS[area]), AREAS)
        return dict(zip(AREAS, found, strict=True))


@pytest.mark.parametrize("area", AREAS)
def test_hostile_input(reports, area):
    """Refused in one line, or dealt with as it should be; and an area that only refuses would show little."""
    report = reports[area]
    assert not report.findings, "\n".join(
        f"python -m fuzz {area} --first {number} --count 1: {text}" for number, text in report.findings
    )
    assert report.refused + report.accepted == INPUTS[area]
    assert report.refused > INPUTS[area] / 20 and report.accepted > INPUTS[area] / 20


def test_there_are_enough_inputs():
    assert sum(INPUTS.values()) >= 2000


def test_the_runner_notices_and_goes_on():
    report = runner.run("planted", seed=0, first=0, count=9, seconds=3)
    assert (report.refused, report.accepted) == (1, 2)
    assert [number for number, _ in report.findings] == [1, 3, 4, 5, 6, 7]
    expected = [
        "found it", "ValueError at planted.py", "the process ended with -6", "no end after 3 s",
        "several lines", "SystemExit",
    ]  # fmt: skip
    for (_, said), words in zip(report.findings, expected, strict=True):
        assert words in said


def test_an_input_is_what_its_number_says():
    """Whatever ran before it."""
    alone = runner.run("planted", seed=0, first=3, count=1).findings
    assert alone == runner.run("planted", seed=0, first=0, count=4).findings[1:]
