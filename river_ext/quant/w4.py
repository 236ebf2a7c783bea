"""The W4 format: how 4-bit weights lie in memory, and in which order an exit layer holds its rows.

A weight W [out_features, in_features] is approximated by `(q - zero) * scale`: q is 0..15, and each row
has one (scale, zero) pair per group of 64 or more columns; zero is a float. The packed form is uint8
`[ceil(out_features / 16), ceil(in_features / 64), 576]`, one layout for CPU and CUDA. A tile holds 16 rows
x 64 columns, and one copy of its 576 bytes brings all that is needed to use it:

    bytes 0..511      nibbles: 128 little-endian 32-bit words, four for each of 32 lanes
    byte  512 + 4 r   fp16 scale, then fp16 zero, of row r, for every model dtype; a group that is larger
                      than 64 repeats its pair in each of its tiles

Lane l (g = l / 4, t = l % 4) owns bytes 16 l .. 16 l + 15, that is the words w0..w3. Word wj holds columns
c = 16 t + 4 j .. c + 3 of the rows g and g + 8:

    bits   | 31..28 | 27..24 | 23..20 | 19..16 | 15..12 | 11..8  | 7..4   | 3..0
    row    | g + 8  | g + 8  | g      | g      | g + 8  | g + 8  | g      | g
    column | c + 3  | c + 1  | c + 3  | c + 1  | c + 2  | c      | c + 2  | c
    A reg. | a3     | a1     | a2     | a0     | a3     | a1     | a2     | a0

`(wj >> 4 i) & 0x000F000F` is thus a pair of 16-bit integers, the even column below the odd one: for i = 0, 1,
2, 3 the registers a0, a2, a1, a3 of operand A of `mma.m16n8k16`, whose step j runs over the columns
16 t + 4 j + (0..3) of all t instead of 16 neighbouring ones. A dot product does not care about the order of
its terms as long as operand B has the same one: lane t reads the 16 activations at 16 t.

`pack_w4` packs rows as they are given. An exit layer orders them so that what its epilogues combine lies
in the rows g and g + 8 of a tile, which one lane owns: gate with up; the two dims of Q and K that RoPE
rotates together. The kernels read by csrc/row_order.h, the same orders. Rows and columns past the real ones
are padding with scale 0.
"""

import torch
from torch import Tensor

from .. import ops
from ..loading.weights import BlockShape, ExitLayerWeights
from ..ops import TILE_ROWS

PAD = -1  # in an order: a row of padding

Quantised = tuple[Tensor, Tensor, Tensor]  # q uint8 [N, K], scale and zero fp16 [N, groups]


def rotary_pair_order(heads: int, head_dim: int, rotary_dim: int) -> Tensor:
    """Natural row of each packed row of Q or K; PAD past the last one.

    Pairs go head by head: first the dims that rotate together, (i, i + rotary_dim / 2), then the dims
    that pass through, (rotary_dim + 2 j, rotary_dim + 2 j + 1). Pair p has the packed rows
    16 (p / 8) + p % 8 and 8 below it.
    """
    dims = torch.arange(head_dim)
    rotated, passed = dims[:rotary_dim].view(2, -1), dims[rotary_dim:].view(-1, 2).T
    first, second = torch.cat([rotated, passed], dim=1)
    starts = torch.arange(heads)[:, None] * head_dim
    return _pair_order((starts + first).flatten(), (starts + second).flatten())


def gate_up_order(intermediate_size: int) -> Tensor:
    """Row in [gate; up] of each packed row: tile t has gate rows 8 t .. 8 t + 7, then the same up rows."""
    gate = torch.arange(intermediate_size)
    return _pair_order(gate, intermediate_size + gate)


def natural_order(out_features: int) -> Tensor:
    """The rows as they are, padded to a multiple of 16."""
    return _padded(torch.arange(out_features), TILE_ROWS)


def qkv_order(shape: BlockShape) -> Tensor:
    """Row in [q; k; v] of each packed row: rotary pairs of Q, then of K, then V, each padded to 16 rows."""
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    q = rotary_pair_order(heads, shape.head_dim, shape.rotary_dim)
    k = rotary_pair_order(kv_heads, shape.head_dim, shape.rotary_dim)
    v = natural_order(kv_heads * shape.head_dim)
    k_start = heads * shape.head_dim
    v_start = k_start + kv_heads * shape.head_dim
    return torch.cat([q, torch.where(k == PAD, PAD, k_start + k), torch.where(v == PAD, PAD, v_start + v)])


def _pair_order(first: Tensor, second: Tensor) -> Tensor:
    """Eight of first, then their eight partners of second, and so on."""
    pairs = [_padded(rows, TILE_ROWS // 2).view(-1, TILE_ROWS // 2) for rows in (first, second)]
    return torch.stack(pairs, dim=1).flatten()


def _padded(rows: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, -len(rows) % multiple), value=PAD)


def pack_exit_layer(quantised: dict[str, Quantised], shape: BlockShape) -> ExitLayerWeights:
    """Packs the (q, scale, zero) of a block's seven projections, by their names in a checkpoint."""

    def packed(names: tuple[str, ...], order: Tensor) -> Tensor:
        parts = [torch.cat(part) for part in zip(*(quantised[name] for name in names), strict=True)]
        order = order.to(parts[0].device)
        return ops.pack_w4(*(_in_order(part, order) for part in parts))

    return ExitLayerWeights(
        qkv_proj=packed(("q_proj", "k_proj", "v_proj"), qkv_order(shape)),
        o_proj=packed(("o_proj",), natural_order(shape.hidden_size)),
        gate_up_proj=packed(("gate_proj", "up_proj"), gate_up_order(shape.intermediate_size)),
        down_proj=packed(("down_proj",), natural_order(shape.hidden_size)),
    )


def _in_order(part: Tensor, order: Tensor) -> Tensor:
    rows = part[order.clamp_min(0)]
    rows[order == PAD] = 0
    return rows


def split_qkv(
    packed: Tensor, shape: BlockShape, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """The dense Q, K and V of an exit layer's qkv_proj, rows in natural order."""
    order = qkv_order(shape)
    dense = ops.dequantize_w4(packed, len(order), shape.hidden_size, dtype)
    kv = shape.num_key_value_heads * shape.head_dim
    return _natural(dense, order).split([shape.num_attention_heads * shape.head_dim, kv, kv])


def split_gate_up(
    packed: Tensor, shape: BlockShape, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The dense gate and up of an exit layer's gate_up_proj, 8 rows per tile: zeros past the real ones."""
    tiles = packed.shape[0]
    dense = ops.dequantize_w4(packed, TILE_ROWS * tiles, shape.hidden_size, dtype)
    gate, up = dense.view(tiles, 2, TILE_ROWS // 2, shape.hidden_size).unbind(1)
    return gate.flatten(0, 1), up.flatten(0, 1)


def _natural(dense: Tensor, order: Tensor) -> Tensor:
    """Undoes an order: the real rows, each at its natural place."""
    packed_rows = torch.argsort(order)[int((order == PAD).sum()) :]
    return dense[packed_rows.to(dense.device)]
