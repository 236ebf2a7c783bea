"""A 4-bit linear: quantise a weight, pack it into tiles, multiply 1 to 8 rows with it."""

import torch

import river_ext
from river_ext import ops

weight = torch.randn(1024, 2048) / 2048**0.5
q, scale, zero = river_ext.quantize(weight)  # 4 bits a weight, a scale and a zero for every 64 of them
packed = ops.pack_w4(q, scale, zero)

x = torch.randn(1, 2048, dtype=torch.bfloat16)
y = ops.linear_w4(x, packed, out_features=1024)

expected = x.float() @ weight.T
error = ((y - expected).norm() / expected.norm()).item()
print(f"{packed.nbytes / weight.numel():.4f} bytes a weight, relative error {error:.3f}")
