"""GPTQ's error feedback (Frantar et al. 2022, arXiv 2210.17323): roundings that make up for each other.

For inputs x with the Hessian H = mean(x x^T), a 4-bit weight should meet the outputs: for every row w,
minimise (w - v) H (w - v)^T over v on the row's grid of scales and zeros. Round one column after the other.
If that puts column j off by d, the best that the columns after it can do is to move by -d U[j, j+1:] / U[j,
j], where U is the upper Cholesky factor of H^-1: its row j is what eliminating the columns before j leaves
of row j of H^-1. So all of it is one Cholesky factor and a triangular sweep.

Columns go by falling H[j, j]: the loud ones are rounded first, while most others are left to make up for
them. The grid is fixed beforehand, so any order will do. The sweep moves the columns of its own block at
once, and those of later blocks by one matrix product per block.
"""

import torch
from torch import Tensor

from ..errors import RiverError

DAMPING = 0.01  # of the mean of the diagonal, added to it; ten times as much until there is a Cholesky factor
MAX_DAMPING = 1.0  # a positive semi-definite matrix never needs that much
SYMMETRY = 1e-3  # of the largest entry: how far the halves may differ
COLUMNS = 64  # of a block
LEVELS = 15  # q is 0 .. 15


def check_hessian(hessian: Tensor, columns: int, name: str) -> None:
    """Refuses what is no Hessian of a weight with so many columns."""
    if list(hessian.shape) != [columns, columns] or not hessian.is_floating_point():
        found = f"{hessian.dtype} {list(hessian.shape)}".removeprefix("torch.")
        raise RiverError(f"{name}: the Hessian is {found}; accepted: floats [{columns}, {columns}]")
    if not hessian.isfinite().all():
        raise RiverError(f"{name}: the Hessian holds NaN or Inf; accepted: a mean of finite x x^T")
    if (hessian - hessian.T).abs().max() > SYMMETRY * hessian.abs().max():
        raise RiverError(f"{name}: the Hessian is not symmetric; accepted: a mean of x x^T")
    if hessian.diagonal().min() < 0:
        raise RiverError(f"{name}: the Hessian has a negative diagonal; accepted: a mean of x x^T")


def feed_back(
    weight: Tensor, scale: Tensor, zero: Tensor, group_size: int, hessian: Tensor, name: str = "weight"
) -> Tensor:
    """The levels of a weight on a given grid, chosen for its outputs: q uint8 [out_features, in_features].

    Args:
        weight: [out_features, in_features], any float dtype.
        scale, zero: fp16 [out_features, groups] of group_size columns.
        hessian: [in_features, in_features], mean of x x^T or a multiple of it.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    level = hessian.diagonal().double().mean().clamp_min(torch.finfo(torch.float32).tiny)  # no matter which
    factor = _inverse_factor((hessian / level)[order][:, order], name)
    # transposed, so that a column is one piece of memory
    rest = weight.T[order].float()
    scale, zero = (part.float().T.contiguous() for part in (scale, zero))
    q = torch.empty(rest.shape, dtype=torch.uint8, device=rest.device)
    for start in range(0, len(rest), COLUMNS):
        block = slice(start, min(start + COLUMNS, len(rest)))
        groups = order[block] // group_size
        errors = _round_block(rest[block], scale[groups], zero[groups], factor[block, block], q[block])
        rest[block.stop :] -= factor[block, block.stop :].T @ errors
    levels = torch.empty_like(q)
    levels[order] = q
    return levels.T.contiguous()


def _round_block(rest: Tensor, scale: Tensor, zero: Tensor, factor: Tensor, q: Tensor) -> Tensor:
    """Rounds columns [columns, out_features] into q, in turn: their errors, in parts of factor's diagonal."""
    errors = torch.empty_like(rest)
    for column in range(len(rest)):
        levels = (rest[column] / scale[column] + zero[column]).round_().clamp_(0, LEVELS)
        q[column] = levels
        errors[column] = (rest[column] - (levels - zero[column]) * scale[column]) / factor[column, column]
        rest[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
    return errors


def damped_factor(hessian: Tensor, name: str, damping: float = DAMPING) -> Tensor:
    """The lower Cholesky factor of a Hessian in fp32, damped as it needs. Zeros count as identity."""
    level = hessian.diagonal().double().mean().item() or 1.0
    while damping <= MAX_DAMPING:
        damped = hessian.float().clone()
        damped.diagonal().add_(damping * level)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor
        damping *= 10
    raise RiverError(f"{name}: the Hessian is not positive semi-definite; accepted: a mean of x x^T")


def _inverse_factor(hessian: Tensor, name: str) -> Tensor:
    """U, upper triangular, with U^T U = H^-1."""
    return torch.linalg.cholesky(torch.cholesky_inverse(damped_factor(hessian, name)), upper=True)
