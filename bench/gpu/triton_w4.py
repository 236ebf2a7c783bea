"""A short W4 GEMV in Triton, as a peer: what one gets in an afternoon without CUDA C++.

Its own layout, group 64 along K: q uint8 [N, K/2], byte 32 g + j holds column 64 g + j in the low nibble and
column 64 g + 32 + j in the high one, so that activations are read in a row; scale and zero fp16 [N, K/64];
W = (q - zero) * scale. A program has a few rows and all of K; sums are fp32. Alone, this script checks it.
"""

import argparse
import sys

import torch

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
try:
    import triton
    import triton.language as tl
except ImportError:  # torch for CPUs comes without it
    if __name__ != "__main__":
        raise
    print("triton_w4.py: no triton is installed; it comes with torch for GPUs", file=sys.stderr)
    raise SystemExit(2) from None

GROUP = 64
# (rows, groups per step, warps) of a program; the fastest is found by `tune`
CONFIGS = [(4, 16, 4), (8, 8, 4), (8, 16, 8), (16, 8, 8)]


@triton.jit
def gemv_w4(
    x_ptr,
    q_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    N,
    K,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = rows[:, None] < N
    groups = tl.arange(0, GROUPS)
    bytes_ = tl.arange(0, 32)
    tokens = tl.arange(0, T)
    sums = tl.zeros((ROWS, T), dtype=tl.float32)
    for first in range(0, K // 64, GROUPS):
        group = first + groups
        in_k = group < K // 64
        mask = in_rows & in_k[None, :]
        place = rows[:, None] * (K // 64) + group[None, :]
        scale = tl.load(scale_ptr + place, mask=mask, other=0.0).to(tl.float32)
        zero = tl.load(zero_ptr + place, mask=mask, other=0.0).to(tl.float32)
        q = tl.load(q_ptr + place[:, :, None] * 32 + bytes_[None, None, :], mask=mask[:, :, None], other=0)
        low = (q & 15).to(tl.float32)
        high = (q >> 4).to(tl.float32)
        columns = group[:, None] * 64 + bytes_[None, :]
        for t in tl.static_range(T):
            x_low = tl.load(x_ptr + t * K + columns, mask=in_k[:, None], other=0.0).to(tl.float32)
            x_high = tl.load(x_ptr + t * K + columns + 32, mask=in_k[:, None], other=0.0).to(tl.float32)
            dots = tl.sum(low * x_low[None, :, :] + high * x_high[None, :, :], axis=2)
            x_sums = tl.sum(x_low + x_high, axis=1)
            total = tl.sum(scale * (dots - zero * x_sums[None, :]), axis=1)
            sums += tl.where(tokens[None, :] == t, total[:, None], 0.0)
    out = out_ptr + tokens[None, :] * N + rows[:, None]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=in_rows & (tokens[None, :] < T))


def linear_w4(x: torch.Tensor, weight: tuple, config: tuple[int, int, int] = CONFIGS[1]) -> torch.Tensor:
    """x [T, K] @ W^T for T = 1, 2, 4 or 8; weight = (q, scale, zero) as above."""
    q, scale, zero = weight
    (tokens, k), n, (rows, groups, warps) = x.shape, q.shape[0], config
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    gemv_w4[(triton.cdiv(n, rows),)](
        x, q, scale, zero, out, n, k, T=tokens, ROWS=rows, GROUPS=groups, num_warps=warps
    )
    return out


def random_weight(n: int, k: int) -> tuple:
    q = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scale = (0.1 + 0.2 * torch.rand(n, k // GROUP)) * k**-0.5
    return q, scale.half(), (7.5 + torch.rand(n, k // GROUP)).half()


def dequantize(weight: tuple) -> torch.Tensor:
    """The dense fp32 weight [N, K]."""
    q, scale, zero = weight
    by_group = q.view(q.shape[0], -1, 1, GROUP // 2)
    values = torch.cat([by_group & 15, by_group >> 4], dim=2).flatten(2).float()
    return ((values - zero[..., None].float()) * scale[..., None].float()).flatten(1)


def error(n: int, k: int, tokens: int, config=CONFIGS[1]) -> float:
    """Relative error against the dequantised weight in double precision."""
    weight, x = random_weight(n, k), torch.randn(tokens, k, dtype=torch.bfloat16)
    expected = x.double() @ dequantize(weight).double().T
    return ((linear_w4(x, weight, config).double() - expected).norm() / expected.norm()).item()


def check() -> float:
    """The largest error over some shapes; an error if it is more than the output's rounding."""
    cases = [(48, 192, 2, CONFIGS[1]), *((1024, 2048, tokens, CONFIGS[1]) for tokens in (1, 4, 8))]
    cases += [(1030, 1024, 1, config) for config in CONFIGS]
    worst = max(error(*case) for case in cases)
    if not worst < 4e-3:  # a NaN fails too
        raise RuntimeError(f"triton_w4: relative error {worst:.1e}; bf16 rounding explains 2e-3")
    return worst


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("triton_w4.py: no CUDA device is visible to torch", file=sys.stderr)
        raise SystemExit(2)
    torch.set_default_device("cuda")
    print(f"relative error {check():.1e}")
