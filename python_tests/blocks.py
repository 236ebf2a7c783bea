"""Random blocks for the op tests: weights, caches and rows of any shape, with everything unread poisoned."""

import math
from dataclasses import dataclass

import torch

from river_ext import ops
from river_ext.loading.weights import BlockShape
from river_ext.quant import w4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# largest error against the reference, relative to the largest value: one rounding step of the dtype
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


@dataclass
class Shape:
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 192
    rotary_dim: int = 32
    max_len: int = 48
    slots: int = 9
    bias: bool = False
    qk_norm: bool = False
    query_scale: bool = False
    residual_multiplier: float = 1.0


SHAPES = {
    "gqa": Shape(),
    "odd sizes": Shape(hidden_size=192, num_attention_heads=3, num_key_value_heads=3, head_dim=64,
                       intermediate_size=200, rotary_dim=64),
    "partial rotary, bias, multiplier": Shape(rotary_dim=24, bias=True, residual_multiplier=0.3),
    "multi-query, qk norm, query scale": Shape(num_key_value_heads=1, qk_norm=True, query_scale=True),
    "pads everywhere": Shape(hidden_size=64, num_attention_heads=3, num_key_value_heads=1, head_dim=20,
                             intermediate_size=76, rotary_dim=20, bias=True),
    "long context": Shape(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, max_len=700, slots=9),
}  # fmt: skip


class Block:
    """One layer's weights (dense, and packed from random 4-bit values) with its caches."""

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int = 0):
        self.shape, self.dtype = shape, dtype
        self.generator = torch.Generator().manual_seed(seed)
        s = shape
        block = BlockShape.of(s)
        shapes, sizes = block.tensors(), block.projections()
        self.dense = {name: self.random(*size, scale=size[1] ** -0.5) for name, size in sizes.items()}
        self.norms = [1 + 0.1 * self.random(s.hidden_size) for _ in range(2)]
        self.packed = w4.pack_exit_layer({name: self.quantised(*size) for name, size in sizes.items()}, block)
        angle = torch.rand(s.max_len, s.rotary_dim // 2, generator=self.generator) * 6.28
        self.tables = (angle.cos(), angle.sin())
        self.options = {} if s.residual_multiplier == 1 else {"residual_multiplier": s.residual_multiplier}
        if s.bias:
            self.options |= {
                name: self.random(*shapes[name]) for name in ("q_bias", "k_bias", "v_bias", "o_bias")
            }
        if s.qk_norm:
            self.options |= {name: 1 + 0.1 * self.random(*shapes[name]) for name in ("q_norm", "k_norm")}
        if s.query_scale:
            self.options["query_scale"] = 0.5 + torch.rand(s.max_len, generator=self.generator)

    def random(self, *size, scale=1.0):
        return (torch.randn(*size, generator=self.generator) * scale).to(self.dtype)

    def quantised(self, rows, columns):
        groups = -(-columns // 64)
        return (
            torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=self.generator),
            ((torch.rand(rows, groups, generator=self.generator) + 0.5) * 0.3 * columns**-0.5).half(),
            (torch.rand(rows, groups, generator=self.generator) * 4 + 5.5).half(),
        )

    def caches(self):
        """K and V with random history; positions that no test may read are left to the caller to poison."""
        s = self.shape
        size = (s.slots, s.num_key_value_heads, s.max_len, s.head_dim)
        return self.random(*size), self.random(*size)

    def run(self, module, layer, hidden, caches, slots, positions, **options):
        """module: ops or reference; layer: "decoder_block" or "exit_layer"."""
        norm1, norm2 = self.norms
        d, p = self.dense, self.packed
        if layer == "decoder_block":
            weights = [norm1, d["q_proj"], d["k_proj"], d["v_proj"], d["o_proj"], norm2]
            weights += [d["gate_proj"], d["up_proj"], d["down_proj"]]
        else:
            weights = [norm1, p.qkv_proj, p.o_proj, norm2, p.gate_up_proj, p.down_proj]
        return self._call(getattr(module, layer), [hidden, *weights], caches, slots, positions, options)

    def run_dual(self, module, decision, hidden, caches, slots, positions, **options):
        """dual_layer; decision: index, previous, thresholds, min_layers, limit, exited, similarities."""
        index, previous, *rule = decision
        norm1, norm2 = self.norms
        d, p = self.dense, self.packed
        weights = [norm1, d["q_proj"], d["k_proj"], d["v_proj"], d["o_proj"], norm2]
        weights += [d["gate_proj"], d["up_proj"], d["down_proj"]]
        weights += [p.qkv_proj, p.o_proj, p.gate_up_proj, p.down_proj]
        args = [index, hidden, previous, *rule, *weights]
        return self._call(module.dual_layer, args, caches, slots, positions, options)

    def _call(self, op, args, caches, slots, positions, options):
        return op(
            *args, *caches, slots, positions, *self.tables, self.shape.num_attention_heads, 1e-5,
            **(self.options | options),
        )  # fmt: skip


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def assert_close(actual, expected, dtype, what):
    """Equal shape and dtype, and within the dtype's tolerance of the largest expected magnitude."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    assert torch.isfinite(actual).all(), f"{what} is not finite"
    error = (actual.double() - expected.double()).abs().max().item()
    limit = TOLERANCE[dtype] * max(expected.double().abs().max().item(), 1e-30)
    assert error <= limit, f"{what}: error {error:.3g}, allowed {limit:.3g}"


def each_isa():
    """The CPU instruction sets this machine can run."""
    return ops._C.cpu_isas()


def check_magnitudes(module, dtype):
    """state_similarity of 4,096 columns, of every power of two around those where squares are scaled."""
    columns, rows = 4096, 8
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    y = x + torch.randn(rows, columns, generator=g, dtype=torch.float64)
    info = torch.finfo(dtype)
    low, high = math.frexp(info.smallest_normal)[1] + 6, math.frexp(info.max)[1] - 4
    exponents = sorted({max(low, min(high, sign * e)) for e in range(35, 72) for sign in (-1, 1)})
    for start in range(0, len(exponents), rows):
        some = exponents[start : start + rows]
        scales = torch.tensor([2.0**e for e in some], dtype=torch.float64)[:, None]
        a, b = ((values[: len(some)] * scales).to(dtype) for values in (x, y))
        exact = torch.cosine_similarity(a.double() / scales, b.double() / scales, dim=-1)
        assert (module.state_similarity(a, b) - exact).abs().max() < 1e-6, some
