"""decode_attention against the reference: groups, lengths around a split of the context, masks, many rows."""

import pytest
import torch
from blocks import DTYPES, assert_close, each_isa, int32

from river_ext import ops, reference


@pytest.fixture(params=each_isa())
def isa(request):
    ops._C.set_cpu_isa(request.param)
    yield request.param
    ops._C.set_cpu_isa(each_isa()[0])


def inputs(dtype, rows, heads=4, kv_heads=2, head_dim=64, max_len=600, slots=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, heads, head_dim, generator=g).to(dtype)
    caches = [torch.randn(slots, kv_heads, max_len, head_dim, generator=g).to(dtype) for _ in range(2)]
    return query, caches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim", [(4, 2, 64), (8, 1, 128), (3, 3, 96), (2, 2, 20), (6, 2, 256)]
)
def test_equals_reference(heads, kv_heads, head_dim, dtype, isa):
    query, caches = inputs(dtype, 8, heads, kv_heads, head_dim)
    slots, positions = int32([0, 1, 2, -1, 3, 4, 5, 1]), int32([0, 62, 63, 9, 64, 255, 256, 599])
    for row, slot in enumerate(slots.tolist()):
        if slot not in (-1, 1):
            for cache in caches:
                cache[slot, :, positions[row] + 1 :] = float("nan")
    out = ops.decode_attention(query, *caches, slots, positions)
    assert_close(out, reference.decode_attention(query, *caches, slots, positions), dtype, "out")
    assert (out[3] == 0).all()


@pytest.mark.parametrize("window", [1, 2, 255, 256, 257, 10**9])
def test_sliding_window(window):
    query, caches = inputs(torch.float32, 4)
    place = int32([0, 1, 2, 3]), int32([0, 255, 256, 599])
    options = dict(sliding_window=window, softmax_scale=0.2)
    out = ops.decode_attention(query, *caches, *place, **options)
    assert_close(out, reference.decode_attention(query, *caches, *place, **options), torch.float32, "out")


def test_kv_valid():
    query, caches = inputs(torch.bfloat16, 4)
    valid = torch.rand(8, 600, generator=torch.Generator().manual_seed(1)) < 0.3
    valid[7] = False
    valid[2] = False
    valid[2, 599] = True
    for cache in caches:
        cache.masked_fill_(~valid[:, None, :, None], float("nan"))
    place = int32([5, 0, 7, 2]), int32([300, 599, 599, 599])
    out = ops.decode_attention(query, *caches, *place, kv_valid=valid)
    assert_close(
        out, reference.decode_attention(query, *caches, *place, kv_valid=valid), torch.bfloat16, "out"
    )
    assert (out[2] == 0).all()
    assert torch.equal(out[3], caches[1][2, :, 599].repeat_interleave(2, 0))


def test_large_scores():
    query, caches = inputs(torch.float32, 1)
    for scale in (1e4, -1e4, 0.0):
        out = ops.decode_attention(query, *caches, int32([0]), int32([599]), softmax_scale=scale)
        expected = reference.decode_attention(query, *caches, int32([0]), int32([599]), softmax_scale=scale)
        assert_close(out, expected, torch.float32, "out")


# Of one slot in no order, around splits and blocks; of others; inactive ones
SLOTS = [6, 0, 6, 6, -1, 6, 2, 6, 6, 6, 2, -1, 6, 6, 6, 0]
POSITIONS = [300, 599, 301, 15, 7, 0, 511, 256, 255, 598, 512, 0, 16, 302, 254, 63]


def check_each_row_alone(rows, query, caches, slots, positions, **options):
    """Bits, NaN included, of all rows together and of each one of `rows` alone."""
    together = ops.decode_attention(query, *caches, slots, positions, **options)
    for row in rows:
        one = slice(row, row + 1)
        alone = ops.decode_attention(query[one], *caches, slots[one], positions[one], **options)
        assert torch.equal(alone[0].isnan(), together[row].isnan()), row
        assert torch.equal(alone[0].nan_to_num(), together[row].nan_to_num()), row
    return together


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim",
    [(2, 2, 64), (4, 2, 80), (6, 2, 96), (4, 1, 128), (10, 2, 20), (7, 1, 256), (8, 1, 36)],
)
def test_bits_do_not_depend_on_the_other_rows(heads, kv_heads, head_dim, dtype, isa):
    query, caches = inputs(dtype, len(SLOTS), heads, kv_heads, head_dim)
    places = int32(SLOTS), int32(POSITIONS)
    valid = torch.rand(8, 600, generator=torch.Generator().manual_seed(1)) < 0.7
    for options in ({}, {"sliding_window": 7}, {"sliding_window": 270}, {"kv_valid": valid}):
        together = check_each_row_alone(range(len(SLOTS)), query, caches, *places, **options)
        expected = reference.decode_attention(query, *caches, *places, **options)
        assert_close(together, expected, dtype, "out")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_row_does_not_see_may_be_nan(dtype, isa):
    """Though other rows of its slot see it."""
    query, caches = inputs(dtype, len(SLOTS))
    for cache, place in zip(caches, (301, 255), strict=True):
        cache[6, :, place] = float("nan")
    places = int32(SLOTS), int32(POSITIONS)
    for window in (None, 60):
        out = check_each_row_alone(range(len(SLOTS)), query, caches, *places, sliding_window=window)
        for row, (slot, position) in enumerate(zip(SLOTS, POSITIONS, strict=True)):
            sees = [slot == 6 and p <= position < p + (window or 600) for p in (301, 255)]
            assert out[row].isnan().all() == any(sees), row
            assert out[row].isnan().any() == any(sees), row


@pytest.mark.parametrize("kv_heads", [2, 16], ids=["splits are the pieces", "blocks are the pieces"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rows_of_prompts(dtype, kv_heads, isa):
    """More rows than a step has, of two slots, shuffled; also where no row sees anything of a whole split."""
    rows, g = 600, torch.Generator().manual_seed(2)
    query, caches = inputs(dtype, rows, kv_heads, kv_heads, 32, max_len=560)
    order = torch.randperm(rows, generator=g)
    slots = int32([3] * 550 + [1] * 50)[order]
    positions = int32(list(range(550)) + list(range(500, 550)))[order]
    valid = torch.rand(8, 560, generator=g) < 0.7
    valid[:, 250:520] = False
    for options in ({}, {"sliding_window": 100}, {"kv_valid": valid}):
        out = check_each_row_alone(range(0, rows, 29), query, caches, slots, positions, **options)
        expected = reference.decode_attention(query, *caches, slots, positions, **options)
        assert_close(out, expected, dtype, "out")


def test_bad_arguments():
    query, caches = inputs(torch.float32, 1)
    for arguments, message in [
        ((query[0], *caches, int32([0]), int32([0])), "query has 2 dimensions, expected 3"),
        ((query, *caches, int32([8]), int32([0])), r"slots\[0\] is 8"),
        ((query, *caches, int32([0]), int32([600])), r"positions\[0\] is 600, expected 0 to 599"),
        ((query[:, :3].contiguous(), *caches, int32([0]), int32([0])), "num_attention_heads is 3"),
        ((query[..., :32].contiguous(), *caches, int32([0]), int32([0])), "query has shape"),
        ((query.half(), *caches, int32([0]), int32([0])), "k_cache is float32, expected float16"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.decode_attention(*arguments)


def test_minus_infinity_in_a_whole_split():
    query, caches = inputs(torch.float32, 1, heads=1, kv_heads=1)
    query[:] = 1
    caches[0][0, :, :256] = float("-inf")
    out = ops.decode_attention(query, *caches, int32([0]), int32([299]))
    expected = reference.decode_attention(query, *caches, int32([0]), int32([299]))
    assert_close(out, expected, torch.float32, "out")


@pytest.mark.parametrize("place", [0, 255, 256, 598])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_that_a_row_sees_shows(dtype, place, isa):
    """Whichever split it is in. The other rows and KV heads are what they are without it."""
    query, caches = inputs(dtype, 3)
    places = int32([4, 0, 5]), int32([598, 598, place])
    clean = ops.decode_attention(query, *caches, *places)
    caches[0][4, 1, place, 3] = float("nan")
    out = ops.decode_attention(query, *caches, *places)
    assert out[0, 2:].isnan().all()
    assert torch.equal(out.isnan(), reference.decode_attention(query, *caches, *places).isnan())
    assert torch.equal(out[~out.isnan()], clean[~out.isnan()])
