"""What `import river_ext` gives, and its progress reports."""

import subprocess
import sys

import pytest
import torch

import river_ext
from river_ext import progress

ALONE = """
import river_ext, sys
heavy = {"tokenizers", "safetensors", "rich", "river_ext.model"} & sys.modules.keys()
assert not heavy, heavy
import torch
torch.ops.river.linear
shown = dir(river_ext)
for name in shown:
    getattr(river_ext, name)
print(*shown)
"""


def test_names():
    """The ops come at once, the rest when it is asked for; all of it is shown."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    expected = {"Model", "RiverError", "load", "ops", "quantize", "reference", "rotary_tables", "__version__"}
    assert expected <= set(done.stdout.split())
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = river_ext.nothing


@pytest.mark.parametrize("arguments", [{"path": ""}, {"river": ""}])
def test_an_empty_name_is_no_model(arguments):
    with pytest.raises(river_ext.RiverError, match="''; accepted: the path of a directory"):
        river_ext.load(**arguments)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory(monkeypatch, error):
    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr("river_ext.model.load_checkpoint", failing)
    with pytest.raises(river_ext.RiverError, match="not enough memory for the model and its river"):
        river_ext.load()
    monkeypatch.setattr("river_ext.model.load_checkpoint", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        river_ext.load()


def test_rotary_tables():
    cos, sin = river_ext.rotary_tables(8, 5, theta=100.0)
    angles = torch.arange(5.0)[:, None] * 100.0 ** -torch.tensor([0.0, 0.25, 0.5, 0.75])
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())


@pytest.mark.parametrize(
    "arguments, named",
    [((7, 4), "rotary_dim=7"), ((0, 4), "rotary_dim=0"), ((8, 0), "max_len=0"), ((8, 4, 0.0), "theta=0.0"),
     ((8, 4, float("nan")), "theta=nan"), (("8", 4), "rotary_dim='8'"), ((8, 4, "x"), "theta='x'")],
)  # fmt: skip
def test_rotary_tables_refuse(arguments, named):
    with pytest.raises(river_ext.RiverError, match=named):
        river_ext.rotary_tables(*arguments)


# --- progress -------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which pass where a test says so."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_progress_in_a_file_is_a_plain_line_now_and_then(clock, capsys):
    with progress.progress_bar("loading", 10) as advance:
        for seconds in (1, 14, 16, 17, 40, 41):
            clock[0] = seconds
            advance()
    assert capsys.readouterr().err == "loading: 3 of 10\nloading: 5 of 10\n"


def test_progress_on_a_terminal_is_a_bar_if_it_takes_long(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with progress.progress_bar("loading", 10) as advance:
        clock[0] = 0.5
        advance()
    assert capsys.readouterr().err == ""
    with progress.progress_bar("loading", 10) as advance:
        clock[0] = 3.0
        advance()
    assert "loading" in capsys.readouterr().err
    with progress.progress_bar("loading", 10, wanted=False) as advance:
        clock[0] = 30.0
        advance()
    assert capsys.readouterr().err == ""


def test_loading_shows_progress(capsys, monkeypatch, tiny_checkpoint):
    directory = tiny_checkpoint()
    monkeypatch.setattr(progress, "LINE_EVERY", -1.0)
    river_ext.load(directory)
    lines = capsys.readouterr().err.splitlines()
    total = 3 * 9 + 3  # tensors: nine in each of three layers, embedding, norm and head
    assert lines[total - 1] == f"loading: {total} of {total}" and lines[-1] == "quantising: 22 of 22"
