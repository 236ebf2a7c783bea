"""The W4 format: bit layout, fragments of the tensor core instruction, row orders, padding."""

import struct
from dataclasses import replace

import pytest
import torch

from river_ext import ops, reference
from river_ext.quant import w4

# DESIGN section 4: (lowest bit, row after g, column after 16 t + 4 j) of each nibble of word wj
BIT_TABLE = [
    (28, 8, 3), (24, 8, 1), (20, 0, 3), (16, 0, 1),
    (12, 8, 2), (8, 8, 0), (4, 0, 2), (0, 0, 0),
]  # fmt: skip
# (out_features, in_features, group_size): whole tiles, ragged rows, ragged columns, larger groups
SIZES = [
    (16, 64, 64),
    (48, 256, 64),
    (5, 64, 64),
    (16, 33, 64),
    (37, 200, 64),
    (16, 128, 128),
    (21, 300, 128),
]
# (heads, kv heads, head_dim, rotary_dim, intermediate_size): usual, odd sizes, partial rotary
SHAPES = [(2, 1, 64, 64, 128), (3, 1, 6, 6, 100), (4, 2, 16, 6, 24), (3, 3, 10, 2, 7)]


def quantised(out_features, in_features, group_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-in_features // group_size)
    q = torch.randint(0, 16, (out_features, in_features), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(out_features, groups, generator=generator) + 0.1).half()
    zero = (15 * torch.rand(out_features, groups, generator=generator)).half()
    return q, scale, zero


def block_shape(heads, kv_heads, head_dim, rotary_dim, intermediate_size):
    return w4.BlockShape(64, heads, kv_heads, head_dim, rotary_dim, intermediate_size)


def slow_pack(q, scale, zero, group_size):
    """The bit table, one nibble at a time."""
    out_features, in_features = q.shape
    q, scale, zero = q.tolist(), scale.tolist(), zero.tolist()
    packed = []
    for n in range(0, out_features, 16):
        packed.append([])
        for k in range(0, in_features, 64):
            tile = bytearray(576)
            for lane in range(32):
                g, t = lane // 4, lane % 4
                for j in range(4):
                    word = 0
                    for bit, below, right in BIT_TABLE:
                        row, column = n + g + below, k + 16 * t + 4 * j + right
                        if row < out_features and column < in_features:
                            word |= q[row][column] << bit
                    struct.pack_into("<I", tile, 16 * lane + 4 * j, word)
            for row in range(n, min(n + 16, out_features)):
                group = k // group_size
                struct.pack_into("<ee", tile, 512 + 4 * (row - n), scale[row][group], zero[row][group])
            packed[-1].append(list(tile))
    return torch.tensor(packed, dtype=torch.uint8)


@pytest.mark.parametrize("pack", [reference.pack_w4, ops.pack_w4], ids=["reference", "ops"])
@pytest.mark.parametrize("size", SIZES)
def test_packed_bits(pack, size):
    q, scale, zero = quantised(*size)
    packed = pack(q, scale, zero)
    assert packed.shape == ops.packed_shape(*size[:2])
    assert torch.equal(packed, slow_pack(q, scale, zero, size[2]))


@pytest.mark.parametrize("backend", [reference, ops], ids=["reference", "ops"])
@pytest.mark.parametrize("size", SIZES)
def test_unpack_and_dequantize(backend, size):
    out_features, in_features, group_size = size
    q, scale, zero = quantised(*size)
    packed = backend.pack_w4(q, scale, zero)
    for part, unpacked in zip((q, scale, zero), backend.unpack_w4(packed, *size), strict=True):
        assert torch.equal(part, unpacked)
    scale, zero = (m.float().repeat_interleave(group_size, 1)[:, :in_features] for m in (scale, zero))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        dense = backend.dequantize_w4(packed, out_features, in_features, dtype)
        assert torch.equal(dense, ((q.float() - zero) * scale).to(dtype))


def test_tile_feeds_mma_m16n8k16():
    """What a lane reads of a tile and of the activations is operands A and B of four mma steps.

    Fragments as in the PTX manual, with t = threadID_in_group. A: registers a0..a3 hold rows groupID, + 8,
    + 0, + 8 and columns 2 t + (0, 1), + 0, + 8, + 8. B: b0, b1 hold rows 2 t + (0, 1), + 8 of column groupID.
    """
    q, scale, zero = quantised(16, 64, 64)
    x = torch.randint(-8, 8, (8, 64), generator=torch.Generator().manual_seed(1))  # 8 rows in flight
    tile = bytes(ops.pack_w4(q, scale, zero)[0, 0].tolist())
    total = torch.zeros(16, 8, dtype=torch.int64)
    for step in range(4):
        a, b = torch.full((16, 16), -1), torch.zeros(16, 8, dtype=torch.int64)
        for lane in range(32):
            group_id, in_group = lane // 4, lane % 4
            (word,) = struct.unpack_from("<I", tile, 16 * lane + 4 * step)
            pairs = [(word >> 4 * i) & 0x000F000F for i in range(4)]
            registers = {"a0": pairs[0], "a2": pairs[1], "a1": pairs[2], "a3": pairs[3]}
            for name, row, column in (("a0", 0, 0), ("a1", 8, 0), ("a2", 0, 8), ("a3", 8, 8)):
                low, high = registers[name] & 0xFFFF, registers[name] >> 16
                a[group_id + row, 2 * in_group + column] = low
                a[group_id + row, 2 * in_group + column + 1] = high
            activations = x[group_id, 16 * in_group : 16 * in_group + 16][4 * step : 4 * step + 4]
            b[2 * in_group : 2 * in_group + 2, group_id] = activations[:2]  # b0
            b[2 * in_group + 8 : 2 * in_group + 10, group_id] = activations[2:]  # b1
        assert a.min() >= 0  # every element of the fragment is set
        total += a @ b
    assert torch.equal(total, q.long() @ x.T)


@pytest.mark.parametrize("shape", SHAPES)
def test_rotary_pair_order(shape):
    heads, _, head_dim, rotary_dim, _ = shape
    order = w4.rotary_pair_order(heads, head_dim, rotary_dim).tolist()
    pairs = []
    for head in range(heads):
        start = head * head_dim
        pairs += [(start + i, start + i + rotary_dim // 2) for i in range(rotary_dim // 2)]
        pairs += [(start + i, start + i + 1) for i in range(rotary_dim, head_dim, 2)]
    expected = [w4.PAD] * (16 * -(-len(pairs) // 8))
    for p, (first, second) in enumerate(pairs):
        expected[16 * (p // 8) + p % 8], expected[16 * (p // 8) + p % 8 + 8] = first, second
    assert order == expected


@pytest.mark.parametrize("inner", [8, 7, 100, 384])
def test_gate_up_order(inner):
    order = w4.gate_up_order(inner)
    assert len(order) == 16 * -(-inner // 8)
    for j in range(inner):
        assert order[16 * (j // 8) + j % 8] == j  # gate
        assert order[16 * (j // 8) + j % 8 + 8] == inner + j  # up
    assert (order == w4.PAD).sum() == len(order) - 2 * inner


@pytest.mark.parametrize("shape", SHAPES)
def test_qkv_order_pads_each_segment(shape):
    shape = block_shape(*shape)
    sizes = [
        rows for name, (rows, _) in shape.projections().items() if name in ("q_proj", "k_proj", "v_proj")
    ]
    order = w4.qkv_order(shape)
    start = natural = 0
    for size in sizes:
        segment = order[start : start + 16 * -(-size // 16)]
        assert sorted(segment[segment != w4.PAD].tolist()) == list(range(natural, natural + size))
        start, natural = start + len(segment), natural + size
    assert start == len(order)


def packed_layer(shape, group_size=64):
    parts = {
        name: quantised(*size, group_size, seed)
        for seed, (name, size) in enumerate(shape.projections().items())
    }
    dense = {
        name: reference.dequantize_w4(reference.pack_w4(*parts[name]), *size, torch.float32)
        for name, size in shape.projections().items()
    }
    return w4.pack_exit_layer(parts, shape), dense


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_split_undoes_the_orders(shape, group_size):
    shape = replace(block_shape(*shape), hidden_size=192)
    layer, dense = packed_layer(shape, group_size)
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    splits = (
        (w4.split_qkv(layer.qkv_proj, shape), w4.split_gate_up(layer.gate_up_proj, shape)),
        (
            reference.split_qkv(layer.qkv_proj, 192, heads, kv_heads, shape.head_dim, shape.rotary_dim),
            reference.split_gate_up(layer.gate_up_proj, 192),
        ),
    )
    for qkv, gate_up in splits:
        for name, weight in zip(("q_proj", "k_proj", "v_proj"), qkv, strict=True):
            assert torch.equal(weight, dense[name])
        inner = shape.intermediate_size
        for name, weight in zip(("gate_proj", "up_proj"), gate_up, strict=True):
            assert torch.equal(weight[:inner], dense[name])
            assert not weight[inner:].any()
    half = w4.split_qkv(layer.qkv_proj, shape, torch.float16)[0]
    assert torch.equal(half, dense["q_proj"].half())


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_sizes_and_padding(shape):
    shape = block_shape(*shape)
    layer, _ = packed_layer(shape)
    sizes = shape.projections()
    real_rows = {
        "qkv_proj": sum(sizes[name][0] for name in ("q_proj", "k_proj", "v_proj")),
        "o_proj": 64,
        "gate_up_proj": 2 * shape.intermediate_size,
        "down_proj": 64,
    }
    for name, (rows, columns) in shape.packed().items():
        packed = getattr(layer, name)
        assert packed.shape == (rows // 16, columns // 64, 576)
        scale = reference.unpack_w4(packed, rows, columns)[1]
        assert int((scale == 0).all(1).sum()) == shape.padding()[name][0] == rows - real_rows[name]
    assert shape.padding()["o_proj"][1] == -sizes["o_proj"][1] % 64
    assert shape.padding()["down_proj"][1] == -shape.intermediate_size % 64


@pytest.mark.parametrize("shape", SHAPES)
def test_exit_layer_is_the_block_with_dequantised_weights(shape):
    shape = block_shape(*shape)
    layer, dense = packed_layer(shape)
    generator = torch.Generator().manual_seed(7)

    def random(*size):
        return torch.randn(*size, generator=generator)

    hidden, positions = random(3, 64), torch.tensor([4, 0, 2], dtype=torch.int32)
    slots = torch.arange(3, dtype=torch.int32)
    angles = random(8, shape.rotary_dim // 2)
    outputs = []
    for is_exit in (False, True):
        generator.manual_seed(8)
        cache = [random(3, shape.num_key_value_heads, 8, shape.head_dim) for _ in range(2)]
        rest = (*cache, slots, positions, angles.cos(), angles.sin(), shape.num_attention_heads, 1e-5)
        norm = torch.ones(64)
        if is_exit:
            parts = (layer.qkv_proj, layer.o_proj, norm, layer.gate_up_proj, layer.down_proj)
            result = reference.exit_layer(hidden, norm, *parts, *rest)
        else:
            qkv = (dense[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
            mlp = (dense[name] for name in ("gate_proj", "up_proj", "down_proj"))
            result = reference.decoder_block(hidden, norm, *qkv, norm, *mlp, *rest)
        outputs.append([*result, *cache])
    for backbone, exit in zip(*outputs, strict=True):
        torch.testing.assert_close(exit, backbone, rtol=1e-5, atol=1e-5)
