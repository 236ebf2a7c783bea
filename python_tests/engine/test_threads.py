"""Work in a thread of its own: a process that has loaded a model may be forked."""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback

import pytest
import torch
from conftest import write_tiny_checkpoint

import river_ext.model
from river_ext.errors import RiverError
from river_ext.threads import in_own_thread

FORK = """
import os, signal, sys, threading
import torch
torch.set_num_threads(2)
import river_ext.model

path, before, inside = sys.argv[1:]
model = river_ext.load(path, device="cpu")
assert torch.get_num_threads() == 2

def generate():
    model.generate(list(range(30)), max_new_tokens=8, stop_tokens=())

if before == "generate":
    generate()
child = os.fork()
if child == 0:
    signal.alarm(30)  # the end of a child that hangs
    if inside == "one thread":
        torch.set_num_threads(1)
    if inside == "new thread":
        thread = threading.Thread(target=generate)
        thread.start()
        thread.join()
    else:
        generate()
    os._exit(0)
status = os.waitpid(child, 0)[1]
generate()  # the parent is what it was
sys.exit(1 if status else 0)
"""


@pytest.mark.parametrize("before, inside", [("", ""), ("generate", "one thread"), ("generate", "new thread")])
def test_children_of_a_process_that_has_loaded_a_model_generate(tmp_path, before, inside):
    """Large enough that the layers' work is cut for two threads, while loading and while generating."""
    path = write_tiny_checkpoint(tmp_path, hidden_size=256, intermediate_size=512, vocab_size=4096)
    command = [sys.executable, "-c", FORK, str(path), before, inside]
    assert subprocess.run(command, timeout=120).returncode == 0


def test_loading_is_the_work_of_a_thread_that_has_ended(monkeypatch):
    names = []
    build = river_ext.model.exit_river.build_river

    def noted(*args, **kwargs):
        names.append(threading.current_thread().name)
        return build(*args, **kwargs)

    monkeypatch.setattr(river_ext.model.exit_river, "build_river", noted)
    river_ext.load(device="cpu")
    assert names == ["river_ext _load"]
    assert not any(thread.name in names for thread in threading.enumerate())


def test_results_and_errors_are_the_functions_own(tmp_path):
    @in_own_thread
    def divide(a, *, by):
        """Doc."""
        return a / by, threading.get_ident()

    result, ident = divide(6, by=3)
    assert result == 2 and ident != threading.get_ident()
    assert (divide.__name__, divide.__doc__) == ("divide", "Doc.")
    with pytest.raises(ZeroDivisionError) as error:
        divide(6, by=0)
    assert "a / by" in "".join(traceback.format_tb(error.tb)), "the traceback leads to the line"
    assert error.value.__cause__ is None and error.value.__context__ is None
    with pytest.raises(RiverError, match="config.json: missing"):
        river_ext.load(tmp_path, device="cpu")


@pytest.mark.parametrize("exception", [SystemExit, KeyboardInterrupt])
def test_what_is_no_error_passes_too(exception):
    @in_own_thread
    def leave():
        raise exception(3)

    with pytest.raises(exception):
        leave()


def test_an_interrupt_stops_the_work():
    ended = threading.Event()

    @in_own_thread
    def endless():
        try:
            while True:
                time.sleep(0.01)
        finally:
            ended.set()

    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        timer.start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            endless()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.is_set() and time.monotonic() - start < 20


INTERRUPTS = """
import random, signal, threading
from river_ext.threads import by_threads, in_own_thread

@in_own_thread
def start_threads():
    while True:
        assert by_threads(abs, range(-4, 0), 4) == [4, 3, 2, 1]

signal.signal(signal.SIGINT, signal.default_int_handler)
target = (threading.main_thread().ident, signal.SIGINT)
for number in range(100):
    timer = threading.Timer(random.uniform(0.001, 0.005), signal.pthread_kill, target)
    try:
        timer.start()
        start_threads()
    except KeyboardInterrupt:
        timer.join()
print("100 interrupts")
"""


def test_an_interrupt_while_threads_start():
    """Once, it hung within the first ten: one of those threads had been interrupted in the worker's place."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTS], capture_output=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, b"100 interrupts\n"), done.stderr


def test_the_number_of_threads_holds_there_too():
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert in_own_thread(torch.get_num_threads)() == count
    finally:
        torch.set_num_threads(before)
