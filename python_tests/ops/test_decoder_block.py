"""decoder_block and exit_layer against the reference, every buffer compared; the rules of a step."""

import pytest
import torch
from blocks import DTYPES, SHAPES, Block, Shape, assert_close, each_isa, int32

from river_ext import ops, reference

LAYERS = ["decoder_block", "exit_layer"]


@pytest.fixture(params=each_isa())
def isa(request):
    ops._C.set_cpu_isa(request.param)
    yield request.param
    ops._C.set_cpu_isa(each_isa()[0])


def poison_unread(caches, slots, positions):
    """NaN wherever no row may look: other slots, and positions past each slot's last row."""
    for cache in caches:
        keep = torch.zeros(cache.shape[0], cache.shape[2], dtype=torch.bool)
        for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
            if slot >= 0:
                keep[slot, :position] = True
        for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
            if slot >= 0:
                keep[slot, position] = False  # about to be written
        cache.masked_fill_(~keep[:, None, :, None], float("nan"))


def check(block, layer, rows, slots, positions, **options):
    hidden, caches = block.random(rows, block.shape.hidden_size), block.caches()
    poison_unread(caches, slots, positions)
    expected_caches = [c.clone() for c in caches]
    out, similarity = block.run(ops, layer, hidden, caches, slots, positions, **options)
    expected, expected_similarity = block.run(
        reference, layer, hidden, expected_caches, slots, positions, **options
    )
    assert_close(out, expected, block.dtype, "hidden")
    assert (similarity - expected_similarity).abs().max() <= {2: 0.01, 4: 1e-5}[block.dtype.itemsize]
    for name, actual, wanted in zip("kv", caches, expected_caches, strict=True):
        nan = wanted.isnan()
        assert torch.equal(actual.isnan(), nan), f"{name}_cache written in the wrong place"
        assert_close(actual[~nan], wanted[~nan], block.dtype, f"{name}_cache")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("layer", LAYERS)
def test_equals_reference(layer, shape, dtype, isa):
    block = Block(shape, dtype)
    last = shape.max_len - 1
    check(block, layer, 1, int32([3]), int32([last]))
    check(block, layer, 8, int32([8, 1, 1, -1, 0, 1, 4, 5]), int32([0, 6, 5, 3, last, 7, 17, 1]))


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("layer", LAYERS)
def test_every_number_of_rows(layer, rows):
    block = Block(SHAPES["gqa"], torch.bfloat16)
    check(block, layer, rows, int32(list(range(rows))), int32([5 * r for r in range(rows)]))


@pytest.mark.parametrize("layer", LAYERS)
def test_options(layer):
    block = Block(SHAPES["gqa"], torch.float32)
    s = block.shape
    valid = torch.rand(s.slots, s.max_len, generator=block.generator) < 0.5
    slots, positions = int32([5, 0, 7]), int32([0, 40, 47])
    check(block, layer, 3, slots, positions, sliding_window=5)
    check(block, layer, 3, slots, positions, kv_valid=valid)
    check(block, layer, 3, slots, positions, kv_valid=torch.zeros_like(valid))
    check(block, layer, 3, slots, positions, softmax_scale=0.3)
    for multiplier in (0.22, 3.0, 0.0, -1.5):
        check(block, layer, 3, slots, positions, residual_multiplier=multiplier)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_batch_invariance(layer, dtype, isa):
    """A row's bits depend on its own slot and position only: any T, any neighbours, any place in the step."""
    block = Block(SHAPES["long context"], dtype)
    hidden, caches = block.random(8, block.shape.hidden_size), block.caches()
    slots, positions = list(range(8)), [0, 255, 256, 699, 17, 63, 64, 511]
    alone = []
    for row in range(8):
        own = [c.clone() for c in caches]
        out, similarity = block.run(
            ops, layer, hidden[row : row + 1], own, int32([slots[row]]), int32([positions[row]])
        )
        alone.append((out[0], similarity[0], *(c[slots[row], :, positions[row]] for c in own)))
    generator = torch.Generator().manual_seed(1)
    for rows in range(2, 9):
        for _ in range(3):
            chosen = torch.randperm(8, generator=generator)[:rows].tolist()
            inactive = set(chosen[: rows // 3])
            own = [c.clone() for c in caches]
            out, similarity = block.run(
                ops, layer, hidden[chosen], own,
                int32([-1 if r in inactive else slots[r] for r in chosen]),
                int32([positions[r] for r in chosen]),
            )  # fmt: skip
            for i, row in enumerate(chosen):
                if row in inactive:
                    assert torch.equal(out[i], hidden[row])
                    assert torch.equal(own[0][slots[row]], caches[0][slots[row]])
                    continue
                got = (out[i], similarity[i], *(c[slots[row], :, positions[row]] for c in own))
                assert all(torch.equal(a, b) for a, b in zip(got, alone[row], strict=True))


@pytest.mark.parametrize("layer", LAYERS)
def test_threads_do_not_matter(layer):
    block = Block(Shape(hidden_size=1024, intermediate_size=2048, max_len=600), torch.bfloat16)
    hidden, caches = block.random(3, 1024), block.caches()
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 5, 1):
        torch.set_num_threads(count)
        own = [c.clone() for c in caches]
        results.append((*block.run(ops, layer, hidden, own, int32([0, 1, 1]), int32([599, 300, 301])), *own))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layer", LAYERS)
def test_rows_of_one_sequence_see_each_other(layer):
    """K/V of all rows are written before any row attends: a step of 4 rows equals 4 steps of one."""
    block = Block(SHAPES["gqa"], torch.float32)
    hidden, caches = block.random(4, block.shape.hidden_size), block.caches()
    together, single = [c.clone() for c in caches], [c.clone() for c in caches]
    out, _ = block.run(ops, layer, hidden, together, int32([2, 2, 2, 2]), int32([10, 11, 12, 13]))
    for row in range(4):
        one, _ = block.run(ops, layer, hidden[row : row + 1], single, int32([2]), int32([10 + row]))
        assert torch.equal(one[0], out[row])
    assert all(torch.equal(a, b) for a, b in zip(together, single, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["odd sizes", "partial rotary, bias, multiplier", "pads everywhere"])
@pytest.mark.parametrize("layer", LAYERS)
def test_any_number_of_rows_gives_the_same_bits(layer, shape, dtype, isa):
    """Rows of a prompt, with some of other slots and inactive ones between, all at once and in few calls."""
    block = Block(SHAPES[shape], dtype)
    last = block.shape.max_len
    places = [(3, p) for p in range(last)] + [(-1, 0), (8, 0), (8, 1), (-1, 7), (0, 5)]
    slots, positions = (int32(list(values)) for values in zip(*places, strict=True))
    hidden, before = block.random(len(places), block.shape.hidden_size), block.caches()
    results = []
    for rows in (1, 3, 8, 9, 37, len(places)):
        caches = [c.clone() for c in before]
        parts = [t.split(rows) for t in (hidden, slots, positions)]
        outs = [block.run(ops, layer, part, caches, *place) for part, *place in zip(*parts, strict=True)]
        results.append([torch.cat(tensors) for tensors in zip(*outs, strict=True)] + caches)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("layer", LAYERS)
def test_many_rows_equal_the_reference(layer, isa):
    block = Block(SHAPES["gqa"], torch.bfloat16)
    last = block.shape.max_len
    check(block, layer, 2 * last, int32([7] * last + [2] * last), int32([*range(last), *range(last)]))


@pytest.mark.parametrize("layer", LAYERS)
def test_all_rows_inactive(layer):
    block = Block(SHAPES["gqa"], torch.bfloat16)
    hidden, caches = block.random(2, block.shape.hidden_size), block.caches()
    before = [c.clone() for c in caches]
    out, _ = block.run(ops, layer, hidden, caches, int32([-1, -1]), int32([-5, 10**6]))
    assert torch.equal(out, hidden)
    assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))


BAD_ARGUMENTS = {
    "rows": (
        dict(hidden=torch.zeros(0, 128)),
        r"hidden has 0 rows, expected 1 to 8 on CUDA, 1 to 2\^30 - 1 on the CPU",
    ),
    "hidden dtype": (dict(hidden=torch.zeros(2, 128, dtype=torch.float64)), "hidden is float64"),
    "hidden size": (dict(hidden=torch.zeros(2, 100)), "hidden_size is 100, expected a multiple of 64"),
    "slot": (dict(slots=int32([0, 9])), r"slots\[1\] is 9, expected -1 to 8"),
    "position": (dict(positions=int32([48, 0])), r"positions\[0\] is 48, expected 0 to 47"),
    "negative position": (dict(positions=int32([-1, 0])), r"positions\[0\] is -1"),
    "same place": (
        dict(slots=int32([1, 1]), positions=int32([3, 3])),
        "rows 0 and 1 are both at slot 1, position 3",
    ),
    "same place, rows apart": (
        dict(hidden=torch.zeros(4, 128), slots=int32([1, 0, -1, 1]), positions=int32([3, 3, 3, 3])),
        "rows 0 and 3 are both at slot 1, position 3",
    ),
    "slots dtype": (dict(slots=torch.zeros(2, dtype=torch.int64)), "slots is int64, expected int32"),
    "heads": (dict(num_attention_heads=3), "num_attention_heads is 3, expected a multiple"),
    "eps": (dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "window": (dict(sliding_window=0), "sliding_window is 0, expected at least 1"),
    "scale": (dict(softmax_scale=float("inf")), "softmax_scale is inf"),
    "multiplier": (dict(residual_multiplier=float("nan")), "residual_multiplier is nan, expected a finite"),
    "large multiplier": (dict(residual_multiplier=1e39), "residual_multiplier is 1e\\+39, expected a finite"),
    "short tables": (dict(cos=torch.zeros(47, 16)), "cos has shape"),
    "cache layout": (dict(k_cache=torch.zeros(9, 2, 32, 48).transpose(2, 3)), "k_cache is not contiguous"),
    "cache shape": (dict(v_cache=torch.zeros(9, 2, 47, 32)), "v_cache has shape"),
    "bias": (dict(q_bias=torch.zeros(5)), r"q_bias has shape \[5\], expected \[128\]"),
    "one norm": (dict(k_norm=torch.ones(32)), "q_norm is None beside a k_norm, expected both or none"),
    "the other norm": (dict(q_norm=torch.ones(32)), "k_norm is None beside a q_norm, expected both or none"),
    "valid": (dict(kv_valid=torch.zeros(9, 48)), "kv_valid is float32, expected bool"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_bad_arguments(layer, case):
    changes, message = BAD_ARGUMENTS[case]
    block = Block(SHAPES["gqa"], torch.float32)
    s = block.shape
    arguments = dict(
        hidden=torch.zeros(2, 128), k_cache=torch.zeros(s.slots, 2, 48, 32),
        v_cache=torch.zeros(s.slots, 2, 48, 32),
        slots=int32([0, 1]), positions=int32([0, 0]), cos=block.tables[0], sin=block.tables[1],
        num_attention_heads=4, rms_norm_eps=1e-5, input_layernorm=block.norms[0],
        post_attention_layernorm=block.norms[1],
    )  # fmt: skip
    arguments |= block.dense if layer == "decoder_block" else vars(block.packed)
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, layer)(**(arguments | changes))


def test_mismatched_weights():
    block = Block(SHAPES["gqa"], torch.float32)
    hidden, place = torch.zeros(1, 128), (int32([0]), int32([0]))
    block.dense["k_proj"] = torch.zeros(63, 128)
    with pytest.raises(RuntimeError, match=r"k_proj has shape \[63, 128\], expected \[64, 128\]"):
        block.run(ops, "decoder_block", hidden, block.caches(), *place)
    block.packed.down_proj = torch.zeros(8, 2, 576, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"down_proj has shape \[8, 2, 576\], expected \[8, 3, 576\]"):
        block.run(ops, "exit_layer", hidden, block.caches(), *place)


def test_large_negative_gates_close(isa):
    block = Block(SHAPES["gqa"], torch.float32)
    block.dense["gate_proj"].fill_(-1e34)
    arguments = block.random(1, 128).abs(), block.caches(), int32([0]), int32([3])
    expected = block.run(reference, "decoder_block", *arguments)[0]
    assert_close(block.run(ops, "decoder_block", *arguments)[0], expected, torch.float32, "hidden")
