"""The CUDA kernels of every op against the reference, every buffer compared: emulated, and on a real GPU.

On the emulated GPU each call runs under all schedules of emulated.py (orders, copy timings, SM counts, bulk
copies and cp.async) and must give the same bits. CUDA kernels take head_dim, num_attention_heads * head_dim
and intermediate_size in multiples of 8.
"""

import pytest
import torch
from blocks import SHAPES, Block, Shape, assert_close, check_magnitudes, int32
from chains import Chain, check_rows_alone, check_with_reference
from emulated import VARIANT
from heads import KINDS, Head

from river_ext import ops, reference

DTYPES = [torch.bfloat16, torch.float16]
LAYERS = ["decoder_block", "exit_layer"]
LONG = 4352  # hidden_size: some lanes add up two chunks of a row
KERNEL_SHAPES = {name: shape for name, shape in SHAPES.items() if shape.head_dim % 8 == 0} | {
    "pads everywhere": Shape(64, 3, 1, head_dim=24, intermediate_size=88, rotary_dim=24, bias=True),
    "head_dim 96": Shape(hidden_size=192, num_key_value_heads=1, head_dim=96, rotary_dim=48),
    "head_dim 128": Shape(num_key_value_heads=4, head_dim=128, rotary_dim=128, qk_norm=True),
    "head_dim 256": Shape(num_attention_heads=2, num_key_value_heads=1, head_dim=256, rotary_dim=256),
    "heads across strips": Shape(
        192,
        3,
        1,
        head_dim=40,
        intermediate_size=88,
        rotary_dim=24,
        bias=True,
        qk_norm=True,
        residual_multiplier=0.3,
    ),
}


def check(kernels, block, layer, slots, positions, **options):
    hidden, caches = block.random(len(slots), block.shape.hidden_size), block.caches()
    expected_caches = [c.clone() for c in caches]
    place = int32(slots), int32(positions)
    out, similarity = block.run(kernels, layer, hidden, caches, *place, **options)
    expected, expected_similarity = block.run(reference, layer, hidden, expected_caches, *place, **options)
    assert_close(out, expected, block.dtype, "hidden")
    assert (similarity - expected_similarity).abs().max() <= 0.01
    for name, actual, wanted in zip("kv", caches, expected_caches, strict=True):
        assert_close(actual, wanted, block.dtype, f"{name}_cache")
    return out, similarity, *caches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", KERNEL_SHAPES.values(), ids=KERNEL_SHAPES.keys())
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(kernels, layer, shape, dtype):
    block, last = Block(shape, dtype), shape.max_len - 1
    check(kernels, block, layer, [3], [last])
    check(kernels, block, layer, [8, 1, 1, -1, 0, 1, 4, 5], [0, 6, 5, 3, last, 7, 17, 1])


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_options(kernels, layer):
    block = Block(SHAPES["gqa"], torch.bfloat16)
    valid = torch.rand(block.shape.slots, block.shape.max_len, generator=block.generator) < 0.5
    for options in ({"sliding_window": 5}, {"kv_valid": valid}, {"softmax_scale": 0.3}):
        check(kernels, block, layer, [5, 0, 7], [0, 40, 47], **options)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_row_does_not_depend_on_the_others(kernels, layer):
    block = Block(SHAPES["odd sizes"], torch.bfloat16)
    hidden, caches = block.random(8, block.shape.hidden_size), block.caches()
    places = int32(list(range(8))), int32([0, 7, 15, 16, 31, 32, 46, 47])
    together = block.run(kernels, layer, hidden, [c.clone() for c in caches], *places)
    for rows in (slice(2, 3), slice(5, 8)):
        own = [c.clone() for c in caches]
        part = block.run(kernels, layer, hidden[rows], own, *(p[rows].contiguous() for p in places))
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, together, strict=True))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_place_outside_of_the_cache_is_an_inactive_row(kernels, layer):
    """On a GPU nobody can refuse it in time."""
    block = Block(SHAPES["gqa"], torch.bfloat16)
    slots, length = block.shape.slots, block.shape.max_len
    places = int32([slots, 2, -7, 1, 2**31 - 1]), int32([0, length, 3, -1, 2**31 - 1])
    hidden, caches = block.random(5, block.shape.hidden_size), block.caches()
    before = [c.clone() for c in caches]
    out, similarity = block.run(kernels, layer, hidden, caches, *places)
    assert torch.equal(out, hidden) and (similarity > 0.999).all()
    assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))


class Decision:
    """What dual_layer decides from, at layer 2 of 4. hidden lies about 45 degrees from previous.

    A number stands for all rows. before, own: what `exited` says of the layer before, and of this one.
    """

    def __init__(self, block, rows, thresholds=0.0, min_layers=1, limit=4, before=0, own=0, index=2):
        def by_row(values):
            return values if isinstance(values, list) else [values] * rows

        self.previous = block.random(rows, block.shape.hidden_size)
        self.hidden = self.previous + block.random(rows, block.shape.hidden_size)
        self.exited = int32([by_row(value) for value in (0, before, own, 0)])
        self.similarities = torch.full((4, rows), -7.0)
        self.rule = [torch.tensor(by_row(thresholds)), int32(by_row(min_layers)), int32(by_row(limit))]
        self.index = index

    def args(self):
        return [self.index, self.previous if self.index else None, *self.rule, self.exited, self.similarities]


DECISIONS = {  # name: (arguments of Decision, exits)
    "similar enough": ({"thresholds": 0.2}, True),
    "not similar enough": ({"thresholds": 0.95}, False),
    "not similar enough, wrong guess": ({"thresholds": 0.95, "own": 1}, False),
    "too early": ({"thresholds": -2.0, "min_layers": 3}, False),
    "never": ({"thresholds": float("inf")}, False),
    "has left before": ({"thresholds": float("inf"), "before": 1}, True),
    "limit": ({"thresholds": float("inf"), "limit": 2}, True),
    "first layer": ({"index": 0, "own": 1}, False),
    "first layer of the pure river": ({"index": 0, "limit": 0}, True),
}


@pytest.mark.parametrize("case", DECISIONS)
@pytest.mark.parametrize("shape", ["odd sizes", "multi-query, qk norm, query scale"])
def test_dual_layer_runs_the_layer_that_it_decides_on(kernels, shape, case):
    """The same bits as that layer alone gives, whatever was guessed while its predecessors ran."""
    options, exits = DECISIONS[case]
    block = Block(KERNEL_SHAPES[shape], torch.bfloat16)
    for slots, positions in (([3], [5]), ([8, 1, 1, -1, 0], [0, 6, 5, 3, 47])):
        decision = Decision(block, len(slots), **options)
        places, caches = (int32(slots), int32(positions)), block.caches()
        expected_caches = [c.clone() for c in caches]
        out = block.run_dual(kernels, decision.args(), decision.hidden, caches, *places)
        layer = LAYERS[exits]
        expected, _ = block.run(kernels, layer, decision.hidden, expected_caches, *places)
        assert decision.exited[decision.index].tolist() == [exits and slot >= 0 for slot in slots]
        for what, actual, wanted in zip("okv", [out, *caches], [expected, *expected_caches], strict=True):
            assert torch.equal(actual, wanted), what
        similarity = kernels.state_similarity(decision.previous, decision.hidden)
        judged = decision.index > 0 and not options.get("before")
        for row, slot in enumerate(slots):
            if judged and slot >= 0:
                assert decision.similarities[decision.index - 1, row] == similarity[row]
            elif not judged:
                assert (decision.similarities == -7).all()


CHAIN_SHAPES = ["gqa", "pads everywhere", "heads across strips"]
PATHS = [
    (before, after, rows)
    for before in ("dense", "packed", "mixed")
    for after in ("dense", "packed", "mixed", "none active")
    for rows in (range(1, 9) if before == after == "mixed" else (8, 3))
]
if VARIANT == "sanitized":  # it looks for overruns, which no decision hides
    CHAIN_SHAPES, PATHS = CHAIN_SHAPES[2:], [path for path in PATHS if path[2] == 3]


@pytest.mark.parametrize(("before", "after", "rows"), PATHS)
def test_each_row_takes_its_own_path(kernels, before, after, rows):
    """The same bits as its layer alone gives, for every guess and every decision."""
    shape = "multi-query, qk norm, query scale" if rows % 2 else "odd sizes"
    block = Block(KERNEL_SHAPES[shape], torch.bfloat16, seed=rows)
    slots = [-1 if row % 4 == 2 or after == "none active" else 8 - row for row in range(rows)]
    positions = int32([(11 * row) % 48 for row in range(rows)])
    alternating, halves = [row % 3 % 2 for row in range(rows)], [(row + row // 4) % 2 for row in range(rows)]
    left = {"dense": [0] * rows, "packed": [1] * rows, "mixed": alternating}[before]
    exits = {"packed": [1] * rows, "mixed": halves}.get(after, [0] * rows)
    decision = Decision(block, rows, [-2.0 if e else 2.0 for e in exits], before=left, own=left[::-1])
    exits = [(e or was) and slot >= 0 for e, was, slot in zip(exits, left, slots, strict=True)]
    caches = block.caches()
    expected_caches = [c.clone() for c in caches]
    expected = decision.hidden.clone()
    for layer, flag in (LAYERS[0], False), (LAYERS[1], True):
        own = int32([slot if bool(e) is flag else -1 for slot, e in zip(slots, exits, strict=True)])
        y, _ = block.run(kernels, layer, decision.hidden, expected_caches, own, positions)
        expected = torch.where(own[:, None] >= 0, y, expected)
    out = block.run_dual(kernels, decision.args(), decision.hidden, caches, int32(slots), positions)
    assert decision.exited.tolist() == [[0] * rows, left, [int(e) for e in exits], [0] * rows]
    for what, actual, wanted in zip("okv", [out, *caches], [expected, *expected_caches], strict=True):
        assert torch.equal(actual, wanted), what
    similarities = torch.full((4, rows), -7.0)
    measured = [row for row in range(rows) if slots[row] >= 0 and not left[row]]
    similarity = kernels.state_similarity(decision.previous, decision.hidden)
    similarities[1, measured] = similarity[measured]
    assert torch.equal(decision.similarities, similarities)


@pytest.mark.parametrize("shape", CHAIN_SHAPES)
def test_a_row_of_a_chain_does_not_depend_on_the_others(kernels, shape):
    for rows in (4, 8):
        chain = Chain(KERNEL_SHAPES[shape], DTYPES[rows // 4 % 2], rows, seed=rows, layers=3)
        assert check_rows_alone(kernels, chain), "all rows took the same way"


@pytest.mark.parametrize("shape", CHAIN_SHAPES)
@pytest.mark.parametrize("together", [False, True])
def test_chains_agree_with_the_reference(kernels, together, shape):
    for dtype, rows in zip(DTYPES, (7, 2), strict=True):
        check_with_reference(kernels, Chain(KERNEL_SHAPES[shape], dtype, rows, seed=rows), together)


@pytest.mark.parametrize("together", [False, True])
def test_dual_layer_agrees_with_the_reference(kernels, together):
    block = Block(SHAPES["gqa"], torch.float16)
    for thresholds in ([0.2, 0.2, 0.2], [0.2, 0.99, 0.2], [0.2, 0.2, 0.99]):
        for slots in ([0, 1, 2], [0, -1, 2], [0, 1, -1], [-1, -1, -1]):
            ours, theirs = Decision(block, 3, thresholds), Decision(block, 3, thresholds)
            theirs.previous, theirs.hidden = ours.previous, ours.hidden
            caches = block.caches()
            expected_caches = [c.clone() for c in caches]
            place = int32(slots), int32([4, 5, 6])
            out = block.run_dual(kernels, ours.args(), ours.hidden, caches, *place, together=together)
            expected = block.run_dual(
                reference, theirs.args(), ours.hidden, expected_caches, *place, together=together
            )
            assert torch.equal(ours.exited, theirs.exited), (thresholds, slots)
            assert_close(out, expected, torch.float16, "hidden")
            for actual, wanted in zip(caches, expected_caches, strict=True):
                assert_close(actual, wanted, torch.float16, "cache")
            assert_close(ours.similarities, theirs.similarities, torch.float32, "similarities")


def advanced(kernels, drawn, state):
    """What advance makes of the state, by the kernels and by the reference."""
    results = []
    for module in (kernels, reference):
        written = {name: tensor.clone() for name, tensor in state.items()}
        module.advance(*drawn, *written.values())
        results.append(written)
    return results


def rows_in_flight(rows, layers, hidden_size, step, exited, g):
    """The state that advance starts from: every third row is inactive, and some draw their last token."""
    return {
        "hidden": torch.randn(rows, hidden_size, generator=g).bfloat16(),
        "slots": int32([row if row % 3 != 1 else -1 for row in range(rows)]),
        "positions": int32(list(range(10, 10 + rows))),
        "draw_positions": int32(list(range(11, 11 + rows))),
        "remaining": int32([1 + (row + step) % 3 for row in range(rows)]),
        "exited": int32(exited)[:, torch.arange(rows) % len(exited[0])].contiguous(),
        "similarities": torch.rand(layers, rows, generator=g),
        "step": int32([step]),
        "records": torch.full((3, 1 + 2 * rows + layers * rows), -9, dtype=torch.int32),
    }


EXITED = [  # by layer, and by row, again and again
    [[0], [0], [0], [0], [0]],
    [[1], [1], [1], [1], [1]],
    [[0], [0], [1], [1], [1]],
    [[0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 1], [1, 0, 1]],
    [[0, 1], [1, 0], [1, 0], [0, 0], [1, 0]],
]


@pytest.mark.parametrize("step", range(len(EXITED)))
@pytest.mark.parametrize("rows, hidden_size", [(1, 192), (3, 192), (5, LONG), (8, LONG)])
def test_advance(kernels, rows, hidden_size, step):
    g, layers, vocab = torch.Generator().manual_seed(10 * rows + step), 5, 40
    embed = torch.randn(vocab, hidden_size, generator=g).bfloat16()
    before, after = (torch.randn(rows, hidden_size, generator=g).bfloat16() for _ in range(2))
    tokens = torch.randint(0, vocab, (rows,), generator=g)
    stop_tokens = torch.randint(-1, 8, (rows, 3 if step % 2 else 0), generator=g)
    stop_tokens[::3, 1:2] = tokens[::3, None]
    state = rows_in_flight(rows, layers, hidden_size, step, EXITED[step], g)
    ours, theirs = advanced(kernels, (before, after, tokens, embed, stop_tokens), state)

    # A cosine may differ in its last bits.
    head, entry = 1 + 2 * rows, step % 3
    records = [written.pop("records") for written in (ours, theirs)]
    assert torch.equal(*(record[:, :head] for record in records))
    recorded = [record[entry, head:].clone().view(torch.float32) for record in records]
    assert_close(*recorded, torch.float32, "records")
    similarities = [written.pop("similarities") for written in (ours, theirs)]
    assert_close(*similarities, torch.float32, "similarities")
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("token", [-1, 40, 2**40, -(2**63)])
def test_advance_ends_a_row_without_a_token(kernels, token):
    g = torch.Generator().manual_seed(0)
    before, after, hidden = (torch.randn(3, 64, generator=g).bfloat16() for _ in range(3))
    embed = torch.randn(40, 64, generator=g).bfloat16()
    state = {
        "hidden": hidden, "slots": int32([0, -1, 2]), "positions": int32([4, 5, 6]),
        "draw_positions": int32([5, 6, 7]), "remaining": int32([9, 9, 9]),
        "exited": int32([[0, 0, 0], [1, 0, 0]]),
        "similarities": torch.ones(2, 3), "step": int32([0]),
        "records": torch.full((2, 1 + 6 + 6), -9, dtype=torch.int32),
    }  # fmt: skip
    drawn = before, after, torch.tensor([token, 7, 39]), embed, torch.tensor([[5]] * 3)
    ours, theirs = advanced(kernels, drawn, state)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["records"][0, 1:7].tolist() == [1, 2, 2, -2, -1, 39] and ours["slots"].tolist() == [-1, -1, 2]
    assert torch.equal(ours["hidden"][:2], hidden[:2])


@pytest.mark.parametrize("window", [1, 64, 700, 1025, 1500, 2500, 5000])
def test_attention_windows(kernels, window):
    """Which splits there are depends on how much a row sees."""
    g = torch.Generator().manual_seed(window)
    query = torch.randn(3, 2, 16, generator=g).bfloat16()
    caches = [torch.randn(3, 1, 3000, 16, generator=g).bfloat16() for _ in range(2)]
    place = int32([0, 1, 2]), int32([2999, 700, 63])
    out = kernels.decode_attention(query, *caches, *place, sliding_window=window)
    expected = reference.decode_attention(query, *caches, *place, sliding_window=window)
    assert_close(out, expected, torch.bfloat16, "out")
    alone = kernels.decode_attention(query[1:2], *caches, *(p[1:2] for p in place), sliding_window=window)
    assert torch.equal(alone, out[1:2])


def test_attention_over_more_splits_than_are_merged_at_once(kernels):
    g, length = torch.Generator().manual_seed(0), 256 * 256 + 300
    query = torch.randn(1, 5, 8, generator=g).bfloat16()
    caches = [torch.randn(1, 1, length, 8, generator=g).bfloat16() for _ in range(2)]
    valid = torch.rand(1, length, generator=g) < 0.01
    valid[0, 1000:40000] = False
    place = int32([0]), int32([length - 1])
    out = kernels.decode_attention(query, *caches, *place, kv_valid=valid)
    expected = reference.decode_attention(query, *caches, *place, kv_valid=valid)
    assert_close(out, expected, torch.bfloat16, "out")


@pytest.mark.parametrize("length", [1, 63, 64, 65, 256, 257, 1024, 1025, 2048, 2049])
def test_attention_lengths(kernels, length):
    g = torch.Generator().manual_seed(length)
    query = torch.randn(2, 6, 64, generator=g).bfloat16()
    caches = [torch.randn(2, 2, length, 64, generator=g).bfloat16() for _ in range(2)]
    place = int32([1, 0]), int32([length - 1, length // 2])
    out = kernels.decode_attention(query, *caches, *place)
    assert_close(out, reference.decode_attention(query, *caches, *place), torch.bfloat16, "out")


@pytest.mark.parametrize("dtype, share", [(torch.bfloat16, 1 / 1000), (torch.float16, 1 / 125)], ids=str)
def test_attention_is_as_exact_as_fp32(kernels, dtype, share):
    """Few outputs are rounded otherwise than those of fp64; fewer bits in the softmax give many more."""
    g = torch.Generator().manual_seed(0)
    query = torch.randn(8, 32, 128, generator=g).to(dtype)
    caches = [torch.randn(1, 8, 300, 128, generator=g).to(dtype) for _ in range(2)]
    positions = torch.arange(292, 300, dtype=torch.int32)
    out = kernels.decode_attention(query, *caches, int32([0] * 8), positions)
    k, v = (cache[0].repeat_interleave(4, dim=0).double() for cache in caches)  # [heads, positions, head_dim]
    scores = torch.einsum("thd,hpd->thp", query.double(), k) * 128**-0.5
    unseen = torch.arange(300) > positions[:, None, None]
    exact = torch.einsum("thp,hpd->thd", scores.masked_fill(unseen, float("-inf")).softmax(-1), v).to(dtype)
    assert (out != exact).float().mean() < share
    assert_close(out, exact, dtype, "out")


@pytest.mark.parametrize("place", [0, 70, 1500, 2999])
def test_attention_shows_a_nan_that_a_row_sees(kernels, place):
    """Whichever split it is in. The other rows and KV heads are what they are without it."""
    g = torch.Generator().manual_seed(place)
    query = torch.randn(3, 4, 16, generator=g).bfloat16()
    caches = [torch.randn(6, 2, 3000, 16, generator=g).bfloat16() for _ in range(2)]
    places = int32([4, 0, 5]), int32([2999, 2999, place])
    clean = kernels.decode_attention(query, *caches, *places)
    caches[0][4, 1, place, 3] = float("nan")
    out = kernels.decode_attention(query, *caches, *places)
    assert out[0, 2:].isnan().all()
    assert torch.equal(out.isnan(), reference.decode_attention(query, *caches, *places).isnan())
    assert torch.equal(out[~out.isnan()], clean[~out.isnan()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_similarity_of_every_magnitude(kernels, dtype):
    """Squares of 4,096 values of 2^60 overflow, long before one of them does."""
    check_magnitudes(kernels, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", range(1, 9))
def test_linear(kernels, rows, dtype):
    g = torch.Generator().manual_seed(rows)
    for n, k in ((33, 72), (160, 192), (48, 1024), (40, 8192)):
        x, bias = (torch.randn(*size, generator=g).to(dtype) for size in ((rows, k), (n,)))
        weight = (torch.randn(n, k, generator=g) * k**-0.5).to(dtype)
        assert_close(kernels.linear(x, weight, bias), reference.linear(x, weight, bias), dtype, "linear")
        q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=g)
        scale, zero = (torch.rand(n, -(-k // 64), generator=g).half() * s for s in (0.1, 15))
        packed = ops.pack_w4(q, scale, zero)
        out = kernels.linear_w4(x, packed, n, bias)
        assert_close(out, reference.linear_w4(x, packed, n, bias), dtype, "linear_w4")


def steady_norm(hidden, generator):
    """A norm's weight, with which no normalised value lies where bf16 rounds up or down.

    There the last bit of a GPU's reciprocal root would decide, and change a logit by 1/256 of a term.
    """
    normalised = hidden.double() * (hidden.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    norm, near = torch.zeros(hidden.shape[-1], dtype=torch.bfloat16), torch.ones(hidden.shape[-1]).bool()
    while near.any():
        norm[near] = torch.rand(int(near.sum()), generator=generator).bfloat16()
        values = normalised * norm.double()
        near = ((values * (1 - 1e-6)).bfloat16() != (values * (1 + 1e-6)).bfloat16()).any(0)
    return norm


@pytest.mark.parametrize("vocab, size", [(1, 128), (16, LONG), (515, 128)])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_lm_head(kernels, kind, rows, vocab, size):
    g = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(rows, size, generator=g).bfloat16()
    norm = steady_norm(hidden, g)
    head = Head(kind, (torch.randn(vocab, size, generator=g) * 0.3).bfloat16())
    draw = {
        "temperature": torch.full((rows,), 0.8),
        "seeds": torch.arange(rows) - 1,
        "positions": int32(list(range(rows))),
    }
    for options in ({}, draw | {"logits_scaling": 3.0}, {"return_logits": False}):
        tokens, logits, margins = head(hidden, norm, kernels, **options)
        expected, expected_logits, ahead = head.reference(hidden, norm, **options)
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(margins, ahead, atol=1e-4, rtol=1e-4)
        assert logits.shape == expected_logits.shape
        if len(expected_logits):
            assert_close(logits, expected_logits, torch.float32, "logits")
    row = slice(rows - 1, rows)
    alone = head(hidden[row], norm, kernels)
    assert all(torch.equal(a, b[row]) for a, b in zip(alone, head(hidden, norm, kernels), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_lm_head_in_fp16(kernels, kind):
    """To the tolerance of fp16: nibbles are 1024 too large in the sums, which costs bits of these."""
    g = torch.Generator().manual_seed(0)
    hidden, norm = torch.randn(3, 64, generator=g).half(), torch.rand(64, generator=g).half()
    head = Head(kind, (torch.randn(1003, 64, generator=g) * 0.3).half())
    tokens, logits, _ = head(hidden, norm, kernels)
    expected_tokens, expected, _ = head.reference(hidden, norm)
    assert torch.equal(tokens, expected_tokens) and logits.dtype == torch.float32
    assert_close(logits.half(), expected.half(), torch.float16, "logits")


@pytest.mark.parametrize("kind", KINDS)
def test_lm_head_ties_go_to_the_lowest_id(kernels, kind):
    hidden, norm = torch.ones(2, 64).bfloat16(), torch.ones(64).bfloat16()
    weight = torch.zeros(300, 64).bfloat16()
    tokens, _, margins = Head(kind, weight)(hidden, norm, kernels)
    assert tokens.tolist() == margins.tolist() == [0, 0]
    weight[[77, 200, 299]] = 1
    tokens, _, margins = Head(kind, weight)(hidden, norm, kernels)
    assert tokens.tolist() == [77, 77] and margins.tolist() == [0, 0]


@pytest.mark.parametrize("best", [0, 5, 160, 299])
@pytest.mark.parametrize("kind", KINDS)
def test_the_margin_of_a_token_wherever_the_second_best_is(kernels, kind, best):
    """In the same thread, another one, another warp or another block, and whoever comes first."""
    hidden, norm = torch.ones(1, 64).bfloat16(), torch.ones(64).bfloat16()
    for second in (1, 4, 9, 13, 21, 150, 161, 298):
        weight = torch.zeros(300, 64).bfloat16()
        weight[second], weight[best] = 0.5, 1
        head = Head(kind, weight)
        tokens, logits, margins = head(hidden, norm, kernels)
        two = logits[0].topk(2)
        assert two.indices.tolist() == [best, second] and tokens.tolist() == [best]
        assert margins[0] == two.values[0] - two.values[1]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_lm_head_without_finite_logits_has_no_token(kernels, kind, rows):
    g = torch.Generator().manual_seed(rows)
    norm, weight = torch.ones(128).bfloat16(), (torch.randn(515, 128, generator=g) * 0.3).bfloat16()
    draw = {
        "temperature": torch.tensor([0.8, 0.0] * 4)[:rows],
        "seeds": torch.arange(rows),
        "positions": int32(list(range(rows))),
    }
    nan, inf = float("nan"), float("inf")
    for value, entry in ((nan, None), (inf, None), (1.0, inf), (1.0, -inf), (1.0, nan)):
        hidden = torch.randn(rows, 128, generator=g).bfloat16()
        hidden[:, -1] = 0
        hidden[-1, -1] = value  # the last row alone, unless a weight is not finite
        for token in (514, 17):
            head = Head(kind, weight)
            if entry is not None:
                head.spoil(token, entry)
            for options in ({}, draw, {"return_logits": False}):
                tokens, _, margins = head(hidden, norm, kernels, **options)
                assert torch.equal(tokens, head.reference(hidden, norm, **options)[0])
                assert tokens[-1] == -1 and margins[-1] == 0
