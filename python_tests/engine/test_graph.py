"""Captured steps: the same outputs under both controls, what gets captured, and engines that are lent.

What a graph of the CPU is made of: test_cpu_graph.py.
"""

import gc
import math
import weakref

import pytest
import torch
from oracle import oracle, same
from tiny_model import MULTIPLIERS, demo_model, random_model, random_prompt

from river_ext import ops
from river_ext.engine import decoder, graph
from river_ext.engine.decoder import DeviceDecoder, HostDecoder
from river_ext.engine.engine import Engine
from river_ext.engine.graph import Memory, Runner, backbone_part, tail_part, whole_steps
from river_ext.engine.request import request
from river_ext.engine.step import Row
from river_ext.errors import RiverError

LAYERS, VOCAB = 4, 80
CONTROLS = ("host", "device")
PROMPTS = [random_prompt(n, n) for n in (1, 6, 11, 3, 8, 2, 5, 4)]
QUESTION = "Question: Ana has 21 coins and buys 12 more at the fair. How many coins does Ana have?\nAnswer:"


def facts(outputs):
    """All that must be the same whoever decides."""
    outputs = outputs if isinstance(outputs, list) else [outputs]
    names = ("text", "tokens", "exit_depths", "similarities", "finish_reason")
    return [tuple(getattr(output, name) for name in names) for output in outputs]


def lengths(outputs):
    return [len(output.tokens) for output in outputs]


@pytest.fixture
def model():
    """A random model that no other test has left an engine on."""
    model = random_model()
    model._engines.idle.clear()
    return model


def idle(model) -> Engine:
    (engine,) = model._engines.idle
    return engine


def runners(model, control):
    """By their number of rows."""
    return idle(model)._decoders.by_control[control].runners


def graphs(model, control):
    """The keys of all that was captured."""
    return {key for runner in runners(model, control).values() for key in runner.graphs}


@pytest.fixture
def replays(monkeypatch):
    """The parts that are replayed, in order; whole steps one by one."""
    parts, replay = [], Runner.replay

    def counted(self, part, *arguments):
        parts.extend([part] * (arguments[0] if part is whole_steps else 1))
        return replay(self, part, *arguments)

    monkeypatch.setattr(Runner, "replay", counted)
    return parts


# --- the same outputs ---------------------------------------------------------------------------------------

EVERY_SEVENTH = list(range(0, VOCAB, 7))
SAME = {
    "never": {"threshold": math.inf},
    "not reached": {"threshold": 1.0},
    "always": {"threshold": -2},
    "always after 3": {"threshold": -2, "min_layers": 3},
    "always after all": {"threshold": -2, "min_layers": LAYERS},
    "0.5": {"threshold": 0.5},
    "0.7": {"threshold": 0.7},
    "0.75 after 2": {"threshold": 0.75, "min_layers": 2},
    "full": {"mode": "full"},
    "full_w4": {"mode": "full_w4"},
    "prefill min": {"threshold": 0.7, "prefill": "min"},
    "prefill last": {"threshold": 0.7, "prefill": "last"},
    "prefill depth": {"threshold": 0.7, "prefill": "depth:2"},
    "sampled": {"threshold": 0.7, "temperature": 1.3, "seed": 7},
    "sampled river": {"mode": "full_w4", "temperature": 0.7, "seed": -3},
    "top_k": {"threshold": 0.7, "temperature": 1.3, "top_k": 9, "seed": 7},
    "top_p": {"mode": "full", "temperature": 1.0, "top_p": 0.8},
    "min_p": {"mode": "full_w4", "temperature": 1.0, "min_p": 0.2},
    "filters": {
        "threshold": 0.5, "temperature": 2.0, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "seed": 9,
        "stop_tokens": EVERY_SEVENTH,
    },
    "stop tokens": {"threshold": 0.7, "stop_tokens": EVERY_SEVENTH},
    "stop tokens, full": {"mode": "full", "stop_tokens": EVERY_SEVENTH},
    "sampled with stop tokens": {"threshold": 0.7, "temperature": 1.0, "stop_tokens": EVERY_SEVENTH},
    "more stop tokens": {"threshold": 0.7, "temperature": 1.0, "stop_tokens": list(range(0, VOCAB, 4))},
    "1 token": {"max_new_tokens": 1},
    "2 tokens": {"max_new_tokens": 2},
    "few tokens": {"max_new_tokens": 5, "threshold": 0.7},
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("options", SAME.values(), ids=SAME)
def test_every_control_gives_every_row_what_it_gets_alone(model, options, batch):
    options = {"max_new_tokens": 24, **options}
    expected = [oracle(model, prompt, **options) for prompt in PROMPTS[:batch]]
    for control in CONTROLS:
        outputs = model.generate(PROMPTS[:batch], exit_control=control, **options)
        assert all(map(same, outputs, expected)), control


@pytest.mark.parametrize("batch", [2, 3, 8])
@pytest.mark.parametrize("options", SAME.values(), ids=SAME)
def test_both_controls_are_alike_where_rows_leave_together(model, options, batch):
    options = {"max_new_tokens": 24, "batch_policy": "min", **options}
    host, device = (model.generate(PROMPTS[:batch], exit_control=control, **options) for control in CONTROLS)
    assert facts(device) == facts(host)


def test_the_cases_above_are_not_trivial(model):
    """Depths that vary from token to token, and rows that end at different times."""
    for name in ("0.5", "0.7"):
        (output,) = model.generate(PROMPTS[1:2], max_new_tokens=24, **SAME[name])
        assert len(set(output.exit_depths[1:])) > 1
    for policy, most in (("min", 1), ("row", 2)):
        outputs = model.generate(PROMPTS, max_new_tokens=24, batch_policy=policy, **SAME["stop tokens"])
        assert len(set(lengths(outputs))) > 2
        depths = [{out.exit_depths[i] for out in outputs if i < len(out.tokens)} for i in range(1, 24)]
        assert max(map(len, depths)) == most, "of a step"


@pytest.mark.parametrize("control", CONTROLS)
def test_requests_with_values_of_their_own(model, control):
    """When a strict row ends, the others exit earlier: the device must drop it at the same step."""
    options = {
        "max_new_tokens": 24, "threshold": [0.99, 0.5, -2, 0.6], "min_layers": [1, 1, 2, 1],
        "seed": [3, 1, 4, 1], "temperature": 0.8, "batch_policy": "min",
    }  # fmt: skip
    model_alone = model.generate(PROMPTS[:4], **options)
    stop = model_alone[0].tokens[6]  # of the strict row
    options["stop_tokens"] = stop
    host = model.generate(PROMPTS[:4], **options)
    end, longest = len(host[0].tokens), max(host, key=lambda output: len(output.tokens))
    assert end < len(longest.tokens)
    assert min(longest.exit_depths[:end]) > min(longest.exit_depths[end:]), "it did hold the others back"
    assert facts(model.generate(PROMPTS[:4], exit_control=control, **options)) == facts(host)


@pytest.mark.parametrize("control", ("auto", *CONTROLS))
def test_requests_keep_their_own_values_when_the_first_ends_at_its_prefill(model, control):
    """Then rows are not numbered as requests are."""
    alone = {"max_new_tokens": 12, "temperature": 0.9, "exit_control": control}
    own = [
        {"seed": seed, "threshold": threshold, "min_layers": least}
        for seed, threshold, least in [(5, 0.99, 1), (6, -2, 1), (7, math.inf, 1), (8, -2, 3)]
    ]
    first = model.generate(PROMPTS[0], **alone, **own[0]).tokens[0]
    alone["stop_tokens"] = first
    expected = [model.generate(prompt, **alone, **mine) for prompt, mine in zip(PROMPTS, own, strict=False)]
    assert lengths(expected[:1]) == [1] and all(length > 3 for length in lengths(expected[1:]))
    for others in ([0, 1], [0, 2], [0, 3], [0, 3, 1, 2]):
        options = {name: [own[i][name] for i in others] for name in own[0]}
        got = model.generate([PROMPTS[i] for i in others], **alone, **options)
        assert facts(got) == facts([expected[i] for i in others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"biases": True, "qk_norm": True},
        {"sliding_window": 5},
        {"num_hidden_layers": 1},
        {"tie_word_embeddings": True},
        MULTIPLIERS,
    ],
    ids=str,
)
def test_models(dtype, control, changes):
    model = random_model(dtype=dtype, **changes)
    options = {"max_new_tokens": 16, "threshold": 0.6, "stop_tokens": EVERY_SEVENTH}
    expected = [oracle(model, prompt, **options) for prompt in PROMPTS[:3]]
    assert all(map(same, model.generate(PROMPTS[:3], exit_control=control, **options), expected))


def test_a_cache_past_the_original_positions():
    """Under dynamic scaling a prompt's tables are as long as the cache, which a runner rounds up."""
    scaling = (("rope_type", "dynamic"), ("factor", 8.0))
    model = random_model(rope_scaling=scaling, max_position_embeddings=32)
    prompt, options = random_prompt(40), {"max_new_tokens": 20, "threshold": 0.6}
    expected = oracle(model, prompt, **options)
    for control in CONTROLS:
        assert same(model.generate(prompt, exit_control=control, **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"return_logits": True},
        {"return_logits": True, "temperature": 1.0},
        {"temperature": 1.0, "top_k": 9, "return_logits": False},
        {"temperature": 1.0, "top_p": 0.8, "return_logits": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", [{"threshold": 0.7}, {"mode": "full"}, {"mode": "full_w4"}], ids=str)
@pytest.mark.parametrize("control", CONTROLS)
def test_logits(model, options, mode, control):
    """Those that draw the next token, and by teacher forcing the same again."""
    options = {"max_new_tokens": 16, "stop_tokens": EVERY_SEVENTH, **options, **mode}
    outputs = model.generate(PROMPTS[:3], exit_control=control, **options)
    assert facts(outputs) == facts(model.generate(PROMPTS[:3], **options | {"return_logits": False}))
    rule = {name: value for name, value in mode.items() if name in ("threshold", "mode")}
    for prompt, out in zip(PROMPTS, outputs, strict=False):
        if not options["return_logits"]:
            assert out.logits is None
            continue
        scored = model.score([*prompt, *out.tokens], prompt_length=len(prompt), **rule)
        assert torch.equal(out.logits, scored.logits)


def test_top_k_without_a_temperature_filters_nothing(model):
    options = {"max_new_tokens": 6, "top_k": 3, "top_p": 0.5, "min_p": 0.3}
    assert facts(model.generate(PROMPTS[1], exit_control="device", **options)) == facts(
        model.generate(PROMPTS[1], **options)
    )


@pytest.mark.parametrize("policy", ["row", "min"])
@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_stop_strings(policy, threshold):
    """In a batch, one row of which ends by a stop string that the device knows nothing of."""
    prompts = [QUESTION, "def add(x):", "Question: Tom"]
    options = {"max_new_tokens": 24, "threshold": threshold, "stop_tokens": (), "batch_policy": policy}
    whole = demo_model().generate(prompts, **options)
    for stop in (whole[0].text[4:7], [whole[1].text[2:5], "zz"]):
        host, device = (
            demo_model().generate(prompts, stop=stop, exit_control=control, **options) for control in CONTROLS
        )
        assert {output.finish_reason for output in host} == {"stop", "length"}
        assert facts(device) == facts(host)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize(
    "options", [{}, {"stop": "1"}, {"mode": "full"}, {"temperature": 2.0, "seed": 3}, {"max_new_tokens": 1}]
)
def test_streams(control, options):
    options = {"max_new_tokens": 30, **options}
    expected = demo_model().generate(QUESTION, **options)  # by the host
    stream = demo_model().stream(QUESTION, exit_control=control, **options)
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == expected.text
    assert facts(stream.output) == facts(expected)


# --- what is captured -----------------------------------------------------------------------------------


def part(first, depth, mixed=False):
    return (backbone_part, first, depth, mixed)


def tail(depth, filters=False, logits=False, river_head=False):
    return (tail_part, depth, filters, logits, river_head)


CAPTURED = {
    "full": ({"mode": "full"}, {part(0, 4), tail(4)}),
    "full_w4": ({"mode": "full_w4"}, {tail(0)}),
    "full_w4, its head": ({"mode": "full_w4", "river_head": "w4"}, {tail(0, river_head=True)}),
    "first": ({"threshold": -2}, {part(0, 1), tail(1)}),
    "no decision before min_layers": ({"threshold": -2, "min_layers": 3}, {part(0, 3), tail(3)}),
    "no decision at the last layer": ({"threshold": -2, "min_layers": 4}, {part(0, 4), tail(4)}),
    "never met": (
        {"threshold": 0.9999, "min_layers": 2},
        {part(0, 2), part(2, 3), part(3, 4), tail(4)},
    ),
    "logits, full": ({"mode": "full", "return_logits": True}, {part(0, 4), tail(4, logits=True)}),
    "logits": ({"threshold": -2, "return_logits": True}, {part(0, 1), tail(1, logits=True)}),
}


@pytest.mark.parametrize(("options", "expected"), CAPTURED.values(), ids=CAPTURED)
def test_host_graphs(model, options, expected):
    model.generate(PROMPTS[1], max_new_tokens=6, exit_control="host", **options)
    assert graphs(model, "host") == expected


def test_host_graphs_of_one_depth_are_shared_and_captured_when_needed(model):
    """Depths 1 and 2 occur: two parts of the backbone, and a tail for each."""
    output = model.generate(PROMPTS[1], max_new_tokens=24, threshold=0.5, exit_control="host")
    assert set(output.exit_depths[1:]) == {1, 2}
    assert graphs(model, "host") == {part(0, 1), part(1, 2), tail(1), tail(2)}


def test_rows_on_both_paths_take_a_part_of_their_own(model):
    """One row leaves after a layer, the other never does."""
    options = {"max_new_tokens": 6, "threshold": [-2, math.inf], "exit_control": "host"}
    outputs = model.generate(PROMPTS[1:3], **options)
    assert [out.exit_depths[1:] for out in outputs] == [[1] * 5, [4] * 5]
    assert graphs(model, "host") == {part(0, 1), part(1, 4, mixed=True), tail(4)}


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ({"mode": "full"}, 0),
        ({"mode": "full_w4"}, 0),
        ({"threshold": -2}, 1),
        ({"threshold": -2, "min_layers": 4}, 0),
        ({"threshold": 0.9999, "min_layers": 2}, 2),
    ],
)
def test_the_host_waits_where_it_decides_and_for_the_token(model, monkeypatch, options, waits):
    polls, poll = [], Runner.poll
    monkeypatch.setattr(Runner, "poll", lambda *a: polls.append(1) or poll(*a))
    model.generate(PROMPTS[1], max_new_tokens=6, exit_control="host", **options)
    assert len(polls) == 5 * (waits + 1)


def test_the_device_has_one_graph_for_every_rule(model):
    model.generate(PROMPTS[1], max_new_tokens=8, exit_control="device")
    captured = graphs(model, "device")
    assert captured == {(whole_steps, count, False, False, False) for count in (2, 1)}, "seven steps"
    for options in ({"mode": "full"}, {"mode": "full_w4"}, {"temperature": 1.0}, {"min_layers": 3}):
        model.generate(PROMPTS[1], max_new_tokens=8, exit_control="device", **options)
    assert graphs(model, "device") == captured


@pytest.mark.parametrize("control", CONTROLS)
def test_both_heads_run_only_where_rows_differ(model, monkeypatch, uncaptured, control):
    calls, packed, dense = [], ops.lm_head_w4, ops.lm_head
    monkeypatch.setattr(ops, "lm_head_w4", lambda *a, **k: calls.append("w4") or packed(*a, **k))
    monkeypatch.setattr(ops, "lm_head", lambda *a, **k: calls.append("model") or dense(*a, **k))
    for heads in (["model"] * 2, ["w4"] * 2, ["w4", "model"]):
        engine = model.engine(slots=2, exit_control=control)
        for head in heads:
            engine.submit(PROMPTS[1], mode="full_w4", river_head=head, max_new_tokens=5)
        calls.clear()
        list(engine)
        steps = [calls.count(head) - heads.count(head) for head in ("model", "w4")]  # without the prefills'
        assert steps == [4 * (head in heads) for head in ("model", "w4")]


@pytest.mark.parametrize("control", CONTROLS)
def test_one_graph_serves_all_filters_and_another_none(model, control):
    """Values of an earlier run do not stay: each run gives what requests get alone."""
    common = {"max_new_tokens": 8, "mode": "full"}
    filters = [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 9, "top_p": 0.9, "min_p": 0.1}]
    captured = []
    for options in (*filters, {}):
        options = {"temperature": 1.5, **common, **options}
        expected = [oracle(model, prompt, **options) for prompt in PROMPTS[:3]]
        assert all(map(same, model.generate(PROMPTS[:3], exit_control=control, **options), expected))
        captured.append({key for key in graphs(model, control) if key[0] is not backbone_part})
    filtered, plain = captured[0], captured[-1] - captured[0]
    assert captured[:-1] == [filtered] * len(filters)
    assert {key[2] for key in filtered} == {True}
    assert plain == {(*key[:2], False, *key[3:]) for key in filtered}


def test_a_capture(monkeypatch):
    """What a GPU is asked for: one run between begin and end, and replays that run nothing."""
    calls = []

    class CUDAGraph:
        def capture_begin(self, pool, capture_error_mode):
            calls.append(("begin", pool, capture_error_mode))

        def capture_end(self):
            calls.append("end")

        def replay(self):
            calls.append("replay")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    captured = graph.Graph(lambda: calls.append("run") or (1, 2), captured=True, pool="a pool")
    captured.replay()
    captured.replay()
    assert calls == [("begin", "a pool", "thread_local"), "run", "end", "replay", "replay"]
    assert captured.outputs == (1, 2)
    calls.clear()
    graph.Graph(lambda: calls.append(gc.isenabled()), captured=True, pool="a pool")
    assert calls[1] is False, "what is collected may wait for a stream, which a capture forbids"

    def void(self):
        calls.append("void")
        raise RuntimeError("the capture is void")

    monkeypatch.setattr(CUDAGraph, "capture_end", void)
    with pytest.raises(ZeroDivisionError):  # which says more
        graph.Graph(lambda: 1 / 0, captured=True, pool="a pool")
    assert calls[-1] == "void" and gc.isenabled()


# --- running ahead --------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 10])
@pytest.mark.parametrize("batch", [1, 3])
def test_no_step_past_the_limit(model, replays, new_tokens, batch):
    outputs = model.generate(PROMPTS[:batch], max_new_tokens=new_tokens, exit_control="device")
    assert lengths(outputs) == [new_tokens] * batch
    assert replays == [whole_steps] * (new_tokens - 1)
    if new_tokens > 1:
        (runner,) = runners(model, "device").values()
        assert (runner.slots == -1).all(), "the device has ended the rows as well"


@pytest.fixture(params=[0, 1], ids=["single steps", "paired steps"])
def pairs(request):
    before = ops._C.set_variant("paired_steps", request.param)
    yield request.param
    ops._C.set_variant("paired_steps", before)


def in_flight(count, pairs):
    """Steps that have been replayed when the host waits for step `count`, if no limit is near."""
    steps = count + decoder.RUN_AHEAD
    return steps + steps % 2 if pairs else steps


@pytest.mark.parametrize("new_tokens", [2, 3, 20, 21])
def test_how_far_ahead(model, replays, pairs, new_tokens):
    stream = model.stream(PROMPTS[1], max_new_tokens=new_tokens, exit_control="device")
    for count, _ in enumerate(stream):
        assert len(replays) == (0 if count == 0 else min(in_flight(count, pairs), new_tokens - 1))
    assert 0 < decoder.RUN_AHEAD + pairs < graph.RECORDS, "a record is read before it is written again"


@pytest.mark.parametrize("options", [{"threshold": 0.5}, {"stop_tokens": EVERY_SEVENTH}])
@pytest.mark.parametrize("policy", ["row", "min"])
def test_pairs_of_steps_change_nothing(model, pairs, options, policy):
    options = {"max_new_tokens": 13, "threshold": 0.7, "batch_policy": policy} | options
    for batch in (1, 3):
        host = facts(model.generate(PROMPTS[:batch], **options))
        assert facts(model.generate(PROMPTS[:batch], exit_control="device", **options)) == host


def test_steps_after_the_last_stop_token_are_few(model, replays, pairs):
    output = model.generate(PROMPTS[1], max_new_tokens=30, exit_control="device", stop_tokens=EVERY_SEVENTH)
    steps = len(output.tokens) - 1
    assert output.finish_reason == "stop" and 0 < steps < 20
    assert len(replays) == in_flight(steps, pairs)


def test_no_step_ahead_of_a_stop_string_where_rows_leave_together(replays):
    """The row that it ends takes no part in what the others do next."""
    options = {"max_new_tokens": 12, "stop_tokens": (), "stop": "\N{SNOWMAN}"}
    for policy, prompts, ahead in (("min", 2, False), ("min", 1, True), ("row", 2, True)):
        replays.clear()
        engine = demo_model().engine(slots=prompts, max_len=256, batch_policy=policy, exit_control="device")
        for prompt in [QUESTION, "def f"][:prompts]:
            engine.submit(prompt, **options)
        for _ in range(prompts):
            engine.step()
        assert replays == []
        for steps in range(1, 12):
            engine.step()
            assert len(replays) == (min(11, in_flight(steps, pairs=True)) if ahead else steps)
        assert engine.step() == []


@pytest.mark.parametrize("control", CONTROLS)
def test_nothing_is_written_where_a_row_has_ended(model, control):
    options = {"max_new_tokens": 24, "stop_tokens": EVERY_SEVENTH}
    model.generate(PROMPTS[:3], exit_control=control, **options)
    cache = idle(model)._memory.cache
    for written in (cache.k, cache.v):
        written.fill_(math.nan)
    outputs = model.generate(PROMPTS[:3], exit_control=control, **options)
    assert idle(model)._memory.cache is cache
    assert len(set(lengths(outputs))) > 1
    for slot, (prompt, output) in enumerate(zip(PROMPTS, outputs, strict=False)):
        end = len(prompt) + len(output.tokens) - 1  # the last token is not fed back
        expected = oracle(model, prompt, **options)[-1]
        for written, right in ((cache.k, expected.k), (cache.v, expected.v)):
            assert torch.equal(written[:, slot, :, :end], right[:, 0, :, :end])
            assert written[:, slot, :, end:].isnan().all()
    assert cache.k[:, 3].isnan().all(), "the slot of the row that fills up the batch"


# --- engines that are lent ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "length", "slots"),
    [(1, 40, 1), (2, 40, 2), (3, 40, 4), (4, 9, 4), (5, 9, 8), (8, 9, 8), (9, 9, 8)],
)
def test_sizes_of_an_engine(model, batch, length, slots):
    model.generate([[1] * length] * batch, max_new_tokens=3, exit_control="host")
    engine = idle(model)
    cache = engine._memory.cache
    assert (engine.slots, engine.max_len) == (cache.slots, cache.max_len) == (slots, 64), "as the model has"
    assert all(runner.stop_tokens.shape == (rows, 16) for rows, runner in runners(model, "host").items())


def test_lengths_are_rounded_up():
    model = random_model(max_position_embeddings=600)
    for length, positions in ((1, 256), (256, 256), (257, 512), (512, 512), (513, 600), (598, 600)):
        model._engines.idle.clear()
        model.generate([1] * length, max_new_tokens=1)
        assert idle(model).max_len == positions


@pytest.mark.parametrize("control", CONTROLS)
def test_a_runner_grows_with_the_stop_tokens(model, control):
    for count, columns in ((0, 16), (16, 16), (17, 32), (3, 32)):
        model.generate(PROMPTS[1], max_new_tokens=3, stop_tokens=range(80 - count, 80), exit_control=control)
        assert {runner.stop_tokens.shape[1] for runner in runners(model, control).values()} <= {columns}


def test_an_engine_is_used_again_if_the_next_call_fits():
    model = random_model(max_position_embeddings=600)
    model._engines.idle.clear()

    def run(batch, length, **options):
        options = {"max_new_tokens": 5, "threshold": 0.7, **options}
        prompt = PROMPTS[2][:length] * 30
        for control in CONTROLS:
            outputs = model.generate([prompt] * batch, exit_control=control, **options)
            expected = oracle(model, prompt, **{k: v for k, v in options.items() if k != "batch_policy"})
            assert all(same(output, expected) for output in outputs)
        return idle(model)

    first = run(3, 5)
    for batch, length, options in [
        (4, 8, {}),
        (3, 2, {"mode": "full"}),
        (4, 1, {"temperature": 1.0}),
        (4, 1, {"temperature": 1.0, "top_k": 7}),
        (3, 5, {"stop_tokens": range(17)}),
    ]:
        assert run(batch, length, **options) is first
    for batch, length, options in [(2, 5, {}), (5, 5, {}), (3, 10, {}), (3, 5, {"batch_policy": "min"})]:
        before = idle(model)
        assert run(batch, length, **options) is not before
    assert run(1, 10) is run(1, 1, stop_tokens=range(3)), "a longer one serves"


@pytest.mark.parametrize("control", CONTROLS)
def test_stop_tokens_of_another_run_stop_nothing(model, control):
    options = {"max_new_tokens": 12, "exit_control": control}
    first = model.generate(PROMPTS[:2], **options)
    engine, stop_tokens = idle(model), first[0].tokens[2:]
    assert len(model.generate(PROMPTS[:2], stop_tokens=stop_tokens, **options)[0].tokens) == 3
    assert facts(model.generate(PROMPTS[:2], **options)) == facts(first)
    assert idle(model) is engine


@pytest.mark.parametrize("control", CONTROLS)
def test_an_engine_comes_back_idle(model, monkeypatch, control):
    """Nobody may take it, or free it, while its steps are in flight."""
    waited = []

    def synchronise(self):
        waited.append(len(model._engines.idle))

    monkeypatch.setattr(Memory, "synchronise", synchronise)
    model.generate(PROMPTS[1], max_new_tokens=3, exit_control=control)
    assert waited == [0, 0], "before the first step, and after the last one"
    assert len(model._engines.idle) == 1


def test_an_engine_waits_for_its_steps_before_it_is_freed(model, monkeypatch):
    waited, engine = [], model.engine(slots=1, max_len=32, exit_control="device")
    engine.submit(PROMPTS[1], max_new_tokens=9)
    engine.step()
    engine.step()
    monkeypatch.setattr(Memory, "synchronise", lambda memory: waited.append(True))
    del engine
    assert waited == [True]


def test_logits_are_copied_on_the_stream_of_the_caller(model, monkeypatch):
    """Whose they are from then on; the next step waits for the copy."""
    calls, memory = [], Memory(model.network, 1, 8)
    monkeypatch.setattr(Memory, "lead_caller", lambda memory: calls.append("lead"))
    monkeypatch.setattr(Memory, "follow_caller", lambda memory: calls.append("follow"))

    class Logits:
        def clone(self):
            calls.append("clone")

    HostDecoder(memory).copied(Logits())
    assert calls == ["lead", "clone", "follow"]


def test_an_engine_that_does_not_fit_makes_room_first(model, monkeypatch):
    model.generate(PROMPTS[0], max_new_tokens=3, exit_control="device")
    old, alive = weakref.ref(idle(model)._memory.cache), []
    new = graph.KVCache

    def made(*arguments):
        alive.append(old() is not None)
        return new(*arguments)

    monkeypatch.setattr(graph, "KVCache", made)
    model.generate(PROMPTS[:2], max_new_tokens=3, exit_control="device")
    assert alive == [False]


@pytest.mark.parametrize("controls", [CONTROLS, ("device", "device"), ("host", "host")])
def test_streams_of_one_model_take_turns(model, controls):
    options = {"max_new_tokens": 12, "threshold": 0.6}
    expected = [oracle(model, prompt, **options) for prompt in PROMPTS[1:3]]
    streams = [
        model.stream(prompt, exit_control=control, **options)
        for prompt, control in zip(PROMPTS[1:3], controls, strict=True)
    ]
    for pieces in zip(*streams, strict=True):
        assert len(pieces) == 2
    assert all(same(stream.output, right) for stream, right in zip(streams, expected, strict=True))
    assert len(model._engines.idle) == 1, "one of the two is kept"


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_abandoned_stream_gives_its_engine_back(model, control, steps):
    options = {"max_new_tokens": 20, "threshold": 0.7}
    stream = model.stream(PROMPTS[2], temperature=1.0, exit_control=control, **options)
    for _ in range(steps):
        next(stream)
    assert not model._engines.idle
    del stream
    assert len(model._engines.idle) == min(steps, 1), "a stream that never began has borrowed none"
    kept = list(model._engines.idle)
    output = model.generate(PROMPTS[1], exit_control=control, **options)
    assert same(output, oracle(model, PROMPTS[1], **options))
    assert not kept or idle(model) is kept[0]


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_gives_its_engine_back(model, monkeypatch, uncaptured, control, error):
    """In the middle of a step, with a row more: what it leaves behind does not reach the next run."""
    options = {"max_new_tokens": 12, "threshold": 0.7, "exit_control": control}
    expected = facts(model.generate(PROMPTS[:3], **options))
    engine, head, calls = idle(model), ops.lm_head, []

    def failing(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 7:
            raise error("in the third step")
        return head(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "lm_head", failing)
        with pytest.raises(error, match="third"):
            model.generate(PROMPTS[:4], **options | {"threshold": math.inf})
    assert idle(model) is engine
    assert facts(model.generate(PROMPTS[:3], **options)) == expected


@pytest.mark.parametrize("control", CONTROLS)
def test_longer_rope_tables_leave_an_engine_its_own(control):
    model = random_model(max_position_embeddings=600)
    options = {"max_new_tokens": 8, "threshold": 0.6}
    stream = model.stream(PROMPTS[1], exit_control=control, **options)
    next(stream)
    model.generate([1] * 500, max_new_tokens=3)
    assert len(model.network.rope(1)[0]) >= 502
    list(stream)
    assert same(stream.output, oracle(model, PROMPTS[1], **options))


@pytest.mark.parametrize(
    ("control", "lost"), [("host", backbone_part), ("host", tail_part), ("device", whole_steps)]
)
def test_a_part_without_a_result_ends_the_run(model, monkeypatch, control, lost):
    """Results of an earlier run on the same runner are not mistaken for it."""
    options = {"max_new_tokens": 3, "threshold": 0.5, "exit_control": control}
    model.generate(PROMPTS[1], **options)
    replay = Runner.replay

    def lossy(self, part, *arguments):
        return None if part is lost else replay(self, part, *arguments)

    monkeypatch.setattr(Runner, "replay", lossy)
    with pytest.raises(RiverError, match="no result from cpu after 1000 polls"):
        model.generate(PROMPTS[1], **options)


def test_patience(model, monkeypatch):
    """With a device that goes on and on."""

    class Stream:
        def query(self):
            return False

    runner = Runner(Memory(model.network, 1, 8), 1, 0, False)
    runner.memory.stream = Stream()
    monkeypatch.setattr(graph, "PATIENCE", 0.05)
    with pytest.raises(RiverError, match="no result from cpu"):
        runner.poll(lambda: 0, lambda value: value == 1)
    values = iter(range(5000))
    assert runner.poll(lambda: next(values), lambda value: value == 4000) == 4000


# --- which decoder --------------------------------------------------------------------------------------


def test_an_engine_that_is_used_again_takes_the_control_of_the_call(model, replays):
    for control in ("host", "device", "host"):
        replays.clear()
        model.generate(PROMPTS[1], max_new_tokens=4, exit_control=control)
        assert (whole_steps in replays) == (control == "device")


def test_auto(model):
    """The host where a CPU has nothing to decide: no row can leave, or all of them do at once."""
    engine = model.engine(slots=1, max_len=8)

    def chosen(device, control, **options):
        asked = request(model.config, None, [1], {"max_new_tokens": 2, **options})
        engine._decoders.on_gpu = device == "cuda"
        engine.use(control)
        return type(engine._decoders.choose([Row(1, 1, 0, asked, 1)]))

    assert chosen("cpu", "auto") is DeviceDecoder
    for nothing in ({"mode": "full"}, {"mode": "full_w4"}, {"threshold": math.inf}, {"threshold": 1.0}):
        assert chosen("cpu", "auto", **nothing) is HostDecoder
        assert chosen("cpu", "device", **nothing) is DeviceDecoder
        assert chosen("cuda", "auto", **nothing) is DeviceDecoder
    assert chosen("cuda", "auto") is DeviceDecoder
    for device in ("cpu", "cuda"):
        assert chosen(device, "host") is HostDecoder
