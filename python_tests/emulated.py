"""CUDA kernels on the emulated GPU: `emulate(op, outputs, **fields)` runs a launcher under every schedule.

What the hardware leaves open (order of threads and blocks, when copies land, how early a dependent kernel
starts) differs between schedules, so results must not. RIVER_EMULATION=sanitized selects the build under
AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import functools
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_backend"))

import river_emulation  # noqa: E402
import river_native  # noqa: E402

VARIANT = os.environ.get("RIVER_EMULATION", "plain")
GUARD = 4096  # bytes around every tensor, kept at 0xff: NaN, or -1


@functools.cache
def built():
    """The emulator, or why there is none."""
    try:
        return river_emulation.load(river_emulation.build(ROOT, VARIANT, say=lambda text: None))
    except river_native.BuildError as error:
        return str(error)


def emulator():
    """Built when a test first needs it, not when tests are collected: those for a GPU need none."""
    if isinstance(built(), str):
        pytest.fail(built(), pytrace=False)
    return built()


# Of those in csrc/cuda/variants.h, the ones that kernels look at
VARIANTS = ("late_trigger", "early_attention", "deep_prefetch", "full_grid")

EVERY_SCHEDULE = {  # (order and timing, the GPU, variants that are off): results depend on none of it
    "ascending, late copies": (("first", "last", True, 0), (4, 90, "prefetch"), ()),
    "descending, early copies": (
        ("last", "first", True, 0),
        (3, 90, "prefetch"),
        ("full_grid", "late_trigger"),
    ),
    "shuffled, late prefetch": (("random", "random", True, 1), (5, 90, "launch"), ("early_attention",)),
    "shuffled, sm_80": (("random", "random", True, 2), (7, 80, "prefetch"), ("deep_prefetch",)),
    "shuffled, no overlap": (("random", "last", False, 3), (2, 90, "none"), VARIANTS),
}
SCHEDULES = EVERY_SCHEDULE
if VARIANT == "sanitized":  # ten times slower; it looks for overruns, which no schedule hides
    SCHEDULES = {name: EVERY_SCHEDULE[name] for name in ("ascending, late copies", "shuffled, sm_80")}


def choose(schedule):
    (order, copies, early_dependents, seed), device, off = schedule
    emulator().set_schedule(order=order, copies=copies, early_dependents=early_dependents, seed=seed)
    names = ("sm_count", "arch", "overlap", "shared_memory")
    emulator().set_device(**dict(zip(names, device, strict=False)))  # the last may be left out
    for name in VARIANTS:
        emulator().set_variant(name, name not in off)


class Guarded:
    """A tensor with poisoned memory around it. The sanitizer has exact bounds and better messages."""

    def __init__(self, shape, dtype, initial=None):
        bytes_ = torch.Size(shape).numel() * dtype.itemsize
        guard = 0 if VARIANT == "sanitized" else GUARD
        self.memory = torch.full((bytes_ + 2 * guard,), 255, dtype=torch.uint8)
        self.around = self.memory[:guard], self.memory[guard + bytes_ :]
        self.tensor = self.memory[guard : guard + bytes_].view(dtype).view(shape)
        if initial is not None:
            self.tensor.copy_(initial)

    def intact(self):
        return all((part == 255).all() for part in self.around)


def field(value):
    """A field of an Args struct: an address, a dtype's name, or the value itself."""
    if value is None:
        return 0
    if isinstance(value, Guarded):
        return value.tensor.data_ptr()
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def run_once(op, schedule, outputs, fields):
    choose(schedule)
    written = {
        name: Guarded(start.shape, start.dtype, start) if isinstance(start, torch.Tensor) else Guarded(*start)
        for name, start in outputs.items()
    }
    read = {
        name: Guarded(value.shape, value.dtype, value) if isinstance(value, torch.Tensor) else value
        for name, value in fields.items()
    }
    emulator().run([(op, {name: field(value) for name, value in (read | written).items()})])
    for name, value in (read | written).items():
        assert not isinstance(value, Guarded) or value.intact(), f"{op} wrote outside of {name}"
    for name, value in fields.items():
        same = not isinstance(value, torch.Tensor) or bits(read[name].tensor).equal(bits(value))
        assert same, f"{op} changed its input {name}"
    return {name: value.tensor for name, value in written.items()}


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def emulate(op, outputs, **fields):
    """The outputs of a launcher, by name, after a check that they are the same bits under every schedule.

    outputs: {field: (shape, dtype)}, poisoned first, or {field: tensor} with what it holds before the launch.
    fields: everything else in the Args; tensors are copied to guarded memory.
    """
    first, first_name = None, None
    for name, schedule in SCHEDULES.items():
        results = run_once(op, schedule, outputs, fields)
        first, first_name = (results, name) if first is None else (first, first_name)
        for output, value in results.items():
            assert bits(value).equal(bits(first[output])), f"{op}: {output} differs: {first_name} / {name}"
    return first


class Recorder:
    """Takes the place of `emulate`: notes launches, on the caller's own tensors, to be queued all at once."""

    def __init__(self):
        self.calls, self.kept = [], []

    def __call__(self, op, outputs, **fields):
        written = {
            name: start if isinstance(start, torch.Tensor) else Guarded(*start).tensor
            for name, start in outputs.items()
        }
        self.kept.append((written, fields))
        addresses = {
            name: value.data_ptr() if isinstance(value, torch.Tensor) else field(value)
            for name, value in (fields | written).items()
        }
        self.calls.append((op, addresses))
        return written

    def run(self, schedule):
        choose(schedule)
        emulator().run(self.calls)


def copied_bytes(tensor):
    """How many bytes of the tensor the last run of a Recorder has copied to shared memory."""
    return emulator().copied_bytes(tensor.data_ptr(), tensor.nbytes)
