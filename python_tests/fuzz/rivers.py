"""Saved rivers of which a byte, a fact or a file has been changed: refused, or as they were."""

import json
import shutil
from pathlib import Path
from random import Random

from . import ACCEPTED, REFUSED, expect, expect_one_line
from .checkpoints import replace_file
from .mutate import dump_json, mutate_bytes, mutate_json
from .samples import write_checkpoint


class State:
    def __init__(self, folder: Path):
        import river_ext

        self.model = write_checkpoint(folder / "model")
        self.start, self.work = folder / "start", folder / "work"
        model = river_ext.load(self.model, device="cpu")
        model.save_river(self.start)
        self.river = model.river
        self.files = sorted(path.name for path in self.start.iterdir())


def prepare(folder: Path) -> State:
    return State(folder)


def attempt(state: State, random: Random) -> str:
    import river_ext

    shutil.rmtree(state.work, ignore_errors=True)
    shutil.copytree(state.start, state.work)
    change(state, random)
    try:
        model = river_ext.load(state.model, device="cpu", river=state.work)
    except river_ext.RiverError as error:
        expect_one_line(error)
        return REFUSED
    expect(same_river(model.river, state.river), "accepted, but it is not the river that was saved")
    return ACCEPTED


def same_river(one, other) -> bool:
    return (
        (one.group_size, one.quantiser, len(one)) == (other.group_size, other.quantiser, len(other))
        and one.lm_head.equal(other.lm_head)
        and all(
            vars(a).keys() == vars(b).keys()
            and all(getattr(a, name).equal(getattr(b, name)) for name in vars(a))
            for a, b in zip(one, other, strict=True)
        )
    )


def change(state: State, random: Random) -> None:
    path = state.work / random.choice(state.files)
    kind = random.randrange(10)
    if kind == 0:
        replace_file(random, path)
    elif kind == 1:
        path.rename(state.work / random.choice(("x", "river.safetensors.bak", ".river.json")))
    elif kind == 2 and path.suffix == ".json":  # the same in other words
        path.write_text(json.dumps(json.loads(path.read_text()), indent=random.choice((None, 7))))
    elif kind < 7 and path.suffix == ".json":
        path.write_bytes(dump_json(random, mutate_json(random, json.loads(path.read_text()))))
    else:
        path.write_bytes(mutate_bytes(random, path.read_bytes()))
