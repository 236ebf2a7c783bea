"""linear and linear_w4 against the reference: dtypes, instruction sets, every T, odd shapes."""

import pytest
import torch
from blocks import DTYPES, assert_close, each_isa

from river_ext import ops, reference

SIZES = [(16, 64), (1, 1), (33, 100), (160, 192), (7, 2048), (48, 8192 + 5)]


@pytest.fixture(params=each_isa())
def isa(request):
    ops._C.set_cpu_isa(request.param)
    yield request.param
    ops._C.set_cpu_isa(each_isa()[0])


def random_w4(n, k, group_size=64):
    groups = -(-k // group_size)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    return q, (torch.rand(n, groups) * 0.1 + 0.01).half(), (torch.rand(n, groups) * 15).half()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, k", SIZES)
def test_equals_reference(n, k, dtype, isa):
    torch.manual_seed(n + k)
    weight, bias = (torch.randn(n, k) * k**-0.5).to(dtype), torch.randn(n).to(dtype)
    packed = ops.pack_w4(*random_w4(n, k))
    for rows in range(1, 9):
        x = torch.randn(rows, k).to(dtype)
        for b in (None, bias):
            assert_close(ops.linear(x, weight, b), reference.linear(x, weight, b), dtype, "linear")
            assert_close(
                ops.linear_w4(x, packed, n, b), reference.linear_w4(x, packed, n, b), dtype, "linear_w4"
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype, isa):
    torch.manual_seed(0)
    x, weight = torch.randn(8, 300).to(dtype), torch.randn(50, 300).to(dtype)
    packed = ops.pack_w4(*random_w4(50, 300))
    for rows in range(1, 9):
        for op in (lambda x: ops.linear(x, weight), lambda x: ops.linear_w4(x, packed, 50)):
            together = op(x[:rows].contiguous())
            assert all(torch.equal(op(x[r : r + 1].contiguous())[0], together[r]) for r in range(rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, k", [(50, 100), (16, 2500), (37, 4096 + 5)])
def test_any_number_of_rows_gives_the_same_bits(n, k, dtype, isa):
    """Also past the columns that go through L1 together."""
    torch.manual_seed(n + k)
    x, weight, bias = torch.randn(300, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    packed = ops.pack_w4(*random_w4(n, k))
    for op in (lambda x: ops.linear(x, weight, bias), lambda x: ops.linear_w4(x, packed, n, bias)):
        each = torch.cat([op(row) for row in x.split(1)])
        for rows in (2, 3, 4, 5, 6, 7, 8, 9, 37, 300):
            assert torch.equal(op(x[-rows:].contiguous()), each[-rows:]), rows


@pytest.mark.parametrize(
    "dtype, limit", [(torch.bfloat16, 1e-5), (torch.float32, 2e-6), (torch.float16, 1e-5)]
)
def test_accuracy_of_the_sums(dtype, limit):
    """Scale and zero act in fp32 on exact 4-bit values: the error is that of fp32 sums, not of the dtype."""
    torch.manual_seed(0)
    q, scale, zero = random_w4(64, 4096, 128)
    packed = ops.pack_w4(q, scale, zero)
    x = torch.randn(1, 4096).to(dtype)
    exact = (
        x.double()
        @ ((q - zero.double().repeat_interleave(128, 1)) * scale.double().repeat_interleave(128, 1)).T
    )
    got = ops.linear_w4(x, packed, 64)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 0}[dtype]
    error = (got.double() - exact).abs() - rounding * 1.01 * exact.abs()
    assert error.max() <= limit * exact.abs().max()


def test_special_values():
    """Values at the ends of each dtype go through unharmed; NaN reaches the output."""
    for dtype in DTYPES:
        tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
        weight = torch.eye(64).to(dtype)
        x = torch.zeros(1, 64).to(dtype)
        x[0, :4] = torch.tensor([tiny, huge, -huge, 1.0]).to(dtype)
        assert torch.equal(ops.linear(x, weight), x)
        x[0, 5] = float("nan")
        assert ops.linear(x, weight).isnan().all()


@pytest.mark.parametrize("isa_name", each_isa())
def test_float16_conversion_is_exact(isa_name):
    """All 65,536 float16 values survive a trip through the kernels' own conversions."""
    ops._C.set_cpu_isa(isa_name)
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    values = values[torch.isfinite(values)]
    count = len(values) // 8 * 8
    one = torch.ones(1, 1, dtype=torch.float16)
    for column in values[:count].view(-1, 8)[:: 64 if isa_name != "portable" else 16]:
        assert torch.equal(ops.linear(column.view(8, 1).contiguous(), one).flatten(), column)
    ops._C.set_cpu_isa(each_isa()[0])


def test_bad_arguments():
    x, weight = torch.zeros(2, 64), torch.zeros(16, 64)
    packed = torch.zeros(1, 1, 576, dtype=torch.uint8)
    for call, message in [
        (
            lambda: ops.linear(torch.zeros(0, 64), weight),
            r"x has 0 rows, expected 1 to 8 on CUDA, 1 to 2\^30 - 1 on the CPU",
        ),
        (lambda: ops.linear(x, weight.bfloat16()), "weight is bfloat16, expected float32"),
        (
            lambda: ops.linear(x, weight[:, :63].contiguous()),
            r"weight has shape \[16, 63\], expected \[\*, 64\]",
        ),
        (lambda: ops.linear(x, weight.T.contiguous().T), "weight is not contiguous"),
        (lambda: ops.linear(x, weight, torch.zeros(15)), r"bias has shape \[15\], expected \[16\]"),
        (lambda: ops.linear_w4(x, packed, 17), r"weight has shape \[1, 1, 576\], expected \[2, 1, 576\]"),
        (lambda: ops.linear_w4(x, packed, 0), "out_features is 0"),
        (lambda: ops.linear_w4(x, packed, -1), "out_features is -1"),
        (lambda: ops.linear_w4(x, packed, 2**40), "out_features is 1099511627776"),
        (lambda: ops.linear_w4(x, packed.float(), 16), "weight is float32, expected uint8"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()
