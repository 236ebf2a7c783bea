"""Rows of one slot in decode_attention: one pass over the slot's cache, and each row's own bits."""

import emulated_ops
import pytest
import torch
from blocks import assert_close, int32
from emulated import SCHEDULES, Recorder, emulator

from river_ext import reference

SLOTS = [2, 0, 2, 2, -1, 2, 2, 0]
POSITIONS = [300, 63, 301, 70, 5, 319, 64, 299]


def inputs(rows, heads, kv_heads, head_dim, max_len, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(head_dim)
    query = torch.randn(rows, heads, head_dim, generator=g).to(dtype)
    return query, [torch.randn(3, kv_heads, max_len, head_dim, generator=g).to(dtype) for _ in range(2)]


def check_each_row_alone(kernels, query, caches, slots, positions, **options):
    """Bits, NaN included, of all rows together and of each row alone."""
    together = kernels.decode_attention(query, *caches, slots, positions, **options)
    for row in range(len(slots)):
        own = slice(row, row + 1)
        alone = kernels.decode_attention(query[own], *caches, slots[own], positions[own], **options)[0]
        assert torch.equal(alone.isnan(), together[row].isnan()), row
        assert torch.equal(alone.nan_to_num(), together[row].nan_to_num()), row
    return together


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, dtype",
    [
        (1, 1, 64, torch.float16),
        (8, 2, 80, torch.bfloat16),
        (3, 1, 128, torch.float16),
        (7, 1, 24, torch.bfloat16),
        (2, 1, 256, torch.bfloat16),
        (16, 1, 8, torch.bfloat16),
    ],
)
def test_a_row_does_not_depend_on_the_others(kernels, heads, kv_heads, head_dim, dtype):
    query, caches = inputs(8, heads, kv_heads, head_dim, 320, dtype)
    valid = torch.rand(3, 320, generator=torch.Generator().manual_seed(1)) < 0.7
    for options in ({}, {"sliding_window": 67}, {"kv_valid": valid}):
        out = check_each_row_alone(kernels, query, caches, int32(SLOTS), int32(POSITIONS), **options)
        expected = reference.decode_attention(query, *caches, int32(SLOTS), int32(POSITIONS), **options)
        assert_close(out, expected, dtype, "out")


def test_contexts_that_are_cut_in_other_ways(kernels):
    """Rows around the positions where splits grow."""
    query, caches = inputs(8, 2, 1, 32, 2100)
    slots, positions = int32([1] * 8), int32([1023, 1025, 2047, 2049, 1024, 2048, 1022, 2046])
    out = check_each_row_alone(kernels, query, caches, slots, positions)
    assert_close(out, reference.decode_attention(query, *caches, slots, positions), torch.bfloat16, "out")


@pytest.mark.parametrize("window", [None, 40])
def test_what_a_row_does_not_see_may_be_nan(kernels, window):
    """Though other rows of its slot see it."""
    query, caches = inputs(8, 4, 2, 64, 320)
    for cache, place in zip(caches, (301, 68), strict=True):
        cache[2, :, place] = float("nan")
    out = check_each_row_alone(kernels, query, caches, int32(SLOTS), int32(POSITIONS), sliding_window=window)
    for row, (slot, position) in enumerate(zip(SLOTS, POSITIONS, strict=True)):
        sees = any(slot == 2 and p <= position < p + (window or 320) for p in (301, 68))
        assert out[row].isnan().all() == sees and out[row].isnan().any() == sees, row


def positions_loaded(monkeypatch, schedule, heads, slots, positions, **options):
    """How many positions of K, and of V, the kernel loads for each KV head."""
    query, caches = inputs(len(slots), heads, 2, 64, 1500)
    recorder = Recorder()
    monkeypatch.setattr(emulated_ops, "emulate", recorder)
    emulated_ops.decode_attention(query, *caches, int32(slots), int32(positions), **options)
    emulator().watch([(cache.data_ptr(), cache.nbytes) for cache in caches])
    recorder.run(SCHEDULES[schedule])
    loaded = [bytes_ / (2 * 64 * 2) for bytes_ in emulator().loaded()]
    emulator().watch([])
    return loaded


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rows_of_a_slot_read_its_cache_once(monkeypatch, schedule):
    def loaded(*args, **options):
        return positions_loaded(monkeypatch, schedule, *args, **options)

    assert loaded(8, [1], [700]) == [701, 701]
    assert loaded(8, [1] * 5, [700, 698, 696, 699, 697]) == [701, 701]
    assert loaded(8, [1] * 8, list(range(1293, 1301))) == [1301, 1301]
    assert loaded(8, [1, 0, -1, 1, 0, 1], [700, 90, 5, 640, 91, 699]) == [701 + 92] * 2
    assert loaded(8, [1] * 3, [700, 702, 701], sliding_window=100) == [102, 102]
    assert loaded(2 * 16, [1] * 5, list(range(96, 101))) == [2 * 101] * 2  # 80 query heads, 40 in a pass
