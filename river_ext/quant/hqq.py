"""Half-quadratic quantisation (HQQ, Badri & Shaji 2023): 4-bit weights without calibration data.

A group of weights gets a scale from its range and a float zero, `W ~ (q - zero) * scale`. The zero is then
refined by half-quadratic splitting of the lp error (p < 1, so that outliers count less): alternate

    W_e  = shrink(W - (q - zero) * scale)        the part of the error that is explained as outliers
    zero = mean(q - (W - W_e) / scale)           the zero that fits the rest best

with a growing weight beta on the splitting. Each group keeps its best zero by mean squared error and stops
when the next one is no better. The scale is rounded to fp16 before that, the best zero after it, and only
then is the final q computed, so that it fits what is stored.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import RiverError
from ..threads import by_threads
from . import gptq
from .gptq import LEVELS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GROUP_SIZES = (64, 128)
LP_NORM, BETA, KAPPA = 0.7, 10.0, 1.01  # the splitting's weight and its growth
FP16_MAX, FP16_NORMAL, FP16_TINY = 65504.0, 2.0**-14, 2.0**-24
WEIGHTS_AT_A_TIME = {"cpu": 1 << 18, "cuda": 1 << 26}  # that are refined; on a CPU by each thread


def quantize(
    weight: Tensor,
    group_size: int = 64,
    *,
    iterations: int = 40,
    hessian: Tensor | None = None,
    name: str = "weight",
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises a weight to 4 bits with HQQ, in groups along its input features.

    Args:
        weight: [out_features, in_features], float32, bfloat16, float16 or float64, on any device.
        group_size: 64 or 128; the last group of a row covers the columns that are left.
        iterations: how many zeros to try at most; 1 is round-to-nearest.
        hessian: [in_features, in_features], mean of x x^T over inputs x that the weight will see, float32 or
            float64, on the weight's device; any factor will do. With it q is chosen for small errors of the
            outputs (gptq.py); scale and zero are HQQ's all the same.
        name: what error messages call the weight.

    Returns:
        q uint8 [out_features, in_features] with values 0..15, scale and zero fp16 [out_features, groups],
        with weight ~ (q - zero) * scale: what `pack_w4` takes.

    A group whose range is too small for an fp16 scale gets the smallest one, so that a weight that is
    nearly zero is met to within 2 ** -24. One that needs a scale above the range of fp16 is refused.
    """
    if weight.ndim != 2 or weight.numel() == 0 or weight.dtype not in DTYPES:
        found = f"{weight.dtype} {list(weight.shape)}".removeprefix("torch.")
        raise RiverError(f"{name} is {found}; a float matrix [out_features, in_features] can be quantised")
    if group_size not in GROUP_SIZES:
        raise RiverError(f"group size {group_size} is not supported; accepted: 64, 128")
    if hessian is not None:
        gptq.check_hessian(hessian, weight.shape[1], name)
    at_a_time = WEIGHTS_AT_A_TIME.get(weight.device.type, WEIGHTS_AT_A_TIME["cpu"])
    blocks = weight.detach().split(max(1, at_a_time // weight.shape[1]))
    quantized = _map(lambda rows: _quantize_rows(rows, group_size, iterations), blocks)
    q, scale, zero, step = (torch.cat(parts) for parts in zip(*quantized, strict=True))
    _check(step, scale, name)
    if hessian is not None:
        q = gptq.feed_back(weight.detach(), scale, zero, group_size, hessian, name)
    return q, scale, zero


def _map(function: Callable, blocks: Sequence[Tensor]) -> list:
    """The results for all blocks of rows; on a CPU each has a thread, in which the many small ops run alone.

    Threads inside of the ops would have to wait for each other after every one of them.
    """
    threads = torch.get_num_threads()
    if blocks[0].device.type != "cpu" or threads == 1:
        return [function(rows) for rows in blocks]
    try:
        return by_threads(function, blocks, threads, initializer=torch.set_num_threads, initargs=(1,))
    finally:
        torch.set_num_threads(threads)  # a part of what the workers set holds for all threads


def _check(step: Tensor, scale: Tensor, name: str) -> None:
    """Refuses weights with NaN or Inf, which show in a step, and weights too large for fp16 scales."""
    if not torch.isfinite(step).all():
        row = int(torch.nonzero(~torch.isfinite(step))[0, 0])
        raise RiverError(f"{name} holds NaN or Inf in row {row}; finite values can be quantised")
    if torch.isinf(scale).any():
        row = int(torch.nonzero(torch.isinf(scale))[0, 0])
        raise RiverError(f"{name} needs a scale above {FP16_MAX:g}, the largest in fp16, in row {row}")


def _quantize_rows(weight: Tensor, group_size: int, iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, scale, zero, and each group's step: the scale that its range asks for, in fp32."""
    full = weight.shape[1] // group_size * group_size
    groups = [weight[:, :full].unflatten(1, (-1, group_size)), weight[:, full:].unsqueeze(1)]
    parts = [_quantize_groups(part.float(), iterations) for part in groups if part.numel()]
    return tuple(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))


def _quantize_groups(weight: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for weights [out_features, groups, columns of a group]."""
    low, high = weight.aminmax(dim=-1, keepdim=True)
    step = high / LEVELS - low / LEVELS
    # where the range is tiny against the values, or empty: this keeps |zero| below 1024, where fp16 is exact
    # to half a step, and meets a constant of fp16 or bf16 exactly
    floor = torch.ldexp(torch.ones_like(step), torch.frexp(torch.maximum(high, -low)).exponent - 10)
    scale = step.maximum(floor)
    # fp16 is coarse below its normal range: up, so that the levels span the group
    scale = torch.where(scale < FP16_NORMAL, (scale / FP16_TINY).ceil().clamp_min(1) * FP16_TINY, scale)
    stored_scale = scale.half()
    scale = stored_scale.float()
    scaled = weight / scale
    zero = _refine_zeros(scaled.flatten(0, 1), scale.flatten(0, 1), iterations).view_as(scale)
    q = _round(scaled, zero).to(torch.uint8)
    return q.flatten(1), stored_scale.squeeze(-1), zero.half().squeeze(-1), step.squeeze(-1)


def _refine_zeros(scaled: Tensor, scale: Tensor, iterations: int) -> Tensor:
    """Zeros, fp16 values in fp32 [groups, 1], for weights in steps of their scale [groups, 1]."""
    zero = 0 - scaled.amin(1, keepdim=True)
    best, best_error = zero.clone(), torch.full_like(zero, torch.inf)
    active = torch.arange(len(zero), device=zero.device)
    beta = BETA
    for _ in range(iterations):
        residual = scaled + zero - _round(scaled, zero)  # W - W_r, in steps of the scale
        error = residual.square().mean(1, keepdim=True)
        better = (error < best_error).flatten().nonzero().flatten()
        if better.numel() == 0:
            break
        active, best_error, zero = active[better], error[better], zero[better]
        scaled, scale, residual = scaled[better], scale[better], residual[better]
        best[active] = zero
        zero = zero + (_shrink(residual, scale, beta) - residual).mean(1, keepdim=True)
        beta *= KAPPA
    return best.half().float()


def _round(scaled: Tensor, zero: Tensor) -> Tensor:
    return (scaled + zero).round_().clamp_(0, LEVELS)


def _shrink(residual: Tensor, scale: Tensor, beta: float) -> Tensor | float:
    """The part of a residual, in steps of the scale, that counts as outliers: generalised soft threshold."""
    if float((residual.abs().amax(1, keepdim=True) * scale).amax()) <= beta ** (-1 / (2 - LP_NORM)):
        return 0.0  # nothing exceeds its threshold
    size = (residual * scale).abs_()
    return (size - size.pow(LP_NORM - 1) / beta).clamp_min_(0) * residual.sign() / scale
