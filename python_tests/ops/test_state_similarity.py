"""state_similarity: the cosine, its ordered sums, and the ends of the number range."""

import pytest
import torch
from blocks import DTYPES, check_magnitudes, each_isa

from river_ext import ops, reference


@pytest.fixture(params=each_isa(), autouse=True)
def isa(request):
    ops._C.set_cpu_isa(request.param)
    yield request.param
    ops._C.set_cpu_isa(each_isa()[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 64, 4096])
def test_equals_reference(size, dtype):
    torch.manual_seed(size)
    x = torch.randn(8, size).to(dtype)
    y = (x.float() + torch.linspace(0, 4, 8)[:, None] * torch.randn(8, size)).to(dtype)
    for rows in range(1, 9):
        s = ops.state_similarity(x[:rows].contiguous(), y[:rows].contiguous())
        assert (s - reference.state_similarity(x[:rows], y[:rows])).abs().max() < 1e-6
        exact = torch.cosine_similarity(x[:rows].double(), y[:rows].double(), dim=-1)
        assert (s - exact).abs().max() < 1e-6


def test_many_rows():
    torch.manual_seed(0)
    x, y = torch.randn(2, 300, 2048).bfloat16()
    each = torch.cat([ops.state_similarity(*pair) for pair in zip(x.split(1), y.split(1), strict=True)])
    assert torch.equal(ops.state_similarity(x, y), each)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identical_vectors_never_exceed_one(dtype):
    torch.manual_seed(0)
    for _ in range(50):
        x = torch.randn(8, 64).to(dtype)
        s = ops.state_similarity(x, x.clone())
        assert (s <= 1).all() and (s > 1 - 1e-6).all()
        assert (ops.state_similarity(x, -x) >= -1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_and_non_finite_vectors_give_zero(dtype):
    x = torch.ones(8, 64).to(dtype)
    y = x.clone()
    y[0] = 0
    y[1, 3], y[2, 63], y[3, 0] = float("nan"), float("inf"), float("-inf")
    s = ops.state_similarity(x, y)
    assert (s[:4] == 0).all() and (s[4:] == 1).all()
    assert torch.equal(ops.state_similarity(y, x), s)
    assert torch.equal(reference.state_similarity(x, y), s)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_range_ends(dtype):
    """Squares of these over- or underflow in fp32; the cosine must not."""
    torch.manual_seed(0)
    base = torch.randn(8, 64).sign() + 0.5 * torch.rand(8, 64)
    info = torch.finfo(dtype)
    for a in (info.max / 2, info.tiny, info.smallest_normal * 2**-6, 1.0):
        for b in (info.max / 2, info.tiny, 1.0):
            x, y = (base.double() * a).to(dtype), ((base + 0.1).double() * b).to(dtype)
            exact = torch.cosine_similarity(x.double() / a, y.double() / b, dim=-1)
            assert (ops.state_similarity(x, y) - exact).abs().max() < 2e-6, (a, b)
            assert (reference.state_similarity(x, y) - exact).abs().max() < 2e-6, (a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_magnitude(dtype):
    check_magnitudes(ops, dtype)
    check_magnitudes(reference, dtype)


def test_bad_arguments():
    x = torch.zeros(2, 64)
    for y, message in [
        (torch.zeros(2, 32), r"y has shape \[2, 32\], expected \[2, 64\]"),
        (torch.zeros(2, 64).half(), "y is float16, expected float32"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.state_similarity(x, y)
    with pytest.raises(RuntimeError, match="hidden_size is 40, expected a multiple of 16"):
        ops.state_similarity(torch.zeros(2, 40), torch.zeros(2, 40))
