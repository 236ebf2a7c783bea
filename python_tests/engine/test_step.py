"""A decoding step: rows by their own rules or together, the same in any batch, and what is refused."""

import math
import random

import pytest
import torch
from decoding import asked, at_depth, first_row, one_at_a_time, poisoned_memory, step
from tiny_model import MULTIPLIERS, random_model, random_prompt

from river_ext import ops, reference
from river_ext.engine.decoder import DeviceDecoder, HostDecoder
from river_ext.engine.graph import Memory
from river_ext.engine.network import Place
from river_ext.engine.step import Row
from river_ext.errors import RiverError

LAYERS, SLOTS, POSITIONS = 4, 5, 16
PROMPTS = [random_prompt(n, n) for n in (3, 7, 5, 1, 9)]
# thresholds in the midst of the similarities, so that depths vary by row and by token
OWN = [
    {"threshold": 0.7}, {"threshold": math.inf}, {"threshold": -2, "min_layers": 2}, {"mode": "full_w4"},
    {"threshold": 0.6, "temperature": 1.2, "seed": 5},
]  # fmt: skip


@pytest.fixture(params=[HostDecoder, DeviceDecoder], ids=["host", "device"])
def new_decoder(request):
    return request.param


def filled(network, own=OWN):
    """A memory whose slots hold the prompts, and the row of each."""
    memory, options = poisoned_memory(network, SLOTS, POSITIONS), {"max_new_tokens": 6, "return_logits": True}
    requests = [asked(network, p, **options, **mine) for p, mine in zip(PROMPTS, own, strict=True)]
    return memory, [first_row(memory, slot, request) for slot, request in enumerate(requests)]


def copy_of(memory):
    copy = Memory(memory.network, SLOTS, POSITIONS)
    copy.cache.k.copy_(memory.cache.k)
    copy.cache.v.copy_(memory.cache.v)
    return copy


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def contents(memory, slot):
    return bits(memory.cache.k[:, slot]), bits(memory.cache.v[:, slot])


def assert_same(got, expected):
    assert got[:3] == expected[:3]
    assert torch.equal(got.logits, expected.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", [OWN, *([at_depth(depth)] * SLOTS for depth in (0, 1, 3, 4))], ids=str)
def test_a_row_is_the_same_in_any_batch(new_decoder, dtype, own):
    """Also in one of which some rows have ended."""
    start, rows = filled(random_model(dtype=dtype).network, own)

    def run(slots, ends=()):
        memory = copy_of(start)
        decoder = new_decoder(memory, together=False)
        decoder.start([rows[slot] for slot in slots])
        first = step(decoder)
        decoder.keep([index for index, slot in enumerate(slots) if slot not in ends])
        kept = [slot for slot in slots if slot not in ends]
        second = dict(zip(kept, step(decoder), strict=True))
        return {slot: (first[slots.index(slot)], second[slot], contents(memory, slot)) for slot in kept}

    alone = {slot: run([slot])[slot] for slot in range(SLOTS)}
    if own is OWN:
        assert [alone[slot][0].exit_depth for slot in (1, 2, 3)] == [LAYERS, 2, 0], "on both paths"
    for slots, ends in (
        ([0, 1, 2, 3, 4], []), ([4, 2, 0, 1, 3], []), ([3, 0], []), ([1, 2, 3, 4], [1]), ([4, 3, 1], [4, 3]),
        ([2, 0, 1, 3], [0, 3]),
    ):  # fmt: skip
        for slot, (first, second, cache) in run(slots, ends).items():
            assert_same(first, alone[slot][0])
            assert_same(second, alone[slot][1])
            assert all(map(torch.equal, cache, alone[slot][2]))


# --- against the specification --------------------------------------------------------------------------


@pytest.fixture
def by_specification(monkeypatch):
    """Takes one row through a network at an exit depth: logits and similarities. Its K and V are written."""

    @torch.inference_mode()
    def run(memory, row, depth):
        network, similarities = memory.network, []
        slot, position = (torch.tensor([number], dtype=torch.int32) for number in (row.slot, row.position))
        place = Place(memory.cache, slot, position, memory.rope)
        hidden = network.embed(torch.tensor([row.token]))
        with monkeypatch.context() as patch:
            for name in ("decoder_block", "exit_layer"):
                patch.setattr(ops, name, getattr(reference, name))
            for layer in network.layers[:depth]:
                hidden, similarity = layer.block(hidden, place)
                similarities += similarity.tolist()
            for layer in network.layers[depth:]:
                hidden, _ = layer.exit(hidden, place)
        config = network.config
        _, logits, _ = reference.lm_head(
            hidden, network.norm, network.lm_head, config.rms_norm_eps, logits_scaling=config.logits_scaling
        )
        return logits[0], similarities

    return run


def first_depth(rules, similarities):
    """Where rows that leave together leave, by similarities of all depths that they ran."""
    ran = len(similarities[0])
    if any(rule.limit == 0 for rule in rules):
        return 0
    for depth in range(1, ran + 1):
        pairs = zip(rules, similarities, strict=True)
        if all(
            depth >= rule.min_layers and row[depth - 1] > rule.thresholds[depth - 1] for rule, row in pairs
        ):
            return depth
    return LAYERS


SHAPES = {
    "gqa": {},
    "biases and norms": {"biases": True, "qk_norm": True, "num_key_value_heads": 1},
    "odd sizes": {"intermediate_size": 77, "vocab_size": 81, "head_dim": 20, "rotary_dim": 12},
    "sliding window": {"sliding_window": 5},
    "multipliers": MULTIPLIERS,
    "layers of their own": {"sliding_window": 5, "full_attention_layers": (0, 2), "nope_layers": (1, 2)},
    "query scale": {"query_scaling": (0.5, 4)},
}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_random_rows_as_specified(new_decoder, by_specification, shape, together, seed):
    """Requests of random rules, in random slots: depths by the rule, values by the specification."""
    network, choose = random_model(**shape).network, random.Random(seed)
    own = [
        {
            "threshold": choose.choice([-2, 0.5, 0.6, 0.7, 0.8, [0.9, 0.5, 0.7, -2], [0.6, 1.0, -2, 0]]),
            "min_layers": choose.randint(1, LAYERS),
        }
        for _ in range(SLOTS)
    ]
    memory, rows = filled(network, own)
    rows = choose.sample(rows, 4)
    expected, decoder = copy_of(memory), new_decoder(memory, together)
    decoder.start(rows)
    seen = set()
    for _ in range(3):
        news = step(decoder)
        similarities = [new.similarities for new in news]
        if together:
            depths = [first_depth([row.request.rule for row in rows], similarities)] * 4
        else:
            depths = [
                first_depth([row.request.rule], [mine]) for row, mine in zip(rows, similarities, strict=True)
            ]
        assert [new.exit_depth for new in news] == depths == [len(mine) for mine in similarities]
        seen.add(tuple(depths))
        for row, new in zip(rows, news, strict=True):
            logits, measured = by_specification(expected, row, new.exit_depth)
            assert torch.allclose(new.logits, logits, atol=1e-4)
            assert new.similarities == pytest.approx(measured, abs=1e-5)
            assert new.token == new.logits.argmax()
        rows = [
            row._replace(token=new.token, position=row.position + 1)
            for row, new in zip(rows, news, strict=True)
        ]
    assert together or max(len(set(depths)) for depths in seen) > 1, "rows of a step on both paths"
    for part in ("k", "v"):
        got, wanted = (getattr(some.cache, part) for some in (memory, expected))
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.allclose(got, wanted, atol=1e-4, equal_nan=True)


# --- rows that leave ------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True])
def test_rows_that_ended_write_nothing_and_decide_nothing(new_decoder, together):
    own = [
        {"threshold": -2},
        {"threshold": math.inf},
        {"threshold": -2},
        {"threshold": -2},
        {"threshold": -2},
    ]
    memory, rows = filled(random_model().network, own)
    decoder = new_decoder(memory, together)
    decoder.start([rows[4], rows[1], rows[2]])
    depths = [LAYERS] * 3 if together else [1, LAYERS, 1]
    assert [new.exit_depth for new in step(decoder)] == depths
    before = contents(memory, 1)
    decoder.keep([0, 2])
    assert [new.exit_depth for new in step(decoder)] == [1, 1], "the threshold of what ended does not count"
    assert all(map(torch.equal, contents(memory, 1), before))


def test_outputs_follow_the_rows_that_are_kept(new_decoder):
    start, rows = filled(random_model().network)
    outputs = []
    for keep in ([0, 1, 2], [0, 2], [2, 0]):
        memory = copy_of(start)
        decoder = new_decoder(memory, together=False)
        decoder.start(rows[:3])
        step(decoder)
        decoder.keep(keep)
        step(decoder)
        decoder.keep(range(len(keep)))  # which changes nothing
        outputs.append(step(decoder))
    all_rows, two, turned = outputs
    for kept, expected in ((two, [0, 2]), (turned, [2, 0])):
        for new, row in zip(kept, expected, strict=True):
            assert_same(new, all_rows[row])


def test_logits_are_of_the_rows_that_want_them(new_decoder):
    memory, rows = filled(random_model().network)
    rows[1] = rows[1]._replace(request=asked(memory.network, PROMPTS[1]))
    decoder = new_decoder(memory, together=False)
    decoder.start(rows)
    first, second = step(decoder), step(decoder)
    assert [new.logits is None for new in first] == [False, True, False, False, False]
    assert first[0].logits.argmax() == first[0].token, "a later step leaves it as it is"
    assert not torch.equal(first[0].logits, second[0].logits)


@pytest.mark.parametrize("depth", [0, 2, LAYERS])
def test_rows_of_one_sequence_in_one_pass_equal_one_after_the_other(depth):
    """All rows' K and V are written before any row attends: a whole prompt in one pass, as prefills do."""
    network, prompt = random_model().network, PROMPTS[1]
    news, apart = one_at_a_time(network, prompt, depth)
    together = poisoned_memory(network, 2, len(prompt))
    positions = torch.arange(len(prompt), dtype=torch.int32)
    place = Place(together.cache, torch.full_like(positions, 1), positions, together.rope)
    hidden = network.embed(torch.tensor(prompt))
    for index, layer in enumerate(network.layers):
        hidden, _ = (layer.block if index < depth else layer.exit)(hidden, place)
    _, logits, _ = ops.lm_head(hidden, network.norm, network.lm_head, network.config.rms_norm_eps)
    assert torch.equal(logits, torch.stack([new.logits for new in news]))
    assert all(map(torch.equal, contents(together, 1), contents(apart, 1)))


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([(0, 3, 1), (0, 4, 1)], "two rows have the same slot"),
        (
            [(3, 0, 1)],
            "slot 3, position 0 and 1 more tokens are outside of the cache of 3 slots x 16 positions",
        ),
        ([(-1, 0, 1)], "slot -1"),
        ([(1, 0, 1), (0, 16, 1)], "slot 0, position 16"),
        ([(0, 14, 3)], "position 14 and 3 more tokens"),
        ([(0, -1, 1)], "position -1"),
    ],
)
def test_rows_outside_the_cache_are_refused(new_decoder, places, message):
    network = random_model().network
    decoder = new_decoder(Memory(network, 3, 16), together=False)
    request = asked(network)
    with pytest.raises(RiverError, match=message):
        decoder.start([Row(1, position, slot, request, left) for slot, position, left in places])
    decoder.start([Row(1, 14, 2, request, 2), Row(1, 15, 0, request, 1)])  # these are inside
    assert len(step(decoder)) == 2
