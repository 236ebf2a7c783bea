"""Saving a river where the process ends, or the disk fails, at a random step: the old or the new is there."""

import errno
import os
import shutil
import sys
from pathlib import Path
from random import Random

from . import ACCEPTED, REFUSED, expect
from .rivers import same_river
from .samples import write_checkpoint

STEPS = (
    "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod",
    "os.truncate", "tempfile.mkdtemp", "tempfile.mkstemp", "shutil.rmtree", "shutil.move", "fcntl.flock"
)  # fmt: skip
MOST_STEPS = 40


class State:
    def __init__(self, folder: Path):
        import river_ext

        path = write_checkpoint(folder / "model")
        self.model = river_ext.load(path, device="cpu")
        self.config, self.fingerprint = self.model.config, self.model.fingerprint
        self.parent = folder / "parent"
        self.rivers = [self.model.river, other_river(self.model)]
        self.left = None  # steps before the one that fails; None: none does
        self.fail = None
        sys.addaudithook(self.watch)

    def watch(self, event: str, arguments: tuple) -> None:
        """Counts what touches the file system, and fails where it was told to."""
        if self.left is None or event not in STEPS or (event == "open" and not writes(arguments)):
            return
        self.left -= 1
        if self.left < 0:
            self.left = None
            self.fail()


def writes(arguments: tuple) -> bool:
    _, mode, flags = arguments
    return (
        bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if isinstance(flags, int)
        else "r" not in (mode or "r")
    )


def other_river(model):
    from river_ext.quant.exit_river import build_river

    return build_river(model.config, model.weights, group_size=128, progress=False)


def prepare(folder: Path) -> State:
    return State(folder)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the river's folder")


def attempt(state: State, random: Random) -> str:
    from river_ext.quant.exit_river import save_river

    old, new = state.rivers
    shutil.rmtree(state.parent, ignore_errors=True)
    state.parent.mkdir()
    target, before = state.parent / "river", random.random() < 0.7
    if before:
        save_river(target, old, state.config, state.fingerprint)
    step, killed = random.randrange(MOST_STEPS), random.random() < 0.5
    state.fail = (lambda: os._exit(9)) if killed else disk_full
    status = save_that_fails(state, target, step)
    expect(status in (0, 4, 9), f"step {step}, {'killed' if killed else 'disk full'}: ended with {status}")
    found = loaded(state, target)
    wanted = [new] if status == 0 else [old, new] if before else [None, new]
    expect(
        any(r is found or (r and found and same_river(r, found)) for r in wanted),
        f"step {step}: neither old nor new",
    )
    if status != 9:
        left = sorted(p.name for p in state.parent.iterdir())
        expect(left in (["river"], []), f"step {step}: {leftovers(state)}")
    save_river(target, old, state.config, state.fingerprint)
    expect(same_river(loaded(state, target), old), f"step {step}: the next save did not take")
    expect([p.name for p in state.parent.iterdir()] == ["river"], f"step {step}: {leftovers(state)}")
    return ACCEPTED if status == 0 else REFUSED


def save_that_fails(state: State, target: Path, step: int) -> int:
    """The exit code of a process of its own, as from some failures nothing comes back: 0 if it saved."""
    from river_ext import RiverError
    from river_ext.quant.exit_river import save_river

    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 3
        try:
            state.left = step
            save_river(target, state.rivers[1], state.config, state.fingerprint)
            status = 0
        except RiverError as error:
            status = 4 if "\n" not in str(error) else 5
        except OSError as error:  # the command line prints these in one line, with the file's name
            status = 4 if error.filename else 6
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def leftovers(state: State) -> str:
    return "left behind: " + ", ".join(
        sorted(str(p.relative_to(state.parent)) for p in state.parent.rglob("*"))
    )


def loaded(state: State, target: Path):
    """The river at target; None: there is none, and it says so."""
    import torch

    from river_ext import RiverError
    from river_ext.quant.exit_river import load_river

    try:
        return load_river(target, state.config, state.fingerprint, torch.device("cpu"))
    except RiverError:
        return None
