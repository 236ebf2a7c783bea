"""The order of work on a GPU, on pretended streams: prompts in the caller's, steps in one of their own."""

import random

import pytest
from oracle import oracle, same
from streams import Streams
from tiny_model import random_model, random_prompt

from river_ext.engine import engine as engine_module

CONTROLS = ("host", "device")
LAYERS, POSITIONS, REQUESTS = 4, 48, 24


@pytest.fixture
def streams(monkeypatch):
    monkeypatch.setitem(engine_module.PREFILL_ROWS, "cpu", 4)
    with Streams(monkeypatch) as streams:
        yield streams


def some_requests():
    generator = random.Random(4)
    for _ in range(REQUESTS):
        mode = generator.choice(["river", "river", "full", "lossless"])
        prompt = random_prompt(generator.randint(1, 9), generator.randrange(1 << 20))
        yield prompt, mode, {
            "max_new_tokens": generator.randint(1, 14),
            "threshold": generator.choice([0.5, 0.6, 0.7, 2.0]),
            "temperature": generator.choice([0.0, 1.2]),
            "top_k": generator.choice([0, 9]),
            "stop_tokens": generator.choice([(), tuple(range(0, 80, 7))]),
            "seed": generator.randrange(9),
        }  # fmt: skip


def served(engine):
    """The outputs of requests that come while others decode. One is cancelled, and begins again."""
    requests, outputs = list(some_requests()), {}
    generator, waiting = random.Random(5), list(range(REQUESTS))
    engine.submit([1], id="cancelled", max_new_tokens=40)
    while waiting or engine.busy:
        for number in waiting[: generator.choice([0, 0, 1, 2])]:
            prompt, mode, options = requests[number]
            engine.submit(prompt, id=number, mode=mode, return_logits=number % 3 == 0, **options)
            waiting.remove(number)
        if len(waiting) == REQUESTS // 2 and "cancelled" in engine._known and not outputs.get("asked"):
            outputs["asked"] = True
            engine.cancel("cancelled")
        for event in engine.step():
            if event.output:
                outputs[event.id] = event.output
    return outputs


@pytest.mark.parametrize("control", CONTROLS)
def test_everything_is_in_order(streams, control):
    model = random_model()
    engine = model.engine(slots=4, max_len=POSITIONS, exit_control=control)
    outputs = served(engine)
    assert streams.races == []
    for number, (prompt, mode, options) in enumerate(some_requests()):
        options["mode"] = "full" if mode == "lossless" else mode
        assert same(outputs[number], oracle(model, prompt, **options)), number


def test_a_slot_of_which_steps_are_in_flight(streams):
    """Its request is cancelled while the device runs ahead; another one takes the slot at once."""
    model = random_model()
    engine = model.engine(slots=1, max_len=POSITIONS, exit_control="device")
    for seed in range(3):
        engine.submit(random_prompt(4, seed), id="cancelled", max_new_tokens=40)
        for _ in range(3):
            engine.step()
        assert engine._steps.decoder.in_flight
        engine.cancel("cancelled")
        engine.submit(random_prompt(6, seed), id="next", max_new_tokens=5)
        outputs = {event.id: event.output for event in engine if event.output}
        assert streams.races == []
        assert same(outputs["next"], oracle(model, random_prompt(6, seed), max_new_tokens=5))


@pytest.mark.parametrize("mode", ["river", "lossless"])
@pytest.mark.parametrize("control", CONTROLS)
def test_requests_that_leave_in_the_middle(streams, control, mode):
    """One of four cancelled; then all of them, for fewer requests than the runner has rows."""
    model, options = random_model(), {"mode": mode, "max_new_tokens": 30}
    engine = model.engine(slots=4, max_len=POSITIONS, exit_control=control)
    for number in range(4):
        engine.submit(random_prompt(4, number), id=number, **options)
    for _ in range(6):
        engine.step()
    engine.cancel(1)
    for _ in range(3):
        engine.step()
    engine.clear()
    for number in range(3):
        engine.submit(random_prompt(5, number), id=number, **options | {"max_new_tokens": 9})
    outputs = {event.id: event.output for event in engine if event.output}
    assert streams.races == []
    options = {"mode": "full"} if mode == "lossless" else {}
    for number in range(3):
        expected = oracle(model, random_prompt(5, number), max_new_tokens=9, **options)
        assert same(outputs[number], expected), number
