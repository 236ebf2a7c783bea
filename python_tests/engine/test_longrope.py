"""A sequence that outgrows the original length of longrope rotates anew, and is prefilled again."""

import random
from contextlib import suppress

import pytest
import torch
from oracle import oracle, same
from test_engine import Cut, Interrupts
from tiny_model import random_model, random_prompt

from river_ext.engine import engine as engine_module
from river_ext.engine.request import KV_STRATEGIES

ORIGINAL, LAYERS = 12, 4
MODES = ("river", "full", "full_w4")


def longrope_model(**changes):
    scaling = {
        "rope_type": "longrope",
        "short_factor": (1.0, 1.1, 1.2, 1.3, 1.5, 2.0),
        "long_factor": (1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
        "attention_factor": 1.2,
        "original_max_position_embeddings": ORIGINAL,
    }
    return random_model(rope_scaling=tuple(scaling.items()), rotary_dim=12, **changes)


def some_requests(count: int, modes=MODES):
    choose = random.Random(count)
    for number in range(count):
        mode = choose.choice(modes)
        prefills = ("full", "depth:2", "min", "last") if mode == "river" else ("full",)
        yield (
            random_prompt(choose.choice([1, 5, 11, 12, 13, 14, 20]), number),
            {
                "mode": mode,
                "max_new_tokens": choose.choice([1, 2, 3, 20]),
                "threshold": choose.choice([-2, 0.5, 0.6, 0.7]),
                "min_layers": choose.randint(1, LAYERS),
                "prefill": choose.choice(prefills),
                "temperature": choose.choice([0.0, 1.5]),
                "seed": number,
                "stop_tokens": choose.choice([(), tuple(range(0, 80, 11))]),
            },
        )


def finished(engine) -> dict:
    return {event.id: event.output for event in engine if event.output}


@pytest.mark.parametrize("control", ["host", "device"])
@pytest.mark.parametrize("slots", [1, 3])
def test_requests_among_others(control, slots):
    model = longrope_model()
    engine, requests = model.engine(slots=slots, max_len=40, exit_control=control), list(some_requests(24))
    for number, (prompt, options) in enumerate(requests):
        engine.submit(prompt, id=number, **options)
    outputs, crossed = finished(engine), 0
    for number, (prompt, options) in enumerate(requests):
        assert same(outputs[number], oracle(model, prompt, **options)), number
        crossed += len(prompt) <= ORIGINAL < len(prompt) + len(outputs[number].tokens) - 1
    assert crossed >= 4


@pytest.mark.parametrize("control", ["host", "device"])
def test_rows_that_exit_together(control):
    """All of them begin again together, once the one that rotates anew is there."""
    model = longrope_model()
    prompts = [random_prompt(length, length) for length in (4, 9, 15)]
    options = {"max_new_tokens": 16, "threshold": 0.6, "batch_policy": "min", "exit_control": control}
    together = model.generate(prompts, **options)
    full = [model.generate(prompt, max_new_tokens=16, mode="full") for prompt in prompts]
    always = model.generate(prompts, **options | {"threshold": float("inf")})
    assert [out.tokens for out in always] == [out.tokens for out in full]
    assert [len(out.tokens) for out in together] == [16] * 3


@pytest.mark.parametrize("draft_tokens", [1, 3, 7, "auto"])
def test_lossless(draft_tokens):
    """No draft passes the switch: behind it all drafts would be of other rotations."""
    model = longrope_model()
    for prompt, options in some_requests(12, modes=("full",)):
        full = model.generate(prompt, **options)
        ours = model.generate(prompt, **options | {"mode": "lossless", "draft_tokens": draft_tokens})
        assert (ours.tokens, ours.finish_reason) == (full.tokens, full.finish_reason)


@pytest.mark.parametrize("length", [ORIGINAL - 4, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1])
@pytest.mark.parametrize(
    "options",
    [{"mode": "full"}, {"mode": "full_w4"}, {"prefill": "depth:2"}]
    + [{"kv_strategy": strategy} for strategy in KV_STRATEGIES],
    ids=str,
)
def test_given_tokens(options, length):
    """Fed with its own tokens, a request has its own logits, on both sides of the switch."""
    model, prompt, options = longrope_model(), random_prompt(length), {"threshold": 0.6, **options}
    output = model.generate(prompt, max_new_tokens=12, return_logits=True, **options)
    score = model.score(prompt + output.tokens, prompt_length=length, **options)
    assert torch.equal(score.logits, output.logits) and score.exit_depths == output.exit_depths


def test_a_river_with_a_head_of_its_own():
    model = longrope_model()
    for mode in ("river", "full_w4"):
        options = {"mode": mode, "river_head": "w4", "max_new_tokens": 20, "threshold": 0.5}
        assert same(model.generate(random_prompt(6), **options), oracle(model, random_prompt(6), **options))


def test_what_a_slot_holds_is_taken_over_if_it_rotates_alike(monkeypatch):
    model, starts, make = longrope_model(), [], engine_module.Prefill

    def noted(network, cache, slot, request, start, progress):
        starts.append(start)
        return make(network, cache, slot, request, start)

    monkeypatch.setattr(engine_module, "Prefill", noted)
    engine = model.engine(slots=1, max_len=40, reuse_prompts=True)
    prompt = random_prompt(30, 1)
    turns = {
        (6, 3): [0],
        (10, 3): [6],
        (11, 4): [10, 0],
        (20, 2): [11],
        (25, 2): [20],
        (9, 2): [0],
        (14, 1): [0],
    }
    for (length, count), expected in turns.items():
        options = {"max_new_tokens": count, "mode": "full"}
        engine.submit(prompt[:length], id=0, **options)
        assert same(finished(engine)[0], oracle(model, prompt[:length], **options))
        assert starts == expected
        starts.clear()
    engine.submit(prompt[:12], id=0, max_new_tokens=4, threshold=-2)  # whose second prefill is of full depth
    assert min(finished(engine)[0].exit_depths[2:]) == 1
    engine.submit(prompt[:20], id=0, max_new_tokens=4, mode="full")
    assert same(finished(engine)[0], oracle(model, prompt[:20], max_new_tokens=4, mode="full"))
    assert starts == [0, 0, 12]


def test_a_second_prefill_that_was_cancelled_leaves_nothing(monkeypatch):
    monkeypatch.setitem(engine_module.PREFILL_ROWS, "cpu", 2)
    model, prompt = longrope_model(), random_prompt(6)
    engine, options = model.engine(slots=3, max_len=40, reuse_prompts=True), {"mode": "full"}
    engine.submit([1], id="running", max_new_tokens=11, **options)
    engine.submit(prompt, id="cancelled", max_new_tokens=20, **options)
    while not (known := [one for one in engine._prefilling if one.prefilled > ORIGINAL]):
        engine.step()
    tokens = known[0].sequence.tokens
    assert len(prompt + tokens) == ORIGINAL + 1
    engine.submit(prompt, id="never begun", max_new_tokens=5, **options)
    engine.step()
    for id in ("cancelled", "never begun"):
        engine.cancel(id)
    longer = prompt + tokens + [3, 4]
    engine.submit(longer, id="again", max_new_tokens=5, **options)
    assert same(finished(engine)["again"], oracle(model, longer, max_new_tokens=5, **options))


@pytest.mark.parametrize("mode", ["river", "lossless"])
def test_an_interrupt_anywhere_in_a_step_changes_nothing(mode):
    """The second prefill begins anew, if it was not done."""
    model, options, prompt = longrope_model(), {"max_new_tokens": 12, "threshold": 0.6}, random_prompt(6)
    expected = oracle(model, prompt, **options | {"mode": mode.replace("lossless", "full")})
    places = set()
    for number in range(1, 900, 29):
        engine, outputs, interrupts = model.engine(slots=1, max_len=40), {}, Interrupts(number)
        engine.submit(prompt, id=0, mode=mode, **options)
        for _ in range(40):
            with suppress(Cut), interrupts:
                outputs |= {event.id: event.output for event in engine.step() if event.output}
        assert same(outputs[0], expected), interrupts.where
        places.add(interrupts.where)
    assert len(places) > 8
