"""Captured steps of a CPU: ops, and what torch does between them, in one order."""

import gc
import random
import weakref

import pytest
import torch
from tiny_model import random_model, random_prompt

from river_ext import ops
from river_ext.engine import graph
from river_ext.engine.cpu_graph import CpuGraph, call
from river_ext.engine.engine import Engine


def test_calls_keep_their_place():
    """Before, between and after ops; two in a row; none of them while the graph is captured."""
    x, eye, log = torch.ones(1, 64), torch.eye(64), []

    def run():
        call(lambda: log.append("first"))
        y = ops.linear(x, eye)
        call(lambda: log.append(y.sum().item()))
        call(lambda: y.mul_(2))
        z = ops.linear(y, eye)
        call(lambda: log.append(z.sum().item()))
        return z

    graph = CpuGraph()
    z = graph.capture(run)
    assert log == []
    for value in (1, 3):
        x.fill_(value)
        graph.replay()
        assert log == ["first", 64 * value, 128 * value] and (z == 2 * value).all()
        log.clear()


def test_a_call_that_nobody_captures():
    log = []
    call(lambda: log.append(1))
    graph = CpuGraph()
    graph.capture(lambda: None)
    call(lambda: log.append(2))
    with pytest.raises(ZeroDivisionError):
        graph.capture(lambda: 1 / 0)
    call(lambda: log.append(3))
    assert log == [1, 2, 3]


@pytest.mark.parametrize("mode", ["full", "full_w4", "river", "lossless"])
def test_a_step_calls_no_op_once_it_is_captured(monkeypatch, mode):
    """What is captured is all of a step, and is captured once."""
    captured, capture = [], CpuGraph.capture

    def counted(graph, run):
        captured.append(graph)
        return capture(graph, run)

    monkeypatch.setattr(CpuGraph, "capture", counted)
    model, options = random_model(), {"mode": mode, "max_new_tokens": 20, "draft_tokens": 2, "threshold": 0.7}
    if mode != "lossless":
        del options["draft_tokens"]
    model._engines.idle.clear()
    prompt = random_prompt(4)
    expected = model.generate(prompt, **options)
    count = len(captured)
    called = []
    names = ("decoder_block", "exit_layer", "dual_layer", "lm_head_w4", "advance", "accept", "draft_advance")
    for name in names:
        op = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, _op=op, _name=name, **k: called.append(_name) or _op(*a, **k)
        )
    assert model.generate(prompt, **options).tokens == expected.tokens
    assert 0 < count == len(captured)
    assert set(called) <= {"decoder_block", "exit_layer"}, "of the prompt's prefill"
    assert len(called) == 4, "a layer each"


@pytest.mark.parametrize("mode", ["full", "full_w4", "river", "lossless"])
@pytest.mark.parametrize("control", ["host", "device"])
@pytest.mark.parametrize("end", [Engine.close, lambda engine: None], ids=["closed", "dropped"])
def test_graphs_do_not_keep_an_engine(mode, control, end):
    """Its memory is there for the next one at once, whenever garbage is collected."""
    engine = random_model().engine(slots=1, exit_control=control)
    engine.submit(random_prompt(3), mode=mode, max_new_tokens=9)
    list(engine)
    cache = weakref.ref(engine._memory.cache)
    gc.disable()
    try:
        end(engine)
        del engine
        assert cache() is None
    finally:
        gc.enable()


def test_old_graphs_make_room(monkeypatch):
    """Rules by layer have more graphs than are kept; a graph that is captured anew gives what it gave."""
    model, generator = random_model(), random.Random(1)
    options = {"max_new_tokens": 6, "exit_control": "host", "return_logits": True}
    rules = [[generator.choice((-2.0, 0.5, 0.7, 2.0)) for _ in range(4)] for _ in range(40)]
    expected = [model.generate(random_prompt(4), threshold=rule, **options) for rule in rules]
    few = {}

    def limited(graphs, *arguments, _init=graph.Graphs.__init__):
        _init(graphs, *arguments)
        graphs.most_graphs = 4
        few[id(graphs)] = graphs

    monkeypatch.setattr(graph.Graphs, "__init__", limited)
    model._engines.idle.clear()
    for rule, output in zip(rules, expected, strict=True):
        again = model.generate(random_prompt(4), threshold=rule, **options)
        assert (again.tokens, again.exit_depths) == (output.tokens, output.exit_depths)
        assert torch.equal(again.logits, output.logits)
    assert max(len(graphs.graphs) for graphs in few.values()) == 4


@pytest.mark.parametrize("mode", ["full", "full_w4", "river", "lossless"])
def test_weights_that_are_given_other_memory(mode):
    """The next call is by those. Graphs that were captured before would read what has gone."""
    model = random_model.__wrapped__()  # not that of other tests
    options = {"mode": mode, "max_new_tokens": 9}
    before = model.generate(random_prompt(4), **options)
    weights, layer, river = model.weights, model.weights.layers[2], model.river[2]
    for tensor in (weights.norm, weights.lm_head, layer.q_proj, layer.down_proj, river.o_proj):
        tensor.data = tensor.flip(0)
    after = model.generate(random_prompt(4), **options)
    model._engines.idle.clear()
    assert after.tokens == model.generate(random_prompt(4), **options).tokens != before.tokens


def test_a_capture_inside_of_another_is_refused_and_harms_it_not():
    log = []

    def run():
        with pytest.raises(RuntimeError, match="capturing a graph already"):
            CpuGraph().capture(lambda: None)
        call(lambda: log.append(1))

    graph = CpuGraph()
    graph.capture(run)
    assert log == []
    graph.replay()
    assert log == [1]
