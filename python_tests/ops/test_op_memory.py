"""What an op writes is memory of one of its tensors alone: any overlap is refused before anything is written.

Else an op would overwrite what it has checked, or has yet to read: positions that lie inside the cache would
send K and V out of it.
"""

import pytest
import torch
from blocks import Block, Shape, int32
from cycles import Requests
from test_advance import State
from test_dual_layer import Decision, weights_of

from river_ext import ops

ALIGNED = 8  # bytes, the largest element


def arguments(name: str) -> dict:
    """Every argument of an op that writes, by the names of its schema; no optional tensor is left out."""
    schema = getattr(torch.ops.river, name).default._schema
    if name == "advance":
        values = list(vars(State(torch.bfloat16)).values())
    elif name == "draft_advance":
        values = list(Requests(dtype=torch.bfloat16).drafting(torch.tensor([3, 4]), 1).values())
    elif name == "accept":
        values = list(Requests(dtype=torch.bfloat16).accepting(torch.tensor([3, 4, 5, 6])).values())
    else:
        block = Block(Shape(bias=True, qk_norm=True, query_scale=True), torch.bfloat16)
        size, s = block.shape.hidden_size, block.shape
        weights = weights_of(block)
        layers = {"decoder_block": weights[:9], "exit_layer": [weights[i] for i in (0, 9, 10, 5, 11, 12)]}
        if name == "dual_layer":
            values = [
                1,
                block.random(2, size),
                block.random(2, size),
                *vars(Decision(2, 0.5)).values(),
                *weights,
            ]
        else:
            values = [block.random(2, size), *layers[name]]
        places = int32([0, 3]), int32([5, 7])
        values += [*block.caches(), *places, *block.tables, s.num_attention_heads, 1e-5]
        values += [block.options[key] for key in ("q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm")]
        valid = torch.ones(s.slots, s.max_len, dtype=torch.bool)
        values += [block.options["query_scale"], None, None, valid, 1.0]
        values += [False] if name == "dual_layer" else []
    return dict(zip((a.name for a in schema.arguments), values, strict=True))


def written_arguments(name: str) -> list[str]:
    schema = getattr(torch.ops.river, name).default._schema
    return [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]


REGISTERED = {
    name.split("::")[1].split(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("river::")
}
WRITERS = {name: arguments(name) for name in sorted(REGISTERED) if written_arguments(name)}
PAIRS = [
    (op, written, other)
    for op, values in WRITERS.items()
    for written in written_arguments(op)
    for other, value in values.items()
    if isinstance(value, torch.Tensor) and other != written
]


def in_one_memory(values: dict, written: str, other: str, offset: int, device: str = "cpu") -> dict:
    """The arguments, `other` that many bytes behind the start of `written`, and right where they overlap."""
    start, lowest = {written: 0, other: offset}, min(0, offset)
    end = max(at + values[name].nbytes for name, at in start.items())
    memory = torch.zeros(end - lowest, dtype=torch.uint8, device=device)
    moved = {name: own_copy(name, v, device) for name, v in values.items()}
    for name, at in start.items():
        part = memory[at - lowest : at - lowest + values[name].nbytes]
        moved[name] = part.view(values[name].dtype).view(values[name].shape).copy_(values[name])
    return moved


def own_copy(name: str, value, device: str):
    if not isinstance(value, torch.Tensor):
        return value
    if device == "cuda" and name == "records":  # the host polls them
        return value.clone().pin_memory()
    return value.clone().to(device)


def apart(t: torch.Tensor) -> int:
    """The nearest place behind a tensor that is aligned."""
    return -(-t.nbytes // ALIGNED) * ALIGNED


def run(op: str, values: dict) -> list[torch.Tensor]:
    """What an op returns and writes."""
    result = getattr(torch.ops.river, op)(*values.values())
    results = result if isinstance(result, tuple) else (result,)
    return [t for t in (*results, *(values[name] for name in written_arguments(op))) if t is not None]


def same(actual, expected) -> bool:
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(actual, expected, strict=True)
    )


def test_the_ops_that_write():
    assert list(WRITERS) == [
        *("accept", "advance", "decoder_block", "draft_advance", "dual_layer", "exit_layer")
    ]


@pytest.mark.parametrize("op, written, other", PAIRS)
def test_an_overlap_is_refused(op, written, other):
    values = WRITERS[op]
    ends = apart(values[written]) - ALIGNED, ALIGNED - apart(values[other])  # one element, or a few
    one_tensor = {0} if (op, written, other) != ("advance", "hidden", "before") else set()
    for offset in {*one_tensor, *ends, ends[0] // 2 // ALIGNED * ALIGNED}:
        moved = in_one_memory(values, written, other, offset)
        tensors = [v for v in moved.values() if isinstance(v, torch.Tensor)]
        before = [t.clone() for t in tensors]
        with pytest.raises(RuntimeError) as error:
            run(op, moved)
        assert f"river::{op}: " in str(error.value) and " overlap in memory, expected " in str(error.value)
        assert f"{written} and {other}" in str(error.value) or f"{other} and {written}" in str(error.value)
        assert "\n" not in str(error.value) and same(tensors, before)


def test_the_same_address_is_refused_on_every_device(device):
    for op, written, other in PAIRS:
        exempt = (op, written, other) == ("advance", "hidden", "before")
        if not exempt and (device == "cpu" or "records" not in (written, other)):
            with pytest.raises(RuntimeError, match="overlap in memory"):
                run(op, in_one_memory(WRITERS[op], written, other, 0, device))


@pytest.mark.parametrize("op, written, other", PAIRS)
def test_neighbours_are_no_overlap(op, written, other):
    values = WRITERS[op]
    expected = run(op, {name: own_copy(name, v, "cpu") for name, v in values.items()})
    for offset in (apart(values[written]), -apart(values[other])):
        assert same(run(op, in_one_memory(values, written, other, offset)), expected)


@pytest.mark.parametrize("layer", ["decoder_block", "exit_layer", "dual_layer"])
@pytest.mark.parametrize("place", ["slots", "positions"])
def test_places_inside_of_the_cache_send_nothing_out_of_it(layer, place):
    """A position that is right until K and V lie on it."""
    values = WRITERS[layer] | {name: WRITERS[layer][name].clone() for name in ("k_cache", "v_cache")}
    before = values["k_cache"].clone()
    words = values["v_cache"].view(torch.int32).flatten()[:2]
    values[place] = words.copy_(values[place])
    with pytest.raises(RuntimeError, match=f"v_cache and {place} overlap"):
        run(layer, values)
    assert torch.equal(values["k_cache"], before)


def test_advance_reads_the_input_of_the_last_layer_before_it_overwrites_it():
    for exited in ((0, 0, 0), (0, 1, 1)):
        expected, got = State(exited=exited), State(exited=exited)
        got.hidden = got.before
        expected.advance()
        got.advance()
        active = torch.tensor([0, 2, 3])
        assert torch.equal(got.hidden[active], expected.hidden[active])
        for name in ("similarities", "records", "slots", "positions"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), name


def test_caches_that_are_only_read_may_be_one():
    cache = torch.randn(2, 2, 4, 32)
    query = torch.randn(2, 4, 32)
    place = int32([0, 1]), int32([3, 2])
    together = ops.decode_attention(query, cache, cache, *place)
    assert torch.equal(together, ops.decode_attention(query, cache, cache.clone(), *place))


def test_a_storage_that_is_too_small_is_refused():
    weight = torch.randn(16, 64)
    weight.untyped_storage().resize_(0)
    with pytest.raises(
        RuntimeError, match="river::linear: weight has a storage of 0 bytes, expected at least 4096"
    ):
        ops.linear(torch.randn(1, 64), weight)
    query, caches = torch.randn(1, 4, 32), [torch.randn(2, 2, 4, 32) for _ in range(2)]
    caches[1].untyped_storage().resize_(100)
    with pytest.raises(RuntimeError, match="river::decode_attention: v_cache has a storage of 100 bytes"):
        ops.decode_attention(query, *caches, int32([1]), int32([0]))
