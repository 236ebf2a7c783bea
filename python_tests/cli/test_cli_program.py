"""The command `river` as a process: what it loads, its streams, interrupts, and too little memory."""

import os
import signal
import subprocess
import sys
import time

import pytest
from commands import PROMPT, ROOT, SHORT, limited, subprocess_river
from conftest import write_tiny_checkpoint
from tiny_model import demo_model

from river_cli import shared
from river_ext import __version__

LIGHT = """
import sys, river_cli
code = river_cli.main(sys.argv[1:])
heavy = {"torch", "numpy", "rich", "river_ext"} & sys.modules.keys()
sys.exit(f"{heavy} imported" if heavy else code)
"""


@pytest.mark.parametrize(
    "arguments, code, expected",
    [
        (["--help"], 0, "generate"),
        (["--version"], 0, f"river {__version__}"),
        (["generate", "--help"], 0, "--file FILE"),
        (["info", "--help"], 0, "--river DIR"),
        (["convert", "--help"], 0, "--output DIR"),
        (["eval", "--help"], 0, "--problems N"),
        (["calibrate", "--help"], 0, "--guarantee SHARE"),
        (["fly"], 2, "'fly'"),
        (["generate", "--demo", "--seed", "x"], 2, "'x'"),
        (["generate", "--demo", ""], 2, "prompt is empty"),
        (["generate", "--demo", "--file", "/dev/zero"], 2, "no regular file"),
    ],
)
def test_torch_is_not_loaded_for_help_and_errors(arguments, code, expected):
    command = [sys.executable, "-c", LIGHT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert expected in done.stdout + done.stderr


def test_errors_of_the_program():
    done = subprocess_river("generate", "--demo", "--json", "--threshold", "nan", "hi")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"river: error: threshold=nan; accepted: a number, not NaN\n"


def test_both_streams_in_one_file_are_in_order():
    done = subprocess_river("generate", "--demo", PROMPT, *SHORT, "--threads", "1", stderr=subprocess.STDOUT)
    text, summary = done.stdout.decode().splitlines()
    assert text == demo_model().generate(PROMPT, max_new_tokens=6).text and summary.startswith("6 new tokens")


def test_a_reader_that_stops_reading():
    """Also of what argparse prints, which drops such errors."""
    for arguments in (["info"], ["--help"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess_river(*arguments, stdout=write)
        os.close(write)
        assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("arguments", (["info"], ["--help"], ["generate", "--demo", "hi", *SHORT]))
def test_a_full_standard_output(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess_river(*arguments, stdout=full)
    assert done.returncode == 2
    *notes, line = done.stderr.decode().splitlines()
    assert line == "river: error: standard output: No space left on device"
    assert "Traceback" not in done.stderr.decode()


def closing(*descriptors: int):
    """For subprocess: what a shell does with >&- and <&-."""

    def close():
        for descriptor in descriptors:
            os.close(descriptor)

    return close


def test_closed_streams():
    done = subprocess_river("--help", preexec_fn=closing(1))
    assert (done.returncode, done.stderr) == (2, b"river: error: standard output is closed\n")
    done = subprocess_river("generate", "--demo", "-", preexec_fn=closing(0))
    assert (done.returncode, done.stdout) == (2, b"") and b"standard input is closed" in done.stderr
    done = subprocess_river("generate", "--demo", "def f", *SHORT, preexec_fn=closing(0, 2))
    assert done.returncode == 0, "notes that nobody can read are no error"
    assert done.stdout.decode() == demo_model().generate("def f", max_new_tokens=6).text + "\n"
    done = subprocess_river("generate", "--demo", "", preexec_fn=closing(0, 1, 2))
    assert done.returncode == 2


def test_an_interrupt_while_torch_is_loaded(tmp_path):
    """Whatever a module makes of a KeyboardInterrupt, there is no traceback."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('loading', flush=True)\n"
        "try:\n    time.sleep(60)\n"
        "except BaseException as error:\n    raise ImportError('torch') from error\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "river_cli", "info"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, env=environment) as process:
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"\nriver: interrupted\n")


READY = "import sys, river_cli; print('ready', file=sys.stderr, flush=True); river_cli.program()"


@pytest.mark.parametrize("seconds", [0.1, 0.4, 0.8, 1.6, 3])
def test_an_interrupt_at_any_time(seconds):
    command = [sys.executable, "-c", READY, "eval", "--demo"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, cwd=ROOT) as process:
        assert process.stderr.readline() == b"ready\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (130, b"", b"\nriver: interrupted\n")


def test_too_little_memory_to_load_the_library(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemError('error return without exception set')")
    strange = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}  # what else such an import may say
    for options in {"preexec_fn": limited(150)}, {"environment": strange}:
        done = subprocess_river("info", **options)
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.startswith(b"river: error: river_ext cannot be loaded: ")
        assert done.stderr.count(b"\n") == 1


SMALL_MACHINE = """
import sys, resource, river_ext
model = river_ext.load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
try:
    model.generate([1, 2], max_new_tokens=9_000_000)
except river_ext.RiverError as error:
    print(error)
"""


def test_too_little_memory_for_the_cache(tmp_path):
    """Of 7 GB, for a tiny model with very many positions."""
    directory = write_tiny_checkpoint(tmp_path / "model", max_position_embeddings=10**7)
    command = [sys.executable, "-c", SMALL_MACHINE, str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("not enough memory for a KV cache of 1 x 10000000 positions (")
    assert done.stdout.count("\n") == 1 and done.stderr == ""


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory: you tried to"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(ALLOCATOR), RuntimeError("std::bad_alloc")])
def test_memory_that_fails_anywhere_is_one_line(refused, monkeypatch, error):
    def failing(arguments):
        raise error

    monkeypatch.setattr(shared, "load", failing)
    assert refused("generate", "--demo", "hi").startswith("not enough memory")
