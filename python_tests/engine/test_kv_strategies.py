"""The paper's other KV strategies: each request gets what the strategy, told in other words, gives it."""

import math
import random
from collections import Counter
from contextlib import suppress

import pytest
import torch
from kv_oracle import Sequence, assert_same, sequences, token_of
from oracle import oracle, same
from test_engine import Cut, Interrupts
from test_longrope import ORIGINAL, longrope_model
from tiny_model import MULTIPLIERS, demo_model, random_model, random_prompt

from river_ext import ops
from river_ext.engine.kv_strategies import KV_DECODERS
from river_ext.engine.request import KV_STRATEGIES

LAYERS = 4
OTHERS = KV_STRATEGIES[1:]
SHARE = {"mode": "river"}, {"mode": "lossless"}, {"mode": "full"}, {"mode": "full_w4"}
MODELS = {
    "plain": {},
    "biases and norms": {"biases": True, "qk_norm": True, "seed": 1},
    "partial rotary": {"rotary_dim": 8, "seed": 2},
    "multipliers": MULTIPLIERS,
}
strategies = pytest.mark.parametrize("strategy", OTHERS)


def some_requests(strategy, count, seed=0, **fixed):
    """(prompt, options) whose thresholds are between the model's similarities."""
    generator = random.Random(f"{strategy} {seed}")
    for number in range(count):
        options = {
            "max_new_tokens": generator.randint(6, 22),
            "threshold": generator.choice([-2, math.inf, *(generator.uniform(0.5, 0.85) for _ in range(6))]),
            "min_layers": generator.choice([1, 1, 1, 2]),
            "temperature": generator.choice([0.0, 0.0, 1.5]),
            "top_k": generator.choice([0, 5]),
            "seed": generator.randint(-5, 5),
            "stop_tokens": generator.choice([(), (3, 40)]),
        }
        prompt = random_prompt(generator.randint(1, 12), seed=100 * seed + number)
        yield prompt, options | {"kv_strategy": strategy} | fixed


def poisoned(model, **options):
    """An engine whose cache holds NaN: whoever reads what was not written has no token."""
    engine = model.engine(max_len=64, **options)
    engine._memory.cache.k.fill_(math.nan)
    engine._memory.cache.v.fill_(math.nan)
    return engine


def run(engine, requests, at_once=None):
    """Outputs in the order of the requests: so many come at once, then one at each step."""
    waiting, outputs = list(enumerate(requests)), {}
    count = at_once or len(requests)
    while waiting or engine.busy:
        for number, (prompt, options) in waiting[:count]:
            engine.submit(prompt, id=number, **options)
        waiting, count = waiting[count:], 1
        outputs |= {event.id: event.output for event in engine.step() if event.output}
    return [outputs[number] for number in range(len(requests))]


def test_every_strategy_has_a_decoder():
    assert tuple(KV_DECODERS) == OTHERS


@strategies
@pytest.mark.parametrize("model", MODELS)
def test_one_request(model, strategy):
    """Its tokens, and the cache: where nothing was to be written, nothing was."""
    model, depths = random_model(**MODELS[model]), Counter()
    by_layer = {"threshold": [1.0, 0.75, -2, 0]}
    requests = [*some_requests(strategy, 5), *some_requests(strategy, 1, seed=1, **by_layer)]
    for one in ((prompt, options | {"return_logits": True}) for prompt, options in requests):
        engine = poisoned(model, slots=1)
        (output,) = run(engine, [one])
        (expected,) = sequences(model, [one])
        assert_same(output, expected)
        length = len(one[0]) + len(output.tokens) - 1
        for name, written in zip("kv", expected.written(), strict=True):
            cache = getattr(engine._memory.cache, name)[:, 0]
            torch.testing.assert_close(
                cache[:, :, :length], written[:, :, :length], equal_nan=True, atol=1e-5, rtol=1e-5
            )
            assert cache[:, :, length:].isnan().all()
        depths.update(output.exit_depths[1:])
    assert set(depths) >= {1, 2, 3}, "tokens leave at many depths"


def test_requests_come_and_go():
    """All strategies and modes in one engine, whose slots are used again and again."""
    model = random_model()
    requests = [one for strategy in OTHERS for one in some_requests(strategy, 6, seed=1)]
    requests += [one for mode in SHARE[:3] for one in some_requests("share", 3, seed=2, **mode)]
    random.Random(3).shuffle(requests)
    outputs = run(poisoned(model, slots=5), requests, at_once=len(requests) // 2)
    for (prompt, options), output in zip(requests, outputs, strict=True):
        if options["kv_strategy"] == "share":
            expected = oracle(model, prompt, **options)
            assert output.tokens == expected[0]
            assert options["mode"] == "lossless" or same(output, expected)
        else:
            assert_same(output, sequences(model, [(prompt, options)])[0])


@strategies
def test_a_sequence_that_rotates_anew(strategy):
    """Another prefill fills all layers: nothing is missing from then on."""
    model, crossed = longrope_model(), 0
    fixed = {"max_new_tokens": 20, "stop_tokens": (), "threshold": 0.6}
    requests = list(some_requests(strategy, 4, seed=7, **fixed))
    for output, expected in zip(
        run(poisoned(model, slots=3), requests), sequences(model, requests), strict=True
    ):
        assert_same(output, expected)
        anew = ORIGINAL + 1 - len(expected.asked.prompt)
        crossed += output.exit_depths[anew] == LAYERS and min(output.exit_depths[:anew]) < LAYERS
    assert crossed >= 2


@strategies
def test_no_token_runs_offloaded_layers(strategy):
    model = random_model(resident_layers=2)
    requests = list(some_requests(strategy, 4, seed=8, deep_tokens="exit", threshold=0.6, min_layers=1))
    outputs = run(poisoned(model, slots=3), requests)
    for output, expected in zip(outputs, sequences(model, requests), strict=True):
        assert_same(output, expected)
        assert set(output.exit_depths[1:]) <= {1, 2}


@strategies
def test_together(strategy):
    """Under the batch policy "min"; rows of another strategy decide for themselves."""
    model = random_model()
    fixed = {"max_new_tokens": 16, "stop_tokens": (), "min_layers": 1}
    other = OTHERS[OTHERS.index(strategy) - 1]
    for seed in range(3):
        requests = list(some_requests(strategy, 3, seed=10 + seed, **fixed))
        requests[1:1] = some_requests(other, 2, seed=20 + seed, **fixed)
        generator = random.Random(seed)
        for _, options in requests:
            options["threshold"] = generator.uniform(0.4, 0.7)
        outputs = run(poisoned(model, slots=5, batch_policy="min"), requests)
        for output, expected in zip(outputs, sequences(model, requests, together=True), strict=True):
            assert_same(output, expected)
        mine = [outputs[number].exit_depths for number in (0, 3, 4)]
        assert mine[0] == mine[1] == mine[2] and min(mine[0]) < LAYERS


class InterruptsOfStrategies(Interrupts):
    """At a call that their own code makes."""

    def look(self, frame, *event):
        if frame.f_code.co_filename.endswith("kv_strategies.py"):
            super().look(frame, *event)


@strategies
def test_an_interrupt_anywhere_in_a_step_changes_nothing(strategy):
    """Whatever it had done by then, the next step takes up the work."""
    model, places = random_model(), set()
    requests = list(some_requests(strategy, 3, seed=4, max_new_tokens=8, stop_tokens=()))
    expected = sequences(model, requests)
    for number in range(1, 300, 23):
        engine, outputs, interrupts = poisoned(model, slots=2), {}, InterruptsOfStrategies(number)
        for index, (prompt, options) in enumerate(requests):
            engine.submit(prompt, id=index, **options)
        while engine.busy:
            with suppress(Cut), interrupts:
                outputs |= {event.id: event.output for event in engine.step() if event.output}
        places.add(interrupts.where)
        for index, one in enumerate(expected):
            assert_same(outputs[index], one)
    assert len(places) > 5


@strategies
def test_a_threshold_that_never_exits(strategy):
    """Then nothing is ever missing."""
    model, prompt = random_model(), random_prompt(6)
    full = model.generate(prompt, max_new_tokens=12, mode="full", return_logits=True)
    output = model.generate(
        prompt, max_new_tokens=12, kv_strategy=strategy, threshold=math.inf, return_logits=True
    )
    assert output.tokens == full.tokens and output.similarities == full.similarities
    assert torch.equal(output.logits, full.logits)


@strategies
def test_score(strategy):
    """Fed with its own tokens, a request has its own logits."""
    model = random_model()
    for prompt, options in some_requests(strategy, 3, seed=5, temperature=0.0, top_k=0, stop_tokens=()):
        output = model.generate(prompt, return_logits=True, **options)
        kept = {name: options[name] for name in ("threshold", "min_layers", "kv_strategy")}
        score = model.score(prompt + output.tokens, prompt_length=len(prompt), **kept)
        assert torch.equal(score.logits, output.logits) and score.exit_depths == output.exit_depths


@strategies
def test_text(strategy):
    """Stop strings, streams and log-probabilities, of the bundled model."""
    options = {"kv_strategy": strategy, "threshold": 0.98, "max_new_tokens": 24, "logprobs": 2}
    question = "Question: Ana has 21 coins and buys 12 more. How many coins does Ana have?\nAnswer:"
    output = demo_model().generate(question, **options)
    assert 1 < output.stats.mean_exit_depth < 16
    stream = demo_model().stream(question, **options)
    assert "".join(piece.text for piece in stream) == output.text and stream.output.tokens == output.tokens
    assert output.logprobs == [row[0][1] for row in output.top_logprobs], "greedy"
    stop = output.text[5:8]
    stopped = demo_model().generate(question, **options, stop=stop)
    assert stopped.finish_reason == "stop" and stopped.text == output.text.partition(stop)[0]


@strategies
def test_a_prompt_that_a_slot_holds(strategy):
    """Only what is there in all layers is taken over."""
    model = random_model()
    engine = poisoned(model, slots=1, reuse_prompts=True)
    fixed = {"threshold": 0.6, "stop_tokens": (), "max_new_tokens": 12}
    ((prompt, options),) = some_requests(strategy, 1, seed=6, **fixed)
    (first,) = run(engine, [(prompt, options)])
    assert min(first.exit_depths) < LAYERS
    longer = prompt + first.tokens + [5]
    for mode in SHARE[:3]:
        again = poisoned(model, slots=1)
        request = (longer, {**mode, "threshold": 0.6, "max_new_tokens": 8})
        assert run(engine, [request])[0].tokens == run(again, [request])[0].tokens
        run(engine, [(prompt, options)])
    (second,) = run(engine, [(longer, options)])
    assert_same(second, sequences(model, [(longer, options)])[0])


# --- what it costs ----------------------------------------------------------------------------------------


@pytest.fixture
def rows_of(monkeypatch, uncaptured):
    """Active rows of each op, counted where they are computed, and the most that were in one call."""
    rows, most = Counter(), Counter()

    def count(name, active):
        op = getattr(ops, name)

        def counted(*arguments, **named):
            n = active(*arguments, **named)
            rows[name] += n
            most[name] = max(most[name], n)
            return op(*arguments, **named)

        monkeypatch.setattr(ops, name, counted)

    count("decoder_block", lambda slots, **_: int((slots >= 0).sum()))
    count("exit_layer", lambda slots, **_: int((slots >= 0).sum()))
    count("linear", lambda x, *_: len(x))
    return rows, most


@pytest.mark.parametrize("options", [*SHARE, *({"kv_strategy": strategy} for strategy in OTHERS)], ids=str)
def test_work_is_counted(rows_of, options):
    """Of all strategies and modes, so that their costs compare."""
    rows, _ = rows_of
    mode, strategy = options.get("mode"), options.get("kv_strategy")
    model, prompt = random_model(), random_prompt(5)
    model._engines.idle.clear()  # other tests have captured graphs there
    output = model.generate(prompt, max_new_tokens=30, threshold=0.65, exit_control="host", **options)
    stats, decoded = output.stats, len(output.tokens) - 1
    rows["exit_layer" if mode == "full_w4" else "decoder_block"] -= LAYERS * len(prompt)
    work = {
        name: round(getattr(stats, f"{name}_rows") * decoded)
        for name in ("backbone", "recomputed", "exit", "projected")
    }
    assert work["backbone"] == rows["decoder_block"] and work["exit"] == rows["exit_layer"]
    assert 2 * work["projected"] == rows["linear"], "K and V"
    assert (work["projected"] > 0) == (strategy == "propagate")
    assert (work["recomputed"] > 0) == (strategy == "recompute")
    if mode != "lossless":
        assert work["backbone"] - work["recomputed"] == sum(output.exit_depths[1:])


def test_many_tokens_are_recomputed(rows_of):
    """Once a strict row joins, another one's tokens stay with it: all that it left out is computed first."""
    (_, most), model = rows_of, random_model()
    often = random_prompt(3), {"kv_strategy": "recompute", "threshold": -2, "max_new_tokens": 24}
    strict = random_prompt(4, 1), {"kv_strategy": "recompute", "threshold": math.inf, "max_new_tokens": 6}
    engine = poisoned(model, slots=2, batch_policy="min")
    engine.submit(often[0], id=0, **often[1])
    for _ in range(14):
        engine.step()
    engine.submit(strict[0], id=1, **strict[1])
    outputs = {event.id: event.output for event in engine if event.output}
    before = outputs[0].exit_depths[1:].index(LAYERS)
    assert before > ops.MAX_ROWS
    assert outputs[0].exit_depths[1:] == [1] * before + [LAYERS] * 5 + [1] * (18 - before)
    assert outputs[0].stats.recomputed_rows * 23 == pytest.approx(before * (LAYERS - 1))
    assert most["decoder_block"] == ops.MAX_ROWS, "prompts are shorter"
    first, second = (Sequence(model, *one) for one in (often, strict))
    for group in [[first]] * before + [[first, second]] * 5 + [[first]] * (18 - before):
        token_of(group)
    assert_same(outputs[0], first)
    assert_same(outputs[1], second)
