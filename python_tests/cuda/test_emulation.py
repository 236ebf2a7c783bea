"""The emulated GPU: bugs planted in small kernels are caught, and the kernels equal the reference."""

import os
import subprocess
import sys

import emulated_ops as ops
import pytest
import torch
from blocks import DTYPES
from emulated import EVERY_SCHEDULE, ROOT, VARIANT, Guarded, choose, emulator, river_emulation

from river_ext import reference

PLANTED = {  # name: what the message says, or "results" where only they can tell
    "block_order": "results",
    "missing_syncthreads": "results",
    "uninitialised_shared": "results",
    "missing_dependency_wait": "results",
    "early_read_of_older_kernel": "results",
    "last_arriver": "results",
    "global_overrun": "overrun",
    "shared_overrun": "wrote past the end of its 256 bytes of dynamic shared memory",
    "divergent_shuffle": "deadlock.*threads 0-15, 32-47 at __shfl_xor_sync",
    "shuffle_mask": "the mask leaves out the calling lane",
    "divergent_barrier": "divergent __syncthreads",
    "return_before_barrier": "deadlock.*threads 0-31 at __syncthreads.*32-63 returned",
    "endless_wait": "deadlock.*threads 0-63 at an mbarrier",
    "no_dependency_wait": "returned without a dependency wait",
}
RING_BUGS = [("no full wait", True), ("no empty wait", True), ("no expect", True),
             ("no full wait", False), ("no empty wait", False)]  # fmt: skip


def outcomes(launch):
    """Per schedule: the error message, "overrun", "wrong" or "right"; the selftests write i at i.

    Every schedule, in the sanitized variant too: which one shows a wrong order must not be left to chance.
    """
    found = []
    for schedule in EVERY_SCHEDULE.values():
        choose(schedule)
        out, scratch = Guarded((256,), torch.float32), Guarded((1024,), torch.float32)
        try:
            launch(out.tensor.data_ptr(), scratch.tensor.data_ptr())
        except RuntimeError as error:
            found.append(str(error))
            continue
        right = torch.equal(out.tensor, torch.arange(256.0))
        found.append("overrun" if not out.intact() else "right" if right else "wrong")
    return found


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_caught(name):
    assert set(outcomes(lambda *buffers: emulator().planted(name, False, *buffers))) == {"right"}
    if VARIANT == "sanitized" and "overrun" in name:
        return  # ends the process: test_sanitizer_finds_overruns
    found = outcomes(lambda *buffers: emulator().planted(name, True, *buffers))
    if PLANTED[name] == "results":
        assert "wrong" in found
    else:
        for outcome in found:
            assert outcome == PLANTED[name] or name in outcome
            pytest.raises(RuntimeError, fail_with, outcome).match(PLANTED[name])


def fail_with(message):
    raise RuntimeError(message)


@pytest.mark.parametrize("bulk", [True, False])
def test_ring(bulk):
    assert set(outcomes(lambda *buffers: emulator().ring("", bulk, *buffers))) == {"right"}


@pytest.mark.parametrize("bug, bulk", RING_BUGS)
def test_planted_bug_in_ring_is_caught(bug, bulk):
    assert set(outcomes(lambda *buffers: emulator().ring(bug, bulk, *buffers))) - {"right"}


def test_the_emulator_works_after_a_failure():
    outcomes(lambda *buffers: emulator().planted("divergent_shuffle", True, *buffers))
    assert set(outcomes(lambda *buffers: emulator().planted("block_order", False, *buffers))) == {"right"}


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_mma(dtype):
    """Small integers: every sum is exact, so fragments in the wrong place cannot hide in a tolerance."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (16, n), generator=generator).to(dtype) for n in (16, 8))
    d = Guarded((16, 8), torch.float32)
    emulator().mma(str(dtype).removeprefix("torch."), a.data_ptr(), b.data_ptr(), d.tensor.data_ptr())
    assert torch.equal(d.tensor, a.float() @ b.float()) and d.intact()


# ---- kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 64, 192, 4112])
def test_state_similarity(size, dtype):
    torch.manual_seed(size)
    x = torch.randn(8, size).to(dtype)
    y = (x.float() + torch.linspace(0, 4, 8)[:, None] * torch.randn(8, size)).to(dtype)
    full = ops.state_similarity(x, y)
    assert (full - reference.state_similarity(x, y)).abs().max() < 1e-6
    for rows in (1, 3):
        assert torch.equal(ops.state_similarity(x[:rows], y[:rows]), full[:rows])
    assert (ops.state_similarity(x, x) <= 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_similarity_at_the_ends_of_the_range(dtype):
    x = torch.ones(8, 64).to(dtype)
    y = x.clone()
    y[0] = 0
    y[1, 3], y[2, 63], y[3, 0] = float("nan"), float("inf"), float("-inf")
    s = ops.state_similarity(x, y)
    assert (s[:4] == 0).all() and (s[4:] == 1).all() and torch.equal(ops.state_similarity(y, x), s)
    torch.manual_seed(0)
    base = torch.randn(8, 64).sign() + 0.5 * torch.rand(8, 64)
    info = torch.finfo(dtype)
    for a in (info.max / 2, info.smallest_normal * 2**-6):
        for b in (info.max / 2, info.tiny):
            x, y = (base.double() * a).to(dtype), ((base + 0.1).double() * b).to(dtype)
            exact = torch.cosine_similarity(x.double() / a, y.double() / b, dim=-1)
            assert (ops.state_similarity(x, y) - exact).abs().max() < 2e-6, (a, b)


W4_SHAPES = [(16, 64, 64), (64, 192, 64), (40, 200, 64), (5, 7, 64), (48, 400, 128), (33, 80, 128)]


@pytest.mark.parametrize("out_features, in_features, group_size", W4_SHAPES)
def test_w4_format(out_features, in_features, group_size):
    generator = torch.Generator().manual_seed(in_features)
    groups = -(-in_features // group_size)
    q = torch.randint(0, 16, (out_features, in_features), generator=generator, dtype=torch.uint8)
    scale = torch.rand(out_features, groups, generator=generator).add(0.01).half()
    zero = (15 * torch.rand(out_features, groups, generator=generator)).half()
    packed = reference.pack_w4(q, scale, zero)
    assert torch.equal(ops.pack_w4(q, scale, zero), packed)
    unpacked = ops.unpack_w4(packed, out_features, in_features, group_size)
    assert all(torch.equal(a, b) for a, b in zip(unpacked, (q, scale, zero), strict=True))
    for dtype in DTYPES:
        got = ops.dequantize_w4(packed, out_features, in_features, dtype)
        assert torch.equal(got, reference.dequantize_w4(packed, out_features, in_features, dtype))


def test_w4_format_of_rows_that_are_not_aligned():
    """16 columns fit a vector, but the base address does not allow one."""
    q = torch.randint(0, 16, (16, 64), dtype=torch.uint8)
    scale, zero = torch.ones(16, 1).half(), torch.zeros(16, 1).half()
    memory = torch.empty(16 * 64 + 1, dtype=torch.uint8)
    shifted = memory[1:].view(16, 64).copy_(q)
    packed = torch.empty(1, 1, 576, dtype=torch.uint8)
    fields = dict(dtype="float32", out_features=16, in_features=64, group_tiles=1, packed=packed.data_ptr(),
                  q=shifted.data_ptr(), scale=scale.data_ptr(), zero=zero.data_ptr(), dense=0)  # fmt: skip
    emulator().run([("pack_w4", fields)])
    assert torch.equal(packed, reference.pack_w4(q, scale, zero))


# ---- under AddressSanitizer and UndefinedBehaviorSanitizer ----------------------------------------

OVERRUN = """
import ctypes, pathlib, sys
sys.path[:0] = sys.argv[1].split(":")
import river_emulation
emulator = river_emulation.load(pathlib.Path(sys.argv[2]))
out, scratch = (ctypes.create_string_buffer(4 * n) for n in (256, 1024))
emulator.planted(sys.argv[3], True, ctypes.addressof(out), ctypes.addressof(scratch))
"""


def sanitized(arguments, **environment):
    environment = os.environ | river_emulation.sanitizer_environment() | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def sanitized_module():
    if VARIANT == "sanitized":
        pytest.skip("runs in the sanitized process itself")
    return river_emulation.build(ROOT, "sanitized", say=lambda text: None)


@pytest.mark.parametrize("name", ["shared_overrun", "global_overrun"])
def test_sanitizer_finds_overruns(sanitized_module, name):
    done = sanitized(
        ["-c", OVERRUN, f"{ROOT}/build_backend:{ROOT}/python_tests", str(sanitized_module), name]
    )
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr and name in done.stderr


def test_all_of_this_under_the_sanitizers(sanitized_module):
    tests = ROOT / "python_tests" / "cuda"
    patterns = "test_emulat*.py", "test_*_kernels.py"
    files = [str(path) for pattern in patterns for path in sorted(tests.glob(pattern))]
    no_gpu = {"CUDA_VISIBLE_DEVICES": "", "RIVER_REQUIRE_CUDA": ""}
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = sanitized(command, RIVER_EMULATION="sanitized", **no_gpu)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
