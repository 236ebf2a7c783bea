"""Slots: what a prompt takes over of earlier ones, and that it gets what it would get from the start."""

import random
from copy import copy

import pytest
import torch
from oracle import oracle, same
from tiny_model import random_model, random_prompt

from river_ext.engine import engine as engine_module
from river_ext.engine import matmul, prefill
from river_ext.engine.batch import Running
from river_ext.engine.request import request
from river_ext.engine.sequence import Sequence
from river_ext.engine.slots import EMPTY, Contents, Slots

LAYERS, POSITIONS = 4, 64


def drain(engine, outputs):
    for event in engine:
        if event.output:
            outputs[event.id] = event.output
    return outputs


@pytest.fixture
def prefilled(monkeypatch):
    """Where the prefill of each request begins."""
    starts, make = [], engine_module.Prefill

    def counted(network, cache, slot, request, start, progress):
        starts.append(start)
        return make(network, cache, slot, request, start)

    monkeypatch.setattr(engine_module, "Prefill", counted)
    return starts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_earlier_turns_are_not_computed_again(prefilled, dtype):
    """At full depth, the second turn is bit for bit what it is from the start."""
    model = random_model(dtype=dtype)
    engine = model.engine(slots=2, max_len=POSITIONS, reuse_prompts=True)
    options = {"max_new_tokens": 6, "mode": "full"}
    first = random_prompt(9, 1)
    engine.submit(first, id=0, **options)
    answer = drain(engine, {})[0].tokens
    second = first + answer + random_prompt(4, 2)
    for number, prompt in enumerate((second, second, first[:5]), start=1):
        engine.submit(prompt, id=number, **options)
        assert same(drain(engine, {})[number], oracle(model, prompt, **options))
    written = len(first) + len(answer) - 1
    assert prefilled == [0, written, len(second) - 1, 4]


@pytest.mark.parametrize("mode", ["full", "lossless"])
def test_full_depth_takes_over_what_the_backbone_wrote(prefilled, mode):
    """And nothing that an exit layer wrote, however many requests ago."""
    model, prompt = random_model(), random_prompt(20, 1)
    engine = model.engine(slots=1, max_len=POSITIONS, reuse_prompts=True)
    river, true = {"threshold": -2}, {"mode": mode}
    for length, options, start in (
        (10, river | {"prefill": "depth:0"}, 0),
        (12, river, 10),  # the backbone's from there on, on top of the exit layers'
        (14, true, 0),
        (14, river, 13),
        (16, true, 14),
        (18, river | {"prefill": "last"}, 16),
        (19, true, 16),
        (20, {"threshold": 1.0}, 19),
    ):
        engine.submit(prompt[:length], id=0, max_new_tokens=1, **options)
        output = drain(engine, {})[0]
        if options is true:
            assert same(output, oracle(model, prompt[:length], max_new_tokens=1, mode="full"))
        assert prefilled.pop() == start
    new = {"max_new_tokens": 20, "threshold": 0.6}
    engine.submit(prompt[:8], id=0, **new)
    output = drain(engine, {})[0]
    depth = next(n for n, depth in enumerate(output.exit_depths) if depth < LAYERS)
    engine.submit(prompt[:8] + output.tokens, id=0, max_new_tokens=5, **true)
    expected = oracle(model, prompt[:8] + output.tokens, max_new_tokens=5, mode="full")
    assert same(drain(engine, {})[0], expected)
    assert prefilled == [7, 8 + depth - 1]


def test_a_rotation_that_depends_on_the_length_is_not_taken_over(prefilled):
    scaling = (("rope_type", "dynamic"), ("factor", 8.0))
    model = random_model(rope_scaling=scaling, max_position_embeddings=32)
    engine = model.engine(slots=1, max_len=64, reuse_prompts=True)
    for length in (20, 31, 40, 45, 30, 31):
        engine.submit(random_prompt(45, 1)[:length], id=0, max_new_tokens=2, mode="full")
        output = drain(engine, {})[0]
        assert same(output, oracle(model, random_prompt(45, 1)[:length], max_new_tokens=2, mode="full"))
    assert prefilled == [0, 20, 0, 0, 0, 30]


def test_of_a_prompt_that_was_cancelled_nothing_is_taken_over(prefilled, monkeypatch):
    """Its slot holds a part of it, in some of the layers."""
    monkeypatch.setitem(engine_module.PREFILL_ROWS, "cpu", 2)
    model, options = random_model(), {"max_new_tokens": 20, "mode": "full"}
    engine = model.engine(slots=2, max_len=POSITIONS, reuse_prompts=True)
    engine.submit([1], id="running", **options)
    engine.step()
    engine.submit(random_prompt(20), id="cancelled", **options)
    engine.step()
    engine.cancel("cancelled")
    engine.submit(random_prompt(20), id="again", **options)
    assert same(drain(engine, {})["again"], oracle(model, random_prompt(20), **options))
    assert prefilled == [0, 0, 0]


def test_after_clear_nothing_is_taken_over(prefilled):
    model, options = random_model(), {"max_new_tokens": 6, "mode": "full"}
    engine = model.engine(slots=1, max_len=POSITIONS, reuse_prompts=True)
    for prompt, steps in ((random_prompt(9, 1), 9), (random_prompt(9, 2), 2)):
        engine.submit(prompt, **options)
        for _ in range(steps):
            engine.step()
    engine.clear()
    engine.submit(random_prompt(9, 1), id=0, **options)
    assert same(drain(engine, {})[0], oracle(model, random_prompt(9, 1), **options))
    assert prefilled == [0, 0, 0]


# --- what is taken over without being asked for: bit for bit what the prompt would give -------------------


def test_what_exit_layers_wrote_is_not_taken_over_unless_asked_for(prefilled):
    """Nor is anything by a prompt that exit layers take a part in, or that may become one."""
    model, prompt = random_model(), random_prompt(20, 1)
    engine, most = model.engine(slots=1, max_len=POSITIONS), {"prefill": "last", "threshold": -2}
    for length, options, start in (
        (10, {"prefill": "depth:0"}, 0),
        (12, {"threshold": -2}, 0),
        (14, {"threshold": -2}, 12),
        (14, {"mode": "lossless"}, 13),
        (16, most, 0),
        (18, {"mode": "full"}, 0),
        (19, {"prefill": "min"}, 0),
        (19, {"mode": "full"}, 0),
        (20, {"mode": "full"}, 19),
        (20, {"mode": "full_w4"}, 0),
    ):
        engine.submit(prompt[:length], id=0, max_new_tokens=1, **options)
        options = options | ({"mode": "full"} if options.get("mode") == "lossless" else {})
        assert same(drain(engine, {})[0], oracle(model, prompt[:length], max_new_tokens=1, **options))
        assert prefilled.pop() == start, (length, options)


def test_a_river_leaves_what_the_backbone_wrote_before_its_first_exit(prefilled):
    model, prompt = random_model(), random_prompt(8, 1)
    engine, options = model.engine(slots=1, max_len=POSITIONS), {"max_new_tokens": 20, "threshold": 0.6}
    engine.submit(prompt, id=0, **options)
    output = drain(engine, {})[0]
    depth = next(n for n, depth in enumerate(output.exit_depths) if depth < LAYERS)
    engine.submit(prompt + output.tokens, id=0, **options)
    assert same(drain(engine, {})[0], oracle(model, prompt + output.tokens, **options))
    assert prefilled == [0, 8 + depth - 1] and depth < 19


SCALINGS = {"plain": {}, "dynamic": {
    "rope_scaling": (("rope_type", "dynamic"), ("factor", 8.0)), "max_position_embeddings": 24
}}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_conversations_of_many_users_are_what_they_are_alone(prefilled, monkeypatch, scaling, seed):
    """Turns in every mode, some of them cancelled, more users than slots, all of whom begin alike."""
    monkeypatch.setitem(engine_module.PREFILL_ROWS, "cpu", 3)
    model = random_model(dtype=(torch.float32, torch.bfloat16, torch.float16)[seed], **scaling)
    system = converse(model, seed, oracle)
    assert sum(start >= system for start in prefilled) > 20
    assert sum(start > system for start in prefilled) > 3


BLOCK = 4


@pytest.fixture
def by_blocks(monkeypatch):
    """Prompts as on a GPU: through products of BLOCK rows, whose bits depend on the number of rows."""
    linear = matmul.linear
    monkeypatch.setattr(prefill, "OpsPrompt", matmul.MatmulPrompt)
    monkeypatch.setattr(matmul.MatmulPrompt, "rows_at_a_time", BLOCK)
    monkeypatch.setattr(matmul, "linear", lambda x, *rest: linear(x, *rest) * (1 + len(x) / 50))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_on_a_gpu_conversations_are_what_they_are_alone(prefilled, by_blocks, scaling, seed):
    """Whole blocks are taken over, of what prompts wrote: those of steps have other bits."""
    model = random_model(**scaling)

    def from_the_start(model, prompt, **options):
        engine = model.engine(slots=1, max_len=POSITIONS)
        engine.submit(prompt, id=0, **options)
        output = drain(engine, {})[0]
        assert prefilled.pop() == 0
        return output.tokens, output.exit_depths, output.similarities, output.finish_reason, None

    system = converse(model, seed, from_the_start)
    assert all(start % BLOCK == 0 for start in prefilled)
    assert sum(start >= BLOCK for start in prefilled) > 10
    assert any(start > system for start in prefilled)


def converse(model, seed, alone) -> int:
    """Turns of users whose first ones begin alike, in so many tokens; `alone` says what each has to get."""
    generator = random.Random(seed)
    engine = model.engine(slots=3, max_len=POSITIONS)
    system = random_prompt(5, 9)
    talks = {user: system + random_prompt(generator.randint(1, 4), user) for user in range(5)}
    asked, outputs, turns, cancelled = {}, {}, 0, 0
    while turns < 360 or asked:
        for user in talks.keys() - asked.keys():
            if turns < 360 and generator.random() < 0.3:
                if len(talks[user]) > 45:
                    talks[user] = talks[user][: generator.randint(1, 20)]
                mode = generator.choice(["river"] * 3 + ["full", "lossless"] * 3 + ["full_w4"])
                options = {"mode": mode, "max_new_tokens": generator.randint(1, 9), "threshold": 0.6}
                if mode == "river":
                    options["prefill"] = generator.choice(["full"] * 6 + ["last", "min", "depth:2"])
                asked[user] = list(talks[user]), options
                engine.submit(talks[user], id=user, **options)
                turns += 1
        if asked and generator.random() < 0.02:
            user = generator.choice(sorted(asked))
            if not engine._known[user].cancelled:
                engine.cancel(user)
                cancelled += 1
        outputs |= {event.id: event.output for event in engine.step() if event.output}
        for user, output in outputs.items():
            prompt, options = asked.pop(user)
            mode = options["mode"].replace("lossless", "full")
            expected = alone(model, prompt, **options | {"mode": mode})
            if output.finish_reason == "cancelled":
                assert output.tokens == expected[0][: len(output.tokens)]
            else:
                assert same(output, expected), (user, prompt, options)
            talks[user] = prompt + output.tokens + random_prompt(generator.randint(1, 3), turns)
        outputs = {}
    assert cancelled
    return len(system)


def test_who_begins_alike_shares_what_another_one_has_computed(prefilled):
    """Also of a request that goes on; and what is copied is all that the cache holds of it."""
    model, prompt = random_model(), random_prompt(20, 1)
    engine, options = model.engine(slots=3, max_len=POSITIONS), {"max_new_tokens": 12, "mode": "full"}
    for values in (engine._memory.cache.k, engine._memory.cache.v):
        values.fill_(float("nan"))
    prompts = [prompt, prompt[:15] + random_prompt(3, 2), prompt]
    for number, one in enumerate(prompts):
        engine.submit(one, id=number, **options)
    outputs = drain(engine, {})
    assert prefilled == [0, 15, 19], "the shortest one has the second turn"
    for number, one in enumerate(prompts):
        *_, cache = expected = oracle(model, one, **options)
        assert same(outputs[number], expected)
        end = len(one) + 11
        for written, right in ((engine._memory.cache.k, cache.k), (engine._memory.cache.v, cache.v)):
            assert torch.equal(written[:, number, :, :end], right[:, 0, :, :end])


def running(prompt, config=None) -> Running:
    config = config or random_model().config
    return Running(0, Sequence(request(config, None, prompt, {"max_new_tokens": 1}), None))


def test_which_slot_a_prompt_gets():
    """That of its conversation; of another's, only if no other is free."""
    slots = Slots(random_model().network, 4, reuse=False)
    shared, other = random_prompt(6, 1), random_prompt(20, 2)
    slots._contents = [Contents(tokens, len(tokens), 0) for tokens in (shared + other, other, [])] + [EMPTY]
    slots.free = [3, 1, 2, 0]
    for prompt, slot, held in (
        (shared + other + [1], 0, 26),
        (shared + [3, 1], 3, 6),  # copied, the one whose conversation is longer may go on
        (other + [1], 1, 20),
        ([5] * 9, 2, 0),
    ):
        one = running(prompt)
        slots.take(one)
        assert (one.slot, one.start) == (slot, held)
    slots.free = [0]
    one = running(shared + [3, 1])
    slots.take(one)
    assert (one.slot, one.start, slots.free) == (0, 6, [])


@pytest.mark.parametrize(
    "reuse, length, held", [(False, 1000, 512), (False, 1024, 512), (False, 1025, 1024), (True, 1000, 999)]
)
def test_on_a_gpu_whole_blocks_are_taken_over_unless_more_is_asked_for(reuse, length, held):
    """There the bits of a prompt depend on how it is cut."""
    network, prompt = copy(random_model(max_position_embeddings=2048).network), random_prompt(1500, 1)
    network.device = torch.device("cuda")
    slots, one = Slots(network, 2, reuse), running(prompt[:length], network.config)
    slots._contents[0] = Contents(prompt, 1024, 0)
    slots.take(one)
    slots.fill(one, cache=None)
    assert (one.slot, one.start) == (0, held)


def test_an_engine_that_was_made_in_inference_mode_copies_outside_of_it(prefilled):
    """Whose cache torch lets nobody else write."""
    model, prompt = random_model(), random_prompt(20, 1)
    with torch.inference_mode():
        engine = model.engine(slots=2, max_len=POSITIONS)
    for number in range(2):
        engine.submit(prompt, id=number, max_new_tokens=3)
    outputs, expected = drain(engine, {}), oracle(model, prompt, max_new_tokens=3)
    assert same(outputs[0], expected) and same(outputs[1], expected)
    assert prefilled == [0, 19]


def test_a_first_token_that_was_cut_off_frees_its_slot():
    """By an interrupt after the token, and before its exit depth."""

    class Interrupted(list):
        def append(self, depth):
            raise KeyboardInterrupt

    engine = random_model().engine(slots=1, max_len=POSITIONS)
    engine.submit(random_prompt(9), id=0, max_new_tokens=3)
    engine._known[0].sequence.exit_depths = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert drain(engine, {})[0].finish_reason == "error" and engine._slots.free == [0]


@pytest.mark.parametrize("when", ["copied", "prefilled"])
def test_a_prompt_that_was_cut_off_leaves_what_is_there(prefilled, monkeypatch, when):
    """By an exception in the middle of a copy, of whose slot nothing is then taken, or of a prefill."""
    monkeypatch.setitem(engine_module.PREFILL_ROWS, "cpu", 2)
    model, prompt = random_model(), random_prompt(20, 1)
    engine, options = model.engine(slots=2, max_len=POSITIONS), {"max_new_tokens": 3, "mode": "full"}
    engine.submit(prompt, id=0, **options)
    engine.submit(random_prompt(30, 2), id=1, **options)
    drain(engine, {})
    engine.submit(prompt[:12] + random_prompt(9, 3), id=2, **options)
    if when == "copied":
        whole, cache = engine._memory.cache.copy, engine._memory.cache

        def half(source, target, count):
            whole(source, target, count // 2)
            cache.copy = whole
            raise KeyboardInterrupt

        engine._slots.free.reverse()
        engine._slots._contents[0] = engine._slots._contents[0]._replace(tokens=prompt + [1] * 40)
        cache.copy = half
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    else:
        engine.step()
        engine.cancel(2)
    engine.submit(random_prompt(30, 2)[:25], id=3, **options)
    outputs = drain(engine, {})
    for number, one in ((2, prompt[:12] + random_prompt(9, 3)), (3, random_prompt(30, 2)[:25])):
        if outputs[number].finish_reason != "cancelled":
            assert same(outputs[number], oracle(model, one, **options))
    assert outputs[3].finish_reason == "length"
