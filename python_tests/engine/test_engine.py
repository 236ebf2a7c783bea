"""The engine: requests come and go, each with what it gets alone, and nothing that one does harms another."""

import itertools
import math
import random
import sys
import threading
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from oracle import oracle, same
from tiny_model import demo_model, random_model, random_prompt

from river_ext.engine import engine as engine_module
from river_ext.engine.decoder import RUN_AHEAD
from river_ext.engine.prefill import OpsPrompt, Prefill
from river_ext.errors import RiverError

LAYERS, VOCAB, POSITIONS = 4, 80, 64
CONTROLS = ("host", "device")
BY_LAYER = ([math.inf, 0.6, -2, 0.5], [0.7, 1.0, 0.4, -2], [0.5, 0.7, 0.9, math.inf])  # thresholds
QUESTION = "Question: Ana has 21 coins and buys 12 more at the fair. How many coins does Ana have?\nAnswer:"


def random_request(generator: random.Random):
    """A prompt and options of every kind that the engine has."""
    prompt = random_prompt(generator.randint(1, 14), generator.randrange(1 << 30))
    mode = generator.choice(["river"] * 4 + ["full", "full_w4"])
    options = {
        "max_new_tokens": generator.randint(1, 24),
        "threshold": generator.choice([-2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95, math.inf, *BY_LAYER]),
        "min_layers": generator.randint(1, LAYERS),
        "mode": mode,
        "temperature": generator.choice([0.0, 0.0, 0.7, 1.5]),
        "top_k": generator.choice([0, 0, 5]),
        "top_p": generator.choice([1.0, 1.0, 0.8]),
        "min_p": generator.choice([0.0, 0.0, 0.05]),
        "seed": generator.randint(-5, 5),
        "stop_tokens": generator.choice([(), tuple(range(0, VOCAB, 7)), (3,), tuple(range(20, 45))]),
    }
    if mode == "river":
        options["prefill"] = generator.choice(["full", "full", "min", "last", "depth:0", "depth:3"])
    return prompt, options


def drain(engine, outputs):
    for event in engine:
        if event.output:
            outputs[event.id] = event.output
    return outputs


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_requests_of_every_kind_get_what_they_get_alone(control, slots):
    """100 of them through the slots; the oracle does not know the engine."""
    model, generator = random_model(), random.Random(slots)
    requests = [random_request(generator) for _ in range(100)]
    engine = model.engine(slots=slots, max_len=POSITIONS, exit_control=control)
    for number, (prompt, options) in enumerate(requests):
        engine.submit(prompt, id=number, **options)
    outputs = drain(engine, {})
    assert len(outputs) == 100
    wrong = [n for n, (prompt, options) in enumerate(requests)
             if not same(outputs[n], oracle(model, prompt, **options))]  # fmt: skip
    assert wrong == []
    depths = {depth for output in outputs.values() for depth in output.exit_depths}
    assert depths == set(range(LAYERS + 1)), "every depth occurs"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("control", CONTROLS)
def test_requests_that_come_and_go_at_any_time(monkeypatch, dtype, control):
    """Submitted between steps, some of them cancelled, prompts prefilled a few rows at a time."""
    monkeypatch.setitem(engine_module.PREFILL_ROWS, "cpu", 2)
    model, generator = random_model(dtype=dtype), random.Random(7)
    engine = model.engine(slots=4, max_len=POSITIONS, exit_control=control)
    requests, pieces, outputs, cancelled = [], {}, {}, set()
    while len(outputs) < 60:
        for _ in range(generator.choice([0, 0, 1, 3])):
            if len(requests) < 60:
                prompt, options = random_request(generator)
                options["return_logits"] = generator.random() < 0.2
                requests.append((prompt, options))
                engine.submit(prompt, id=len(requests) - 1, **options)
        if generator.random() < 0.1 and (running := [n for n in range(len(requests)) if n not in outputs]):
            number = generator.choice(running)
            if number not in cancelled:
                engine.cancel(number)
                cancelled.add(number)
        for event in engine.step():
            assert event.id not in outputs, "nothing after the last event"
            if event.piece:
                pieces.setdefault(event.id, []).append(event.piece.token)
            if event.output:
                outputs[event.id] = event.output
    assert cancelled and not engine.busy
    for number, (prompt, options) in enumerate(requests):
        output, expected = outputs[number], oracle(model, prompt, **options)
        assert pieces.get(number, []) == output.tokens
        if output.finish_reason == "cancelled":
            assert number in cancelled
            for got, right in zip(
                (output.tokens, output.exit_depths, output.similarities), expected, strict=False
            ):
                assert got == right[: len(got)] and len(output.tokens) < options["max_new_tokens"]
        else:
            assert same(output, expected)
            assert (output.logits is not None) == options["return_logits"]


def test_a_cache_is_that_of_the_request_alone():
    """Every position, in every layer, whatever ran beside it."""
    model, generator = random_model(), random.Random(3)
    engine = model.engine(slots=8, max_len=POSITIONS)
    requests = [random_request(generator) for _ in range(8)]
    for number, (prompt, options) in enumerate(requests):
        engine.submit(prompt, id=number, **options)
    outputs = drain(engine, {})
    for slot, (prompt, options) in enumerate(requests):
        *_, cache = oracle(model, prompt, **options)
        end = len(prompt) + len(outputs[slot].tokens) - 1
        for written, right in ((engine._memory.cache.k, cache.k), (engine._memory.cache.v, cache.v)):
            assert torch.equal(written[:, slot, :, :end], right[:, 0, :, :end])


def test_a_step_that_has_nothing_to_do():
    engine = random_model().engine(slots=2, max_len=16)
    assert engine.step() == [] and list(engine) == [] and not engine.busy


def test_more_requests_than_slots_wait_in_their_order():
    engine = random_model().engine(slots=2, max_len=16)
    ids = [engine.submit([1, 2], max_new_tokens=3) for _ in range(6)]
    assert len(set(ids)) == 6
    ends = [event.id for event in engine if event.output]
    assert ends == ids


@pytest.mark.parametrize("mode", ["full", "lossless"])
def test_long_prompts_do_not_hold_up_those_that_decode(monkeypatch, mode):
    """Between two steps of a running request, no more than a few rows of another's prompt."""
    monkeypatch.setitem(engine_module.PREFILL_ROWS, "cpu", 8)
    monkeypatch.setattr(OpsPrompt, "rows_at_a_time", 8)
    model = random_model(max_position_embeddings=512)
    engine = model.engine(slots=2, max_len=512)
    engine.submit([1], id="running", max_new_tokens=300, mode=mode)
    while not engine.step():
        pass
    engine.submit(random_prompt(200), id="long", max_new_tokens=2)
    steps = 0
    while "long" not in (ids := [event.id for event in engine.step()]):
        steps += "running" in ids
    assert 20 <= steps <= 26, "200 rows, eight at a time"


def test_seconds_of_a_prompt_are_those_of_all_its_pieces(monkeypatch):
    monkeypatch.setitem(engine_module.PREFILL_ROWS, "cpu", 8)
    monkeypatch.setattr(OpsPrompt, "rows_at_a_time", 8)
    engine = random_model().engine(slots=2, max_len=POSITIONS)
    engine.submit([1], max_new_tokens=20)
    engine.step()
    engine.submit(random_prompt(32), id="long", max_new_tokens=1)
    clock = itertools.count()  # a second passes between two looks
    monkeypatch.setattr(engine_module.time, "perf_counter", lambda: next(clock))
    pieces, advance = [], Prefill.advance
    monkeypatch.setattr(Prefill, "advance", lambda *a: pieces.append(1) or advance(*a))
    output = drain(engine, {})["long"]
    assert output.stats.prefill_seconds == len(pieces) > 1


def test_who_joins_waits_for_the_steps_in_flight_alone():
    """Those that the device has begun before; no others are begun meanwhile."""
    engine = random_model().engine(slots=2, max_len=POSITIONS, exit_control="device")
    engine.submit([1], id="running", max_new_tokens=60)
    for _ in range(3):
        engine.step()
    engine.submit([2], id="joins", max_new_tokens=9)
    counts = []
    while engine.busy:
        counts += [event.id for event in engine.step()]
    first, second = (n for n, id in enumerate(counts) if id == "joins" and counts[:n].count("joins") < 2)
    assert counts[first:second].count("running") <= RUN_AHEAD + 2


def test_events_and_pieces_of_text():
    model = demo_model()
    engine = model.engine(slots=2, max_len=256)
    alone = model.generate(QUESTION, max_new_tokens=48)
    engine.submit(QUESTION, id="a", max_new_tokens=48)
    engine.submit("def add(x):", id="b", max_new_tokens=20)
    events = [event for event in engine if event.id == "a"]
    assert "".join(event.piece.text for event in events) == alone.text
    assert [event.output is not None for event in events] == [False] * (len(alone.tokens) - 1) + [True]
    assert events[-1].output.text == alone.text
    assert events[-1].output.stats.new_tokens == len(alone.tokens)


def test_what_is_refused_when_submitted():
    engine = random_model().engine(slots=2, max_len=16)
    kept = engine.submit([1, 2, 3], max_new_tokens=4)
    for prompt, options, message in (
        ([1] * 10, {"max_new_tokens": 8}, "a prompt of 10 tokens and max_new_tokens=8 need 17 positions of a "
         "slot; this engine has 2 slots of 16"),
        ([80], {}, "prompt holds 80"),
        ([], {}, "prompt is empty"),
        ([1], {"threshold": math.nan}, "threshold=nan"),
        ([1], {"threshold": [0.5]}, r"threshold=\[0.5\]"),
        ([1], {"id": kept}, "the request 0 was submitted before, and has not ended"),
        ([1], {"id": []}, "id is a list"),
        ([[1], [2]], {}, r"prompt holds \[1\]"),
    ):  # fmt: skip
        with pytest.raises(RiverError, match=message):
            engine.submit(prompt, **{"max_new_tokens": 4, **options})
    with pytest.raises(TypeError, match="no argument .temprature.; .* did you mean temperature"):
        engine.submit([1], temprature=1.0)
    (output,) = drain(engine, {}).values()
    assert same(output, oracle(random_model(), [1, 2, 3], max_new_tokens=4))
    assert engine.submit([1], id=kept, max_new_tokens=1) == kept, "it has ended: its id is free"


@pytest.mark.parametrize("mode", ["full", "lossless"])
def test_a_request_may_fill_its_slot(mode):
    """To the last position: the last new token needs none."""
    model, prompt = random_model(), random_prompt(9)
    engine = model.engine(slots=1, max_len=16)
    engine.submit(prompt, id=0, max_new_tokens=8, mode=mode)
    assert same(drain(engine, {})[0], oracle(model, prompt, max_new_tokens=8, mode="full"))
    with pytest.raises(RiverError, match="need 17 positions"):
        engine.submit(prompt, max_new_tokens=9, mode=mode)


def test_cancelling():
    engine = random_model().engine(slots=1, max_len=16)
    running, waiting = (engine.submit([1, 2], max_new_tokens=8) for _ in range(2))
    engine.step()
    engine.cancel(waiting)
    with pytest.raises(RiverError, match=f"no request {waiting} to cancel"):
        engine.cancel(waiting)
    (event, *_) = engine.step()
    assert (event.id, event.piece, event.output.finish_reason) == (waiting, None, "cancelled")
    assert event.output.tokens == []
    outputs = drain(engine, {})
    assert outputs[running].finish_reason == "length" and len(outputs[running].tokens) == 8
    for ended in (running, waiting, "never"):
        with pytest.raises(RiverError, match="no request"):
            engine.cancel(ended)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_slot_is_free_again_after_a_cancelled_request(control):
    """What was in flight for it does not reach the next request in its place."""
    model = random_model()
    engine = model.engine(slots=1, max_len=POSITIONS, exit_control=control)
    for length in (1, 2, 5):
        engine.submit(random_prompt(6, 1), id="first", max_new_tokens=40)
        for _ in range(length):
            engine.step()
        engine.cancel("first")
        engine.submit(random_prompt(3, 2), id="second", max_new_tokens=12, threshold=0.6)
        outputs = drain(engine, {})
        assert outputs["first"].finish_reason == "cancelled" and len(outputs["first"].tokens) == length
        expected = oracle(model, random_prompt(3, 2), max_new_tokens=12, threshold=0.6)
        assert same(outputs["second"], expected)


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("mode", ["river", "lossless"])
@pytest.mark.parametrize("control", CONTROLS)
def test_nothing_is_left_after_clear(monkeypatch, control, mode, steps):
    """Wherever requests were: in the queue, at their prompts, about to decode, decoding."""
    monkeypatch.setitem(engine_module.PREFILL_ROWS, "cpu", 2)
    model = random_model()
    engine = model.engine(slots=3, max_len=POSITIONS, exit_control=control)
    for seed in range(4):
        engine.submit(random_prompt(9, seed), mode=mode, max_new_tokens=30)
    for _ in range(steps):
        engine.step()
    engine.clear()
    assert not engine.busy and engine.step() == []
    expected = {
        seed: oracle(model, random_prompt(5, seed), max_new_tokens=9, mode="full") for seed in range(2)
    }
    for seed in expected:
        engine.submit(random_prompt(5, seed), id=seed, mode="full", max_new_tokens=9)
    outputs = drain(engine, {})
    assert outputs.keys() == expected.keys() and all(same(outputs[n], expected[n]) for n in expected)


def test_a_closed_engine():
    with random_model().engine(slots=2, max_len=16) as engine:
        engine.submit([1], max_new_tokens=8)
        engine.submit([2], max_new_tokens=8)
        engine.submit([3], max_new_tokens=8)
        engine.step()
    engine.close()
    assert not engine.busy and list(engine) == []
    submit = partial(engine.submit, [1], max_new_tokens=1)
    for call in (engine.step, submit, partial(engine.cancel, 0), engine.clear):
        with pytest.raises(RiverError, match="the engine is closed"):
            call()


def test_a_request_that_fails_ends_alone():
    """Half precision overflows for one prompt: the others go on."""
    model = random_model(dtype=torch.float16)
    model.network.embed_tokens[7] = math.inf
    try:
        engine = model.engine(slots=2, max_len=32)
        engine.submit([1, 2], id="good", max_new_tokens=6, stop_tokens=(7,))
        engine.submit([7], id="bad", max_new_tokens=6)
        outputs = drain(engine, {})
        assert outputs["bad"].finish_reason == "error" and "NaN or infinite" in outputs["bad"].error
        assert same(outputs["good"], oracle(model, [1, 2], max_new_tokens=6, stop_tokens=(7,)))
    finally:
        random_model.cache_clear()


def test_threads_submit_while_one_steps():
    model = random_model()
    engine = model.engine(slots=4, max_len=POSITIONS)
    requests = [random_request(random.Random(n)) for n in range(40)]

    def submit(numbers):
        for number in numbers:
            prompt, options = requests[number]
            engine.submit(prompt, id=number, **options)

    threads = [threading.Thread(target=submit, args=(range(start, 40, 2),)) for start in range(2)]
    for thread in threads:
        thread.start()
    outputs = {}
    while len(outputs) < 40:
        drain(engine, outputs)
    for thread in threads:
        thread.join()
    assert all(same(outputs[n], oracle(model, *requests[n][:1], **requests[n][1])) for n in range(40))


def only_under(lock, kind, *names):
    """A container whose methods of these names need the lock."""

    def checked(name):
        def method(self, *arguments):
            assert lock.locked(), f"{kind.__name__}.{name} without the lock"
            return getattr(kind, name)(self, *arguments)

        return method

    return type(kind.__name__, (kind,), {name: checked(name) for name in names})()


def test_what_threads_share_changes_under_the_lock_alone():
    """The queue and the ids, in all that a request may live through."""
    engine = random_model().engine(slots=2, max_len=POSITIONS)
    engine._queue = only_under(engine._lock, deque, "append", "popleft", "remove", "clear")
    engine._known = only_under(
        engine._lock, dict, "__setitem__", "__delitem__", "__iter__", "values", "get", "clear"
    )
    ids = [engine.submit([1, 2], max_new_tokens=n) for n in (9, 1, 9, 9)]
    engine.step()
    engine.cancel(ids[0])
    engine.cancel(ids[3])
    assert drain(engine, {}).keys() == set(ids)
    engine.submit([1], max_new_tokens=2)
    engine.clear()


def test_one_thread_steps_at_a_time(monkeypatch):
    engine, refused = random_model().engine(slots=1, max_len=16), []
    engine.submit([1], max_new_tokens=2)
    work = engine._work_on_prompts

    def meanwhile():
        with pytest.raises(RiverError, match="another thread is in a step"):
            engine.step()
        refused.append(1)
        return work()

    monkeypatch.setattr(engine, "_work_on_prompts", meanwhile)
    engine.step()
    assert refused == [1]


# --- what goes wrong in a step ------------------------------------------------------------------------------


class Cut(KeyboardInterrupt):
    """What no code of the engine catches."""


class Interrupts:
    """Raises Cut once, at call `number` that code of the engine's steps makes or gets an answer of."""

    def __init__(self, number: int):
        self.left, self.where = number, None

    def __enter__(self):
        sys.setprofile(self.look)

    def __exit__(self, *_):
        sys.setprofile(None)

    def look(self, frame, event, _):
        name, code = Path(frame.f_code.co_filename).name, frame.f_code
        if event not in ("call", "c_return") or name not in ENGINE_FILES or code.co_name == "step":
            return
        self.left -= 1
        if self.left == 0:
            self.where = f"{name}:{frame.f_lineno}"
            raise Cut


ENGINE_FILES = {path.name for path in Path(engine_module.__file__).parent.glob("*.py")} - {"sequence.py"}


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("modes", [("river", "full_w4"), ("lossless",), ("full", "lossless")], ids=str)
def test_an_interrupt_anywhere_in_a_step_changes_nothing(monkeypatch, control, modes):
    """But where a sequence takes a token: that one request ends there, see the next test."""
    monkeypatch.setitem(engine_module.PREFILL_ROWS, "cpu", 2)
    model, places = random_model(), set()
    for number in range(1, 3000, 97):
        generator = random.Random(number)
        engine = model.engine(slots=3, max_len=POSITIONS, exit_control=control)
        requests = [
            (random_prompt(generator.randint(1, 9), generator.randrange(1000)),
             {"mode": generator.choice(modes), "max_new_tokens": generator.randint(1, 6), "threshold": 0.6})
            for _ in range(6)
        ]  # fmt: skip
        for request, (prompt, options) in enumerate(requests):
            engine.submit(prompt, id=request, **options)
        outputs, interrupts = {}, Interrupts(number)
        for _ in range(200):
            with suppress(Cut), interrupts:
                for event in engine.step():
                    if event.output:
                        assert event.id not in outputs
                        outputs[event.id] = event.output
        places.add(interrupts.where)
        assert not engine.busy and sorted(engine._slots.free) == [0, 1, 2], interrupts.where
        for request, (prompt, options) in enumerate(requests):
            mode = options["mode"].replace("lossless", "full")
            expected = oracle(model, prompt, **options | {"mode": mode})
            assert same(outputs[request], expected), interrupts.where
    assert len(places) > 12


@pytest.mark.parametrize("mode", ["river", "lossless"])
def test_a_request_whose_token_cannot_be_taken_ends_alone(monkeypatch, mode):
    """A tokenizer that fails, say: the step raises, and the next one tells."""
    model = demo_model()
    options = {"max_new_tokens": 12, "mode": mode}
    alone = model.generate("def add(x):", **options)
    engine = model.engine(slots=2, max_len=256)
    engine.submit(QUESTION, id="bad", **options)
    engine.submit("def add(x):", id="good", **options)
    bad = engine._known["bad"].sequence
    feed, calls = bad._stream.feed, []

    def failing(token):
        calls.append(token)
        if len(calls) == 4:
            raise ZeroDivisionError("in the tokenizer")
        return feed(token)

    monkeypatch.setattr(bad._stream, "feed", failing)
    with pytest.raises(ZeroDivisionError):
        drain(engine, {})
    outputs = drain(engine, {})
    assert outputs["bad"].finish_reason == "error" and "in the tokenizer" in outputs["bad"].error
    assert outputs["good"].tokens == alone.tokens and outputs["good"].text == alone.text


def test_a_prompt_that_does_not_fit_the_memory_ends_alone(monkeypatch):
    model = random_model()
    advance = engine_module.Prefill.advance

    def short_of_memory(prefill, *rows):
        if len(prefill.request.prompt) == 9:
            raise MemoryError
        return advance(prefill, *rows)

    monkeypatch.setattr(engine_module.Prefill, "advance", short_of_memory)
    engine = model.engine(slots=2, max_len=POSITIONS)
    for length in (3, 9, 4):
        engine.submit(random_prompt(length), id=length, max_new_tokens=5)
    outputs = drain(engine, {})
    assert outputs[9].error == "not enough memory for the prompt (MemoryError)" and outputs[9].tokens == []
    assert all(same(outputs[n], oracle(model, random_prompt(n), max_new_tokens=5)) for n in (3, 4))


def test_short_prompts_do_not_hold_up_those_that_decode():
    """However many are waiting: after each eighth at the latest."""
    engine = random_model().engine(slots=2, max_len=16)
    engine.submit([1], id="running", max_new_tokens=8)
    while not engine.step():
        pass
    for number in range(80):
        engine.submit([2], id=number, max_new_tokens=1)
    ids = [event.id for event in engine]
    assert [place for place, id in enumerate(ids) if id == "running"] == [9 * n + 8 for n in range(7)]


@pytest.mark.parametrize("decoding", [False, True])
def test_a_short_prompt_does_not_wait_for_a_long_one(monkeypatch, decoding):
    """Also where nothing decodes; and more short ones than can be worked on do not hold up the long one."""
    monkeypatch.setitem(engine_module.PREFILL_ROWS, "cpu", 8)
    monkeypatch.setattr(OpsPrompt, "rows_at_a_time", 8)
    model = random_model(max_position_embeddings=512)
    engine = model.engine(slots=4, max_len=512)
    if decoding:
        engine.submit([1], id="running", max_new_tokens=300)
        while not engine.step():
            pass
    long = random_prompt(300)
    engine.submit(long, id="long", max_new_tokens=2, mode="full")
    events = [engine.step() for _ in range(3)]
    assert all("long" not in [event.id for event in step] for step in events)
    firsts, steps, output = {}, 0, None
    while output is None:
        engine.submit(random_prompt(16, steps), id=steps, max_new_tokens=1)
        for event in engine.step():
            firsts.setdefault(event.id, steps)
            output = event.output if event.id == "long" else output
        steps += 1
    assert firsts[0] <= 4, "two pieces of its own, two of the long one"
    assert firsts["long"] < 2 * 300 / 8 + 4, "every other piece is of the long one"
    assert same(output, oracle(model, long, max_new_tokens=2, mode="full"))


def test_a_long_prompt_can_be_cancelled_soon(monkeypatch):
    """At the next step, where it is alone, too."""
    monkeypatch.setitem(engine_module.PREFILL_ROWS, "cpu", 8)
    monkeypatch.setattr(OpsPrompt, "rows_at_a_time", 8)
    engine = random_model(max_position_embeddings=512).engine(slots=1, max_len=512)
    engine.submit(random_prompt(300), id="long", max_new_tokens=2)
    assert engine.step() == []
    engine.cancel("long")
    (event,) = engine.step()
    assert event.output.finish_reason == "cancelled" and not engine.busy


def test_prompts_do_not_keep_rows_that_leave_together_from_decoding(monkeypatch):
    """However many there are: one piece to a step of those that have begun."""
    monkeypatch.setitem(engine_module.PREFILL_ROWS, "cpu", 8)
    monkeypatch.setattr(OpsPrompt, "rows_at_a_time", 8)
    model = random_model(max_position_embeddings=512)
    engine = model.engine(slots=3, max_len=512, batch_policy="min")
    for number in range(2):
        engine.submit(random_prompt(20, number), id=number, max_new_tokens=40)
    while not any(event.id == 1 for event in engine.step()):  # both begin together
        assert len(engine._known[0].sequence.tokens) <= 1
    engine.submit(random_prompt(300), id="long", max_new_tokens=2)
    for _ in range(2):
        engine.step()
    before = len(engine._known[1].sequence.tokens)
    for _ in range(20):
        engine.step()
    assert len(engine._known[1].sequence.tokens) == before + 20
    assert not engine._known["long"].sequence.tokens


def test_rows_that_leave_together_do_not_wait_for_ever_to_begin():
    """For the prompts that have slots alone, not for those that come later."""
    engine, steps = random_model().engine(slots=2, max_len=16, batch_policy="min"), 0
    engine.submit([1, 2], id="waits", max_new_tokens=4)
    ended = False
    while not ended:
        engine.submit([2], id=steps, max_new_tokens=1)
        ended = any(event.id == "waits" and event.output for event in engine.step())
        steps += 1
        assert steps < 60


def test_closing_waits_for_the_step_of_another_thread(monkeypatch):
    engine = random_model().engine(slots=1, max_len=16)
    engine.submit([1], max_new_tokens=2)
    work, closing = engine._work_on_prompts, threading.Thread(target=engine.close)

    def meanwhile():
        closing.start()
        closing.join(0.05)
        assert closing.is_alive()
        work()

    monkeypatch.setattr(engine, "_work_on_prompts", meanwhile)
    assert len(engine.step()) == 1
    closing.join()
    assert not engine.busy


def test_a_prompt_of_arrays_of_one_token():
    """As `generate` takes them."""
    engine = random_model().engine(slots=1, max_len=16)
    engine.submit([torch.tensor(3), torch.tensor([5])[0]], id=0, max_new_tokens=4)
    assert same(drain(engine, {})[0], oracle(random_model(), [3, 5], max_new_tokens=4))


def test_an_id_that_is_no_key():
    engine = random_model().engine(slots=1, max_len=16)
    with pytest.raises(RiverError, match="id is a list; accepted: what can be a key"):
        engine.cancel([])
