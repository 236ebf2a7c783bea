"""The examples run, and compute what they say."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def printed(capsys):
    """Runs an example: what it printed."""

    def run(name: str) -> str:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def number(pattern: str, text: str) -> float:
    return float(re.search(pattern, text)[1])


def test_generate(printed):
    out = printed("generate.py")
    assert "21 + 12 = 33" in out.splitlines()[0]
    assert 1 <= number(r"mean depth of ([\d.]+)", out) < 16


def test_linear_w4(printed):
    out = printed("linear_w4.py")
    assert "0.5625 bytes a weight" in out
    assert 0.01 < number(r"error ([\d.]+)", out) < 0.12


def test_attention(printed):
    assert number(r"torch's ([\d.e+-]+)", printed("attention.py")) < 1e-2


def test_layer(printed):
    out = printed("layer.py")
    assert 0.01 < number(r"exit layer ([\d.]+)", out) < 0.2
    assert -1 <= number(r"output (-?[\d.]+)", out) < 1


def test_benchmark(printed):
    _, *lines = printed("benchmark.py").splitlines()
    assert [line[:10] for line in lines] == ["river W4  ", "river bf16", "torch bf16"]
    for line in lines:
        microseconds, gb_per_second, percent = map(float, line[10:].rstrip(" %").split())
        weight_bytes = 4096 * 4096 * (0.5625 if "W4" in line else 2)
        assert microseconds > 0 and percent > 0
        assert gb_per_second == pytest.approx(weight_bytes / microseconds / 1e3, rel=0.05, abs=0.06)


def test_every_example_is_tested_and_named_in_the_readme():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {"generate.py", "layer.py", "attention.py", "linear_w4.py", "benchmark.py"}
    readme = (EXAMPLES.parent / "README.md").read_text()
    assert all(f"examples/{name}" in readme for name in names)
