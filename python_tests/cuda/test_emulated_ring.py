"""The ring of weights where it is tightest, and weights that are written while others run ahead."""

import emulated_ops
import pytest
import torch
from blocks import assert_close
from emulated import VARIANT, Recorder

from river_ext import ops, reference

SEEDS = range(2 if VARIANT == "sanitized" else 6)


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    monkeypatch.setattr(emulated_ops, "emulate", made)
    return made


def w4(n, k, g):
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=g)
    scale, zero = (torch.rand(n, k // 64, generator=g).half() * s for s in (0.1, 15))
    return q, scale, zero


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("columns", [64, 512])
@pytest.mark.parametrize("arch", [90, 80])
def test_a_ring_of_one_stage(recorder, arch, columns, seed):
    """A stage is filled again once all its readers have let go of it, whichever lanes are the slower ones.

    With 64 columns one warp alone multiplies; with 512 each has a tile.
    """
    g = torch.Generator().manual_seed(seed)
    x, rows = torch.randn(8, columns, generator=g).bfloat16(), 16 * 12
    weight = torch.randn(rows, columns, generator=g).bfloat16()
    packed = ops.pack_w4(*w4(rows, columns, g))
    dense_out, packed_out = emulated_ops.linear(x, weight), emulated_ops.linear_w4(x, packed, rows)
    stage, activations = 17, 8 * (columns + 8) * 2 >> 10  # KB, and 11 for what is static
    recorder.run((("random", "first", True, seed), (2, arch, "prefetch", 11 + stage + activations), ()))
    assert_close(dense_out, reference.linear(x, weight), torch.bfloat16, "linear")
    assert_close(packed_out, reference.linear_w4(x, packed, rows), torch.bfloat16, "linear_w4")


@pytest.mark.parametrize("order", ["first", "random"])
def test_a_weight_that_the_kernel_ahead_writes(recorder, order):
    """At overlap "launch" a kernel may start early, but reads nothing before those ahead have ended."""
    g = torch.Generator().manual_seed(0)
    x, first = (torch.randn(8, 64, generator=g).bfloat16() for _ in range(2))
    weight = emulated_ops.linear(x, first)  # [8, 8]
    parts = w4(32, 64, g)
    y, z = torch.randn(3, 8, generator=g).bfloat16(), torch.randn(3, 64, generator=g).bfloat16()
    dense_out = emulated_ops.linear(y, weight)
    packed = emulated_ops.pack_w4(*parts)
    packed_out = emulated_ops.linear_w4(z, packed, 32)
    recorder.run(((order, "first", True, 1), (4, 90, "launch"), ()))
    expected = reference.linear(x, first)
    assert_close(weight, expected, torch.bfloat16, "weight")
    assert_close(dense_out, reference.linear(y, weight), torch.bfloat16, "linear")
    assert torch.equal(packed, reference.pack_w4(*parts))
    assert_close(packed_out, reference.linear_w4(z, packed, 32), torch.bfloat16, "linear_w4")
