"""Times a 4-bit linear and torch's bf16 linear, each against a plain read of the very bytes that it reads.

There is one row of activations. The weights are random; more than 128 MB of them take turns, so that no
cache holds them. The plain read is torch's amax over the same memory; bench/cpu/linear.py has a stricter
one. On a machine that others use as well, torch.set_num_threads(1) gives steadier numbers.
"""

import time
from statistics import median

import torch

from river_ext import ops

out_features, in_features, group = 4096, 4096, 64
x = torch.randn(1, in_features, dtype=torch.bfloat16)
q = torch.randint(16, (out_features, in_features), dtype=torch.uint8)
scale, zero = (torch.rand(out_features, in_features // group).half() for _ in range(2))
packed = [ops.pack_w4(q, scale, zero) for _ in range(16)]
dense = [torch.randn(out_features, in_features).bfloat16() for _ in range(4)]


def seconds(call, weights) -> float:
    """The median over all weights, three times each."""
    times = []
    for weight in weights * 3:
        start = time.perf_counter()
        call(weight)
        times.append(time.perf_counter() - start)
    return median(times)


print("                us      GB/s   % of a plain read")
for name, weights, call in (
    ("river W4", packed, lambda weight: ops.linear_w4(x, weight, out_features)),
    ("river bf16", dense, lambda weight: ops.linear(x, weight)),
    ("torch bf16", dense, lambda weight: torch.nn.functional.linear(x, weight)),
):
    took = seconds(call, weights)
    read = seconds(lambda weight: weight.view(torch.float32).amax(), weights)
    print(f"{name:10} {took * 1e6:8.0f} {weights[0].nbytes / took / 1e9:8.1f} {100 * read / took:12.0f} %")
