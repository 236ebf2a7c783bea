"""Variants of the CUDA path: switches with names, from Python and from the environment.

That results do not depend on them is what the schedules of emulated.py and test_graph.py test.
"""

import os
import subprocess
import sys

import emulated
import pytest

from river_ext import RiverError, ops, variants


@pytest.fixture
def kept():
    before = ops._C.variants()
    yield before
    for name, value in before.items():
        ops._C.set_variant(name, value)


def test_a_switch_says_what_it_was(kept):
    for name, value in kept.items():
        assert ops._C.set_variant(name, 1 - value) == value
        assert ops._C.variants() == kept | {name: 1 - value}
        assert ops._C.set_variant(name, value) == 1 - value


def test_what_is_no_switch(kept):
    with pytest.raises(ValueError, match="variant 'late', expected late_trigger, early_attention, "):
        ops._C.set_variant("late", 1)
    with pytest.raises(ValueError, match="variant late_trigger is 2, expected 0 or 1"):
        ops._C.set_variant("late_trigger", 2)
    assert ops._C.variants() == kept


def test_every_variant_of_the_kernels_is_off_under_some_schedule_and_on_under_another(kept):
    assert set(kept) == {*emulated.VARIANTS, "paired_steps"}
    off = [schedule[2] for schedule in emulated.SCHEDULES.values()]
    for name in emulated.VARIANTS:
        assert 0 < sum(name in names for names in off) < len(off)


def test_the_environment_chooses_all_or_nothing(kept):
    variants.choose("")
    variants.choose("late_trigger=0,full_grid=0")
    assert ops._C.variants() == kept | {"late_trigger": 0, "full_grid": 0}
    for text, named in [("full_grid=1,late=1", "late=1"), ("full_grid=1,late_trigger", "late_trigger"),
                        ("full_grid=1,late_trigger=2", "late_trigger=2")]:  # fmt: skip
        with pytest.raises(RiverError, match=f"RIVER_VARIANTS: '{named}'; accepted: NAME=0 or NAME=1"):
            variants.choose(text)
        assert ops._C.variants()["full_grid"] == 0


@pytest.mark.parametrize("text", ["deep_prefetch=0", "x"])
def test_it_is_read_at_import(text):
    code = "from river_ext import ops; print(ops._C.variants()['deep_prefetch'])"
    environment = os.environ | {"RIVER_VARIANTS": text}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if text == "x":
        assert done.returncode and "RIVER_VARIANTS: 'x'; accepted" in done.stderr.splitlines()[-1]
    else:
        assert done.stdout == "0\n"
