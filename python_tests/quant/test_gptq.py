"""Quantising with a Hessian: smaller errors of the outputs, levels as GPTQ defines them, refusals."""

import pytest
import torch

from river_ext.errors import RiverError
from river_ext.quant import gptq, hqq


def inputs(columns: int, count: int = 2000, seed: int = 0):
    """Correlated, and some columns louder than others: [count, columns]."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)[:, None]
    loudness = torch.randn(columns, generator=generator).exp()
    return torch.randn(count, columns, generator=generator) @ mixed * loudness


def weights(rows: int, columns: int, seed: int = 0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def dense(q, scale, zero, group_size=64):
    scale, zero = (part.double().repeat_interleave(group_size, 1)[:, : q.shape[1]] for part in (scale, zero))
    return (q.double() - zero) * scale


def output_error(weight, quantised, x, group_size=64):
    """||(W - Wq) X||^2."""
    return ((weight.double() - dense(*quantised, group_size)) @ x.double().T).square().sum().item()


def naive(weight, scale, zero, hessian, group_size):
    """By definition: after each column, its error is made up for by the best move of all columns that remain.

    Nothing is factored or updated: each step inverts the Hessian of the columns that remain.
    """
    weight, hessian = weight.double().clone(), hessian.double().clone()
    hessian.diagonal().add_(gptq.DAMPING * hessian.diagonal().mean())
    remaining = hessian.diagonal().argsort(descending=True).tolist()
    q = torch.zeros_like(weight)
    while remaining:
        column = remaining[0]
        s, z = (part[:, column // group_size].double() for part in (scale, zero))
        q[:, column] = (weight[:, column] / s + z).round().clamp(0, 15)
        error = weight[:, column] - (q[:, column] - z) * s
        inverse = torch.linalg.inv(hessian[remaining][:, remaining])
        weight[:, remaining] -= error[:, None] * inverse[0] / inverse[0, 0]
        remaining = remaining[1:]
    return q.to(torch.uint8)


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("columns", [64, 192, 200])
def test_outputs_are_met_better(columns, group_size):
    """On inputs that the Hessian is not of, too. The scales and zeros are HQQ's."""
    weight, x = weights(48, columns), inputs(columns)
    plain = hqq.quantize(weight, group_size)
    refined = hqq.quantize(weight, group_size, hessian=x[:1000].T @ x[:1000])
    assert torch.equal(plain[1], refined[1]) and torch.equal(plain[2], refined[2])
    errors = [output_error(weight, one, x[1000:], group_size) for one in (refined, plain)]
    assert errors[0] < 0.15 * errors[1]


@pytest.mark.parametrize(("columns", "group_size"), [(8, 64), (64, 64), (150, 64), (200, 128)])
def test_equals_the_definition(columns, group_size):
    """Over several blocks of columns, and the last of them not a whole one."""
    weight, x = weights(12, columns), inputs(columns)
    hessian = x.T @ x / len(x)
    q, scale, zero = hqq.quantize(weight, group_size, hessian=hessian)
    assert torch.equal(q, naive(weight, scale, zero, hessian, group_size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_views(dtype):
    weight, x = weights(64, 24).T.to(dtype), inputs(64)
    hessian = x.T @ x
    found = hqq.quantize(weight, hessian=hessian)
    expected = hqq.quantize(weight.float().contiguous(), hessian=hessian.double())
    assert all(map(torch.equal, found, expected))


def test_the_weight_and_the_hessian_stay_as_they_are():
    weight, x = weights(8, 128), inputs(128)
    hessian = x.T @ x
    copies = weight.clone(), hessian.clone()
    first = hqq.quantize(weight, hessian=hessian)
    assert torch.equal(weight, copies[0]) and torch.equal(hessian, copies[1])
    assert all(map(torch.equal, first, hqq.quantize(weight, hessian=hessian)))


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**-20, 2.0**90])
def test_a_factor_of_the_hessian_does_not_matter(factor):
    weight, x = weights(8, 128), inputs(128)
    hessian = x.T @ x
    expected = hqq.quantize(weight, hessian=hessian)
    assert all(map(torch.equal, hqq.quantize(weight, hessian=factor * hessian), expected))


@pytest.mark.parametrize("hessian", [torch.zeros(128, 128), torch.eye(128), torch.rand(128).diag()])
def test_without_correlations_it_is_rounding(hessian):
    weight = weights(8, 128)
    assert all(map(torch.equal, hqq.quantize(weight, hessian=hessian), hqq.quantize(weight)))


@pytest.mark.parametrize("count", [1, 5, 100])
def test_fewer_inputs_than_columns(count):
    """The Hessian is singular: damping copes, and the inputs that there are get met."""
    weight, x = weights(16, 128), inputs(128, count)
    x[:, 7] = 0  # a column that no input has
    refined = hqq.quantize(weight, hessian=x.T @ x)
    assert output_error(weight, refined, x) < 0.05 * output_error(weight, hqq.quantize(weight), x)


def test_a_hessian_that_rounding_made_indefinite():
    weight, x = weights(16, 128), inputs(128)
    hessian = x.T @ x
    hessian -= 0.02 * hessian.diagonal().mean() * torch.eye(128)
    hessian.diagonal().clamp_min_(0)
    assert torch.linalg.eigvalsh(hessian).min() < -gptq.DAMPING * hessian.diagonal().mean()
    refined = hqq.quantize(weight, hessian=hessian)
    assert output_error(weight, refined, x) < 0.5 * output_error(weight, hqq.quantize(weight), x)


def spoiled(row: int, column: int, value: float):
    hessian = torch.eye(64)
    hessian[row, column] = value
    return hessian


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.eye(63), r"w: the Hessian is float32 \[63, 63\]; accepted: floats \[64, 64\]"),
        (torch.ones(64), r"w: the Hessian is float32 \[64\]"),
        (torch.ones(2, 64, 64), r"w: the Hessian is float32 \[2, 64, 64\]"),
        (torch.ones(64, 64, dtype=torch.int64), r"w: the Hessian is int64 \[64, 64\]"),
        (spoiled(3, 3, torch.nan), "w: the Hessian holds NaN or Inf"),
        (spoiled(3, 4, torch.inf), "w: the Hessian holds NaN or Inf"),
        (spoiled(3, 4, 0.5), "w: the Hessian is not symmetric"),
        (spoiled(3, 3, -1.0), "w: the Hessian has a negative diagonal"),
        (1 - torch.eye(64), "w: the Hessian is not positive semi-definite"),
        (2 - torch.eye(64) * 2, "w: the Hessian is not positive semi-definite"),
    ],
)
def test_refused_hessians(hessian, message):
    with pytest.raises(RiverError, match=message) as error:
        hqq.quantize(torch.randn(4, 64), hessian=hessian, name="w")
    assert "\n" not in str(error.value)
