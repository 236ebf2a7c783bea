"""Graphs of ops on a CPU: a replay does what the calls would do now, on what their tensors hold now."""

import gc
import inspect
import threading

import pytest
import torch
from test_ops import SAMPLES
from torch.utils._pytree import tree_leaves

from river_ext import ops
from river_ext.ops import _C


@pytest.fixture(params=[1, 2, 5], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def call(name, values):
    """Arguments and results of a call, the former by their own copies."""
    values = [value.clone() if isinstance(value, torch.Tensor) else value for value in values]
    return values, getattr(ops, name)(**named(name, values))


def named(name, values):
    return dict(zip(inspect.signature(getattr(ops, name)).parameters, values, strict=False))


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def poison(results):
    for result in results:
        result.view(torch.uint8).fill_(0xA5) if result.numel() else None


def same(a, b):
    bits = zip(tensors(a), tensors(b), strict=True)
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8)) if x.dim() else x.equal(y) for x, y in bits
    )


def replay(graph):
    graph.replay(0, len(graph))


CHANGED = {"dual_layer": 1, "advance": 1}  # an argument, if not the first one


@pytest.mark.parametrize("name", SAMPLES)
def test_a_replay_is_a_call(name, threads):
    """Every buffer that the op writes, over and over, with what its inputs hold by then."""
    graph = _C.Graph()
    values, results = graph.capture(lambda: call(name, SAMPLES[name]))
    assert len(graph) == 1 and same(values, SAMPLES[name]), "nothing ran"
    for _ in range(3):
        poison(tensors(results))
        for value, sample in zip(tensors(values), tensors(SAMPLES[name]), strict=True):
            value.copy_(sample)
        replay(graph)
        assert same((values, results), call(name, SAMPLES[name]))
    expected = [value.clone() for value in tensors((values, results))]
    changed = CHANGED.get(name, 0)
    values[changed].view(torch.uint8).copy_(values[changed].view(torch.uint8).flip(0))
    again, by_call = call(name, values)
    replay(graph)
    assert same((values, results), (again, by_call))
    assert not same((values, results), expected), "the change changes something"


def test_ops_run_in_their_order():
    """Each on what the one before gave; parts of a graph, too."""
    x, weight = torch.randn(3, 64), torch.randn(64, 64)

    def chain():
        outs = [x]
        for _ in range(5):
            outs.append(ops.linear(outs[-1], weight))
        return outs

    graph = _C.Graph()
    outs = graph.capture(chain)
    poison(outs[1:])
    graph.replay(0, 2)
    assert same(outs[:3], chain()[:3]) and not same(outs[3:4], chain()[3:4])
    graph.replay(2, 2)
    graph.replay(2, 5)
    assert same(outs, chain())
    for begin, end in [(0, 6), (3, 2), (6, 6)]:
        with pytest.raises(IndexError, match="no such"):
            graph.replay(begin, end)


def test_a_graph_holds_its_tensors():
    """As nobody else may have them: inputs, weights, and what goes from one op to the next."""
    x = torch.randn(2, 256)

    def chain():
        return ops.state_similarity(ops.linear(x.clone(), torch.eye(256) * 2), x.clone())

    expected, graph = chain(), _C.Graph()
    out = graph.capture(chain)
    gc.collect()
    others = [torch.full((size,), 7.0) for size in (512, 512, 65536, 65536)]
    replay(graph)
    assert torch.equal(out, expected) and all((other == 7).all() for other in others)


BAD_VALUES = {
    "decoder_block": ("slots", 99),
    "exit_layer": ("positions", -1),
    "dual_layer": ("positions", 10**6),
    "decode_attention": ("slots", -2),
    "lm_head": ("temperature", -1),
    "sample": ("top_k", -1),
    "advance": ("step", -1),
    "draft_advance": ("wanted", 99),
    "accept": ("step", 2**31 - 1),
    "pack_w4": ("q", 16),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_are_checked_in_every_replay(name, threads):
    """They are not when an op is captured: its tensors hold nothing yet. What is refused writes nothing."""
    tensor, value = BAD_VALUES[name]
    arguments = named(name, SAMPLES[name])
    if name == "lm_head":
        arguments |= {"temperature": torch.ones(2), "seeds": torch.ones(2, dtype=torch.int64)}
        arguments |= {"positions": torch.ones(2, dtype=torch.int32)}  # which give it a temperature
    arguments = {key: v.clone() if isinstance(v, torch.Tensor) else v for key, v in arguments.items()}
    good = arguments[tensor].clone()
    arguments[tensor].flatten()[0] = value
    graph = _C.Graph()
    results = graph.capture(lambda: getattr(ops, name)(**arguments))
    poison(tensors(results))
    before = [t.clone() for t in tensors((arguments, results))]
    with pytest.raises(RuntimeError, match=rf"^river::{name}: {tensor}\[.*\] is {value}"):
        replay(graph)
    assert same((arguments, results), before)
    arguments[tensor].copy_(good)
    replay(graph)
    assert not same((arguments, results), before)


def test_a_refused_op_stops_its_graph(threads):
    """The ops before it have run, those after it do not."""
    x, weight = torch.randn(1, 64), torch.eye(64)
    step = call("advance", SAMPLES["advance"])[0]

    def chain():
        return ops.linear(x, weight), ops.advance(*step), ops.linear(x, weight)

    graph = _C.Graph()
    first, _, last = graph.capture(chain)
    poison([first, last])
    poisoned = last.clone()
    number = list(inspect.signature(ops.advance).parameters).index("step")
    step[number].fill_(-1)
    try:
        with pytest.raises(RuntimeError, match="step"):
            replay(graph)
    finally:
        step[number].fill_(0)
    assert torch.equal(first, x) and same(last, poisoned)


def test_a_capture_ends_however_it_ends():
    class Cut(BaseException):
        pass

    def cut():
        ops.linear(torch.ones(1, 64), torch.eye(64))
        raise Cut

    graph = _C.Graph()
    with pytest.raises(Cut):
        graph.capture(cut)
    assert not graph.is_capturing
    with pytest.raises(RuntimeError, match="capturing a graph already"):
        graph.capture(lambda: _C.Graph().capture(lambda: None))
    with pytest.raises(RuntimeError, match=r"^river::linear: weight"):
        graph.capture(lambda: ops.linear(torch.ones(1, 64), torch.eye(65)))
    assert torch.equal(ops.linear(torch.ones(1, 64), torch.eye(64)), torch.ones(1, 64)), "ops run again"


def test_other_threads_go_on():
    """Their ops run while one captures."""
    graph, results = _C.Graph(), []

    def run():
        other = threading.Thread(target=lambda: results.append(ops.linear(torch.ones(1, 64), torch.eye(64))))
        other.start()
        other.join()
        return graph.is_capturing

    assert graph.capture(run) and len(graph) == 0
    assert torch.equal(results[0], torch.ones(1, 64))


def test_a_replay_uses_the_places_that_it_has_checked():
    """Another thread may write them meanwhile. A row of slot 1 would get to the memory behind the caches."""
    arguments = named("decode_attention", SAMPLES["decode_attention"])
    heads, size = arguments["query"].shape[1:]
    kv_heads = arguments["k_cache"].shape[1]
    rows, caches = 256, [torch.ones(2, kv_heads, 8, size) for _ in range(2)]
    caches[1][1] = 9
    slots, positions = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    graph, done, refused, replays = _C.Graph(), threading.Event(), 0, 0
    query, slot_0 = torch.ones(rows, heads, size), [cache[:1] for cache in caches]
    out = graph.capture(lambda: ops.decode_attention(query, *slot_0, slots, positions))

    def write():
        while not done.is_set():
            for slot in (0, 1):
                slots.fill_(slot)

    other = threading.Thread(target=write)
    other.start()
    try:
        while refused < 100 or replays < 1000:
            try:
                replay(graph)
            except RuntimeError:
                refused += 1
            else:
                replays += 1
                assert (out == 1).all()
    finally:
        done.set()
        other.join()


def test_what_the_garbage_collector_calls_is_no_part_of_a_capture():
    """It may come at any time, in any thread."""
    results, before = [], gc.get_threshold()

    class Garbage:
        def __del__(self):
            results.append(ops.linear(torch.ones(1, 64), torch.eye(64)).sum().item())

    def run():
        garbage = Garbage()
        garbage.itself = garbage
        del garbage
        return [[] for _ in range(100)] and ops.linear(torch.ones(1, 64), torch.eye(64))

    graph = _C.Graph()
    gc.collect()
    gc.set_threshold(1)
    try:
        graph.capture(run)
        assert len(graph) == 1 and gc.isenabled()
        gc.collect()
        assert results == [64]
        gc.disable()
        graph.capture(lambda: None)
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.set_threshold(*before)
