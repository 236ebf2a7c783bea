"""Lossless mode: bit for bit what the backbone alone gives, whatever the river proposes."""

import math
import random
from itertools import product

import pytest
import torch
from oracle import oracle
from tiny_model import MULTIPLIERS, demo_model, random_model, random_prompt

from river_ext import ops
from river_ext.engine import graph, lossless
from river_ext.engine.drafting import Drafting, Share, draft_cost
from river_ext.engine.graph import Memory
from river_ext.engine.quotes import Quotes

LAYERS, VOCAB, POSITIONS = 4, 80, 64
EVERY_SEVENTH = tuple(range(0, VOCAB, 7))
TEXTS = [
    "Question: Ana has 21 coins and buys 12 more at the fair. How many coins does Ana have?\nAnswer:",
    "Question: Tom has 7 apples and",
    "def add(x):",
    "def double",
    "Question: A box holds 4 pens. How many pens do 3 boxes hold?\nAnswer:",
]


def facts(out):
    return out.text, out.tokens, out.exit_depths, out.similarities, out.finish_reason, out.logprobs


def random_options(generator: random.Random) -> dict:
    return {
        "max_new_tokens": generator.randint(1, 40),
        "temperature": generator.choice([0.0, 0.0, 0.5, 1.0]),
        "top_k": generator.choice([0, 0, 5]),
        "top_p": generator.choice([1.0, 1.0, 0.8]),
        "min_p": generator.choice([0.0, 0.0, 0.05]),
        "seed": generator.randint(-5, 5),
    }


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("draft_tokens", [1, 2, 3, 4, 5, 6, 7, "auto"])
def test_the_tokens_of_full_depth(batch, draft_tokens):
    """On a model whose river is often right: 1,200 cases, greedy and sampled, that end in every way."""
    model, generator = demo_model(), random.Random(f"{batch} {draft_tokens}")
    reasons, accepted, wrong = set(), 0, 0
    for _ in range(28 // batch + 1):
        options = random_options(generator)
        texts = generator.sample(TEXTS, batch)
        stop = generator.choice([(), (), "1", [" is", "2 "], "\n"])
        if generator.random() < 0.3:
            options["stop_tokens"] = ()
        options |= {"stop": stop, "logprobs": 2}
        full = model.generate(texts, mode="full", **options)
        control = generator.choice(["auto", "host", "device"])
        ours = model.generate(
            texts, mode="lossless", draft_tokens=draft_tokens, exit_control=control, **options
        )
        assert [facts(out) for out in ours] == [facts(out) for out in full]
        for out in ours:
            reasons.add(out.finish_reason)
            accepted += out.stats.accepted_drafts
            wrong += out.stats.drafts - out.stats.accepted_drafts
    assert reasons == {"stop", "length"}
    assert accepted > wrong > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_river_that_is_mostly_wrong(dtype, batch):
    """Random weights; tokens, logits, and the cache at every position that was accepted."""
    model, generator = random_model(dtype=dtype), random.Random(batch)
    for _ in range(10):
        options = random_options(generator) | {"stop_tokens": generator.choice([(), EVERY_SEVENTH])}
        prompts = [
            random_prompt(generator.randint(1, 12), generator.randrange(1 << 20)) for _ in range(batch)
        ]
        engine = model.engine(slots=batch, max_len=POSITIONS)
        for number, prompt in enumerate(prompts):
            k = generator.choice([1, 2, 3, 7, "auto"])
            engine.submit(prompt, id=number, mode="lossless", draft_tokens=k, return_logits=True, **options)
        outputs = {event.id: event.output for event in engine if event.output}
        for number, prompt in enumerate(prompts):
            out = outputs[number]
            tokens, depths, similarities, reason, cache = oracle(model, prompt, mode="full", **options)
            assert (out.tokens, out.exit_depths, out.similarities) == (tokens, depths, similarities)
            assert out.finish_reason == reason
            full = model.generate(prompt, mode="full", return_logits=True, **options)
            assert torch.equal(out.logits, full.logits)
            end = len(prompt) + len(tokens) - 1
            for written, right in ((engine._memory.cache.k, cache.k), (engine._memory.cache.v, cache.v)):
                assert torch.equal(written[:, number, :, :end], right[:, 0, :, :end])


@pytest.mark.parametrize(
    "changes",
    [{"biases": True, "qk_norm": True}, {"sliding_window": 5}, {"num_hidden_layers": 1},
     {"tie_word_embeddings": True}, MULTIPLIERS],
    ids=str,
)  # fmt: skip
def test_models(changes):
    model = random_model(**changes)
    for seed in range(4):
        options = {"max_new_tokens": 30, "temperature": 0.5 * seed, "seed": seed}
        full = model.generate(random_prompt(6, seed), mode="full", **options)
        ours = model.generate(random_prompt(6, seed), mode="lossless", **options)
        assert facts(ours) == facts(full)


def test_a_rotation_that_depends_on_the_length():
    scaling = (("rope_type", "dynamic"), ("factor", 8.0))
    model = random_model(rope_scaling=scaling, max_position_embeddings=32)
    options = {"max_new_tokens": 30, "draft_tokens": 3}
    full = model.generate(random_prompt(20), mode="full", max_new_tokens=30)
    assert facts(model.generate(random_prompt(20), mode="lossless", **options)) == facts(full)


def test_to_the_last_position_of_the_model():
    model, prompt = random_model(), random_prompt(5)
    for draft_tokens in (1, 4, 7):
        options = {"max_new_tokens": 59}
        full = model.generate(prompt, mode="full", **options)
        ours = model.generate(prompt, mode="lossless", draft_tokens=draft_tokens, **options)
        assert facts(ours) == facts(full) and len(ours.tokens) == 59


def test_beside_requests_of_other_modes():
    model, generator = demo_model(), random.Random(1)
    engine = model.engine(slots=8, max_len=256)
    modes = ["lossless", "river", "full", "lossless", "full_w4", "lossless"] * 4
    asked = [(generator.choice(TEXTS), random_options(generator) | {"mode": mode}) for mode in modes]
    for number, (text, options) in enumerate(asked):
        engine.submit(text, id=number, **options)
    outputs = {event.id: event.output for event in engine if event.output}
    for number, (text, options) in enumerate(asked):
        mode = "full" if options["mode"] == "lossless" else options["mode"]
        assert facts(outputs[number]) == facts(model.generate(text, **options | {"mode": mode}))


def test_a_stream_has_a_piece_for_every_token():
    options = {"max_new_tokens": 60, "stop": "zz"}
    full = demo_model().generate(TEXTS[0], mode="full", **options)
    stream = demo_model().stream(TEXTS[0], mode="lossless", **options)
    pieces = list(stream)
    assert [piece.token for piece in pieces] == full.tokens
    assert "".join(piece.text for piece in pieces) == full.text == stream.output.text
    assert all(piece.exit_depth == 16 for piece in pieces)


def test_drafts_are_drawn_by_the_rivers_head(monkeypatch, uncaptured):
    """Or by the model's, where the river was saved without one: the tokens are the same."""
    model, options = demo_model(), {"max_new_tokens": 30, "draft_tokens": 3, "mode": "lossless"}
    model._engines.idle.clear()  # other tests have captured graphs there
    calls, packed, dense = [], ops.lm_head_w4, ops.lm_head
    monkeypatch.setattr(ops, "lm_head_w4", lambda *a, **k: calls.append("river") or packed(*a, **k))
    monkeypatch.setattr(ops, "lm_head", lambda *a, **k: calls.append("model") or dense(*a, **k))
    out = model.generate(TEXTS[0], **options)
    assert calls.count("model") == 1 + out.stats.steps, "of the prompt, and of each verification"
    assert calls.count("river") >= out.stats.drafts > 0
    calls.clear()
    monkeypatch.setattr(model.network, "lm_head_w4", None)
    again = model.generate(TEXTS[0], **options)
    assert again.tokens == out.tokens and "river" not in calls


def test_stats():
    out = demo_model().generate(TEXTS[0], mode="lossless", draft_tokens=3, max_new_tokens=60)
    stats = out.stats
    assert stats.steps < len(out.tokens) - 1 == round(stats.steps * stats.tokens_per_step)
    assert stats.accepted_drafts == sum(out.drafted) <= stats.drafts <= 3 * stats.steps
    assert not out.drafted[0], "the prefill's"
    assert len(out.tokens) - 1 - stats.accepted_drafts <= stats.steps, "each pass adds one of its own"
    assert 0 < stats.draft_seconds < stats.decode_seconds
    full = demo_model().generate(TEXTS[0], mode="full", max_new_tokens=60).stats
    assert (full.drafts, full.accepted_drafts, full.draft_seconds) == (0, 0, 0)
    assert full.steps == full.new_tokens - 1 and full.tokens_per_step == 1


def test_the_time_of_drafts_is_known_where_the_host_looks_at_each():
    for control, known in (("auto", True), ("host", True), ("device", False)):
        options = {"mode": "lossless", "exit_control": control, "max_new_tokens": 20}
        assert (demo_model().generate(TEXTS[0], **options).stats.draft_seconds is not None) == known


def test_a_request_that_fails_ends_alone():
    """In the middle of what was drafted."""
    model = random_model(dtype=torch.float16)
    prompt = random_prompt(4, 3)
    token = model.generate(prompt, mode="full", max_new_tokens=9).tokens[5]
    kept = model.network.embed_tokens[token].clone()
    model.network.embed_tokens[token] = math.inf
    try:
        full, ours = (
            model.generate([prompt, random_prompt(3, 1)], mode=mode, max_new_tokens=20)
            for mode in ("full", "lossless")
        )
        assert [(out.tokens, out.finish_reason, out.error) for out in ours] == [
            (out.tokens, out.finish_reason, out.error) for out in full
        ]
        assert full[0].finish_reason == "error"
    finally:
        model.network.embed_tokens[token] = kept


def test_nothing_of_a_cycle_that_failed_reaches_the_next_run(monkeypatch, uncaptured):
    """Drafts that were never verified, stop tokens of others, rows of more requests."""
    model, options = random_model(), {"mode": "lossless", "draft_tokens": 3, "max_new_tokens": 12}
    prompts = [random_prompt(4, seed) for seed in range(2)]
    expected = [facts(out) for out in model.generate(prompts, **options)]
    first = [tokens[0] for _, tokens, *_ in expected]
    stop_tokens, accept, cycles = set(expected[0][1]) - set(first), ops.accept, []

    def failing(**arguments):
        raise KeyboardInterrupt

    def checking(**arguments):
        rows, drafts = arguments["verify_slots"].view(arguments["drafts"].shape), arguments["drafts"]
        assert (rows[1:] == -1).all() and (drafts == -1).all() and (arguments["stop_tokens"] == -1).all()
        cycles.append(1)
        accept(**arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ops, "accept", failing)
        model.generate(prompts, stop_tokens=stop_tokens, **options)
    monkeypatch.setattr(ops, "accept", checking)
    monkeypatch.setattr(ops, "draft_advance", lambda **arguments: None)  # nothing is drafted
    engine = model._engines.idle[0]
    again = model.generate(prompts, **options)
    assert model._engines.idle[0] is engine and len(cycles) == 11
    assert [facts(out) for out in again] == expected


@pytest.mark.parametrize("requests", [1, 2, 4, 8])
def test_no_cycle_asks_more_of_an_op_than_the_warm_up(monkeypatch, uncaptured, requests):
    """On a GPU its capture would be refused: the op's workspace could not grow there."""
    rows = {}  # the most of any call, by op

    def counting(name):
        op = getattr(ops, name)

        def counted(*arguments, **options):
            first = [*arguments, *options.values()][0]
            rows[name] = max(rows.get(name, 0), len(first))
            return op(*arguments, **options)

        return counted

    for name in ("decoder_block", "exit_layer"):  # those whose workspace has a part for each row
        monkeypatch.setattr(ops, name, counting(name))
    monkeypatch.setattr(
        lossless.CycleRunner, "warm_up", lambda self, *parts: [part(self, *rest) for part, *rest in parts]
    )
    memory = Memory(random_model().network, slots=requests, max_len=16)
    runner = lossless.CycleRunner(memory, requests, stop_tokens=4)
    warm, most = dict(rows), runner.tokens - 1
    for drafts in range(most + 1):
        for filters in (False, True):
            lossless.cycle(runner, drafts, filters)
    assert warm == rows and warm["decoder_block"] == runner.tokens * requests


# --- how many drafts --------------------------------------------------------------------------------------


@pytest.fixture
def drafts_of_cycles(monkeypatch, uncaptured):
    """(requests, drafts) of each cycle."""
    drafts, verification = [], lossless.verification

    def counted(runner, count, *arguments):
        drafts.append((runner.requests, count))
        return verification(runner, count, *arguments)

    monkeypatch.setattr(lossless, "verification", counted)
    return drafts


def test_fewer_drafts_where_more_requests_share_the_rows(drafts_of_cycles):
    """Requests x (drafts + 1) <= 8, and only as many as may still be drawn."""
    drafts = drafts_of_cycles
    for requests in range(1, 9):
        engine = demo_model().engine(slots=requests, max_len=64)
        for number in range(requests):
            engine.submit([1, 2, number], mode="lossless", draft_tokens=7, max_new_tokens=12, stop_tokens=())
        list(engine)
        most = max(count for rows, count in drafts if rows == requests)
        assert most == 8 // requests - 1
        assert all(rows * (count + 1) <= 8 for rows, count in drafts)
        drafts.clear()


def test_each_request_has_its_own_number():
    engine = demo_model().engine(slots=2, max_len=128)
    for number, draft_tokens in enumerate((1, 3)):
        engine.submit(TEXTS[0], id=number, mode="lossless", draft_tokens=draft_tokens, max_new_tokens=40)
    outputs = {event.id: event.output for event in engine if event.output}
    assert outputs[0].tokens == outputs[1].tokens
    assert outputs[0].stats.steps > outputs[1].stats.steps
    assert max(out.stats.drafts / out.stats.steps for out in outputs.values()) <= 3
    assert outputs[0].stats.drafts <= outputs[0].stats.steps


def test_what_is_learned_of_each_request(monkeypatch):
    """Its own drafts, and how many of them became tokens."""
    learned, learn = {}, Drafting.learn

    def noted(drafting, drafts, quotes, right):
        learned.setdefault(drafting.draft_tokens, []).append((drafts + quotes, right))
        learn(drafting, drafts, quotes, right)

    monkeypatch.setattr(Drafting, "learn", noted)
    engine = demo_model().engine(slots=2, max_len=128)
    for draft_tokens in (1, 3):
        options = {"draft_tokens": draft_tokens, "max_new_tokens": 40, "temperature": 1.0, "stop_tokens": ()}
        engine.submit(TEXTS[1], id=draft_tokens, mode="lossless", **options)
    outputs = {event.id: event.output for event in engine if event.output}
    for draft_tokens, out in outputs.items():
        cycles = learned[draft_tokens]
        assert len(cycles) == out.stats.steps
        assert max(drafts for drafts, _ in cycles) == draft_tokens
        assert sum(drafts for drafts, _ in cycles) == out.stats.drafts
        assert sum(accepted for _, accepted in cycles) == out.stats.accepted_drafts > 0
        assert out.stats.accepted_drafts < out.stats.drafts, "else a wrong draft could count as right"


def test_no_more_drafts_than_can_become_tokens(drafts_of_cycles):
    """The backbone adds one of its own to each cycle."""
    for new_tokens in range(2, 9):
        drafts_of_cycles.clear()
        out = demo_model().generate(
            TEXTS[0], mode="lossless", draft_tokens=7, max_new_tokens=new_tokens, stop_tokens=()
        )
        left = new_tokens - 1
        assert drafts_of_cycles[0] == (1, left - 1) and len(out.tokens) == new_tokens
        assert drafts_of_cycles[-1][1] < left


def drafts_by(monkeypatch, texts, **options):
    """What lossless mode gives, and of every request and cycle how many drafts were verified."""
    verified, accept = [], ops.accept

    def noted(**arguments):
        rows = arguments["verify_slots"].view(arguments["drafts"].shape)
        verified.append(((rows >= 0).sum(0) - 1).tolist())
        accept(**arguments)

    monkeypatch.setattr(ops, "accept", noted)
    outputs = demo_model().generate(texts, mode="lossless", max_new_tokens=60, stop_tokens=(), **options)
    monkeypatch.setattr(ops, "accept", accept)
    return outputs, verified


def test_no_draft_follows_one_that_the_river_is_not_sure_of(monkeypatch, uncaptured):
    """Where the host has the control, and only with "auto": who asks for a number gets it."""
    share = {}
    for options in ({}, {"draft_tokens": 7}, {"exit_control": "device"}):
        demo_model()._engines.idle.clear()  # other tests have captured graphs there
        outputs, verified = drafts_by(monkeypatch, TEXTS[:1], **options)
        drafts, (out,) = [cycle[0] for cycle in verified], outputs
        assert sum(drafts) == out.stats.drafts and len(drafts) == out.stats.steps
        share[len(share)] = out.stats.accepted_drafts / out.stats.drafts
        if options.get("draft_tokens"):
            assert set(drafts[:-8]) == {7}
        elif not options:
            assert len(set(drafts)) >= 3, "each time as many as it was sure of"
    assert share[0] > max(share[1], share[2])


def test_each_request_stops_for_itself(monkeypatch, uncaptured):
    demo_model()._engines.idle.clear()
    outputs, verified = drafts_by(monkeypatch, TEXTS[:2], temperature=1.0, seed=3)
    assert sum(out.stats.drafts for out in outputs) == sum(max(0, drafts) for drafts in sum(verified, []))
    assert any(a != b for a, b in (cycle for cycle in verified if len(cycle) == 2))


@pytest.mark.parametrize("control, other", [("host", "device"), ("device", "host")])
def test_a_run_keeps_its_control(monkeypatch, uncaptured, control, other):
    """Another one that is asked for in a cycle comes with the next start. Drafts are counted right."""
    engine = demo_model().engine(slots=1, max_len=128, exit_control=control)
    verified, whole, accept, cycle = [], [], ops.accept, lossless.cycle
    want = lossless.CycleRunner.want

    def asking(runner, *arguments):
        want(runner, *arguments)
        engine.use(other)

    def noted(**arguments):
        verified.append((arguments["verify_slots"] >= 0).sum().item() - 1)
        accept(**arguments)

    def noted_cycle(*arguments):
        whole.append(arguments)
        return cycle(*arguments)

    monkeypatch.setattr(lossless.CycleRunner, "want", asking)
    monkeypatch.setattr(ops, "accept", noted)
    monkeypatch.setattr(lossless, "cycle", noted_cycle)
    for one in (control, other):
        verified.clear(), whole.clear()
        engine.submit(TEXTS[0], mode="lossless", max_new_tokens=40, stop_tokens=())
        (output,) = [event.output for event in engine if event.output]
        assert bool(whole) == (one == "device") and len(whole) <= output.stats.steps
        assert sum(verified) == output.stats.drafts and len(verified) == output.stats.steps


@pytest.mark.parametrize("control, own", [("host", 2 * 7), ("device", 4 * 7)])
def test_the_graphs_of_cycles_are_kept(monkeypatch, control, own):
    """All that one control has, of any model: a request captures none that another one has captured."""
    model, captured, made = random_model(num_hidden_layers=1), [], graph.Graph.__init__

    def noted(self, *arguments):
        captured.append(arguments)
        made(self, *arguments)

    def as_many(drafting, drafts, most):
        return [0] * min(most, drafting.draft_tokens)

    def run():
        captured.clear()
        options = {"mode": "lossless", "max_new_tokens": 30, "temperature": 1.0, "exit_control": control}
        settings = product((0, 5), (False, True), (Drafting.quote, as_many), range(1, 8))
        for top_k, logits, quote, drafts in settings:
            with monkeypatch.context() as quoting:
                quoting.setattr(Drafting, "quote", quote)
                model.generate([1], draft_tokens=drafts, top_k=top_k, return_logits=logits, **options)
        return len(captured)

    monkeypatch.setattr(graph.Graph, "__init__", noted)
    model._engines.idle.clear()
    assert (run(), run()) == (own + 4 * 8, 0)


def test_auto_follows_what_was_right():
    """By the expected tokens of a cycle over its bytes."""

    def after(results, cost=0.28, most=7, stops_early=False):
        drafting = Drafting("auto")
        for drafts, right in results:
            drafting.learn(drafts, 0, right)
        return drafting.choose(most, cost, stops_early)

    assert after([]) == 3, "0.8 of the drafts are taken to be right"
    assert after([(3, 3)] * 50) == 7
    assert after([(3, 0)] * 50) == 0
    assert after([(3, 1)] * 50) < after([(3, 2)] * 50) < 7
    assert after([(3, 3)] * 50, most=2) == 2 and after([], most=0) == 0
    assert after([], cost=2.0) == 0, "a draft that costs more than it can save"
    assert after([(3, 0)] * 50 + [(0, 0)] * 15) == 0
    assert after([(3, 0)] * 50 + [(0, 0)] * 20) == 1, "it may have become better"
    for stops_early in (False, True):
        assert [Drafting(4).choose(most, 0.28, stops_early) for most in (7, 4, 2, 0)] == [4, 4, 2, 0]


def test_auto_drafts_as_long_as_it_is_sure():
    """If drafts are worth it at all."""

    def after(results, most=7):
        drafting = Drafting("auto")
        for drafts, right in results:
            drafting.learn(drafts, 0, right)
        return drafting.choose(most, 0.5, stops_early=True)

    assert after([]) == 7 and after([], most=3) == 3 and after([], most=0) == 0
    assert after([(2, 1)] * 50) == 7, "half of those that were tried, a little more than they cost"
    assert after([(1, 1), (1, 0)] * 2 + [(1, 0)] * 50) == 0
    assert after([(1, 0)] * 50 + [(0, 0)] * 32) == 0 < after([(1, 0)] * 50 + [(0, 0)] * 48)
    assert Drafting("auto").sure > 0 == Drafting(3).sure == Drafting(3, 0.1).sure


def test_what_a_text_says_again_is_quoted():
    text = [9, 1, 2, 3, 4, 5, 6]
    assert Quotes(text, []).find([], 3) == [], "what comes last has no continuation yet"
    new = []
    quotes = Quotes(text, new)
    new += [1, 2, 3]
    assert quotes.find([], 1) == [4] and quotes.find([], 3) == [4, 5, 6]
    assert quotes.find([4, 5], 2) == [6, 1], "with drafts before it"
    assert quotes.find([7], 2) == quotes.find([2, 1], 2) == [], "those last three stood nowhere together"
    new += [8, 8, 1, 2, 3]
    assert quotes.find([], 4) == [8, 8, 1, 2], "what came last the last time"
    new += [8, 8, 1]
    assert quotes.find([2, 3], 9) == [8, 8, 1, 2, 3, 8, 8, 1, 2], "which goes on"
    assert Quotes([], []).find([], 2) == Quotes([1, 1], []).find([1], 2) == []
    for length in range(3, 6):
        assert Quotes([5] * length, [5]).find([], 3) == [5, 5, 5]


def test_a_text_is_read_at_the_first_look():
    """What waits, or runs beside more than can draft, takes no memory for quotes."""
    engine = random_model().engine(slots=5, max_len=POSITIONS)
    for _ in range(9):
        engine.submit([1, 2, 3, 4] * 3, mode="lossless", max_new_tokens=4)
    sequences = [running.sequence for running in engine._known.values()]
    for _ in range(7):
        engine.step()
    assert len(engine._cycles) == 5 and not any(one._drafting._quotes._text for one in sequences)
    list(engine)
    assert any(one._drafting._quotes._text for one in sequences)


def test_a_text_whose_reading_is_cut_off_is_read_on():
    class Cut(list):
        def append(self, token):
            if len(self) == 5 and not cut:
                cut.append(token)
                raise KeyboardInterrupt
            super().append(token)

    for tokens in ([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], []), ([1, 2], [3, 4, 5, 6, 7, 1, 2, 3]):
        quotes, cut = Quotes(*tokens), []
        quotes._text = Cut()
        with pytest.raises(KeyboardInterrupt):
            quotes.find([], 3)
        assert quotes.find([], 3) == [4, 5, 6] and quotes._text == [*tokens[0], *tokens[1]]


def test_quotes_are_chosen_where_they_promise_more():
    def drafting(*learned, text=(1, 2, 3, 4, 1, 2, 3)):
        drafting = Drafting("auto", prompt=text)
        for result in learned:
            drafting.learn(*result)
        drafting.choose(7, 0.3, stops_early=True)
        return drafting

    assert drafting().quote([], 3) == [4, 1, 2] and drafting().quote([4], 2) == [1, 2]
    assert drafting().quote([], 0) == drafting().quote([5], 3) == []
    assert drafting(*[(0, 4, 0)] * 20).quote([], 3) == [], "they were wrong"
    assert drafting(*[(0, 4, 0)] * 20, *[(3, 0, 3)] * 60).quote([], 3) == [4, 1, 2], "long ago"
    follows_wrong_ones = drafting(*[(3, 4, 1)] * 20)._quoted.value
    assert follows_wrong_ones == pytest.approx(Share.PRIOR), "nothing is known of what followed a wrong draft"
    assert drafting(*[(7, 0, 7)] * 20, *[(0, 7, 1)] * 20).quote([], 7) == [], "the river is better"
    for promise, quote in ((1.5, []), (1.6, [4, 1, 2])):  # three drafts promise 1.55, and seven 1.34
        drafts = drafting()
        drafts._quoted.expected = lambda most, promise=promise: promise
        assert drafts.quote([], 3) == quote
    fixed = Drafting(3, prompt=[1, 2, 3, 4, 1, 2, 3])
    assert fixed.quote([], 3) == [] and fixed.choose(7, 0.3, True) == 3, "a number is the river's"


REPEATED = "7, 3, 9, 1, 4, 8, 2, 6, " * 3


@pytest.mark.parametrize("control", ["host", "device"])
@pytest.mark.parametrize("requests", [1, 2, 4])
def test_quotes_give_the_tokens_of_full_depth(control, requests):
    """Where a text repeats itself, few tokens cost a draft step."""
    model, options = demo_model(), {"max_new_tokens": 60, "stop_tokens": ()}
    texts = [REPEATED, TEXTS[0], REPEATED[8:], TEXTS[4]][:requests]
    for temperature in (0.0, 1.0):
        full = model.generate(texts, mode="full", temperature=temperature, **options)
        ours = model.generate(
            texts, mode="lossless", temperature=temperature, exit_control=control, **options
        )
        assert [facts(out) for out in ours] == [facts(out) for out in full]
        for out in ours:
            stats, layers = out.stats, model.config.num_hidden_layers
            assert 0 <= stats.quotes <= stats.drafts
            river = stats.drafts - stats.quotes
            assert round(stats.exit_rows * (stats.new_tokens - 1)) == river * layers
            if not temperature:
                assert stats.backbone_rows * (stats.new_tokens - 1) == pytest.approx(
                    (stats.steps + stats.drafts) * layers
                )
        assert ours[0].stats.quotes > 0


@pytest.mark.parametrize("control", ["host", "device"])
@pytest.mark.parametrize("requests", [1, 2, 3])
def test_no_quote_changes_a_token(monkeypatch, control, requests):
    """Random ones in the place of what the text said."""
    model, generator = random_model(), random.Random(requests)

    def quote(drafting, drafts, most):
        return random_prompt(most, generator.randrange(1 << 20)) if generator.random() < 0.5 else []

    monkeypatch.setattr(Drafting, "quote", quote)
    prompts = [random_prompt(5, seed) for seed in range(requests)]
    quoted = 0
    for seed in range(8):
        options = {"max_new_tokens": 25, "temperature": float(seed % 2), "seed": seed}
        full = model.generate(prompts, mode="full", **options)
        ours = model.generate(prompts, mode="lossless", exit_control=control, **options)
        assert [facts(out) for out in ours] == [facts(out) for out in full]
        quoted += sum(out.stats.quotes for out in ours)
    assert quoted > 100


@pytest.mark.parametrize("control", ["host", "device"])
def test_quotes_are_verified_as_they_are(monkeypatch, uncaptured, control):
    """Nothing overwrites or follows them, and they make no other request draft more than it wants."""
    generator, quoted, seen, accept = random.Random(1), [], [], ops.accept

    def quote(drafting, drafts, most):
        if drafting.draft_tokens != "auto" or generator.random() < 0.5:
            return []
        quoted.append((drafts, random_prompt(most, generator.randrange(1 << 20))))
        return quoted[-1][1]

    def noted(**arguments):
        requests = arguments["drafts"].shape[1]
        rows = len(arguments["tokens"]) // requests
        by_request = arguments["drafts"][1:].T.tolist()
        for drafts, tokens in quoted:
            proposed = [*drafts, *tokens]
            if control == "device" and requests == 2:
                assert rows == 2
                proposed = proposed[:1]
            assert len(proposed) < rows
            assert proposed + [-1] * (len(by_request[0]) - len(proposed)) in by_request
            seen.append((requests, len(drafts)))
        quoted.clear()
        accept(**arguments)

    monkeypatch.setattr(Drafting, "quote", quote)
    monkeypatch.setattr(ops, "accept", noted)
    engine = random_model().engine(slots=2, max_len=POSITIONS, exit_control=control)
    for _ in range(4):
        engine.submit([1], mode="lossless", max_new_tokens=20)
        engine.submit([2], mode="lossless", max_new_tokens=50, draft_tokens=1)
        list(engine)
        engine.submit([1], mode="lossless", max_new_tokens=20)
        list(engine)
    assert {(1, 0), (2, 0)} <= set(seen)
    assert (max(drafts for _, drafts in seen) > 0) == (control == "host")


def test_a_low_temperature_makes_no_draft_surer():
    """Margins are of logits over the temperature, and so are the errors of the river's."""
    assert [Drafting("auto", t).sure for t in (0.0, 0.25, 1.0, 2.0)] == [1.0, 4.0, 1.0, 1.0]
    assert math.isfinite(Drafting("auto", 1e-300).sure)
    drafts = {}
    for temperature in (0.0, 0.02):
        options = {"mode": "lossless", "temperature": temperature, "max_new_tokens": 60, "stop_tokens": ()}
        stats = [demo_model().generate(text, **options).stats for text in TEXTS]
        drafts[temperature] = sum(one.drafts for one in stats) / sum(one.steps for one in stats)
    assert drafts[0.02] < 1.2 * drafts[0.0]


def test_the_cost_of_a_draft():
    model = random_model()
    river = sum(tensor.nbytes for layer in model.river for tensor in vars(layer).values())
    backbone = sum(
        tensor.nbytes
        for layer in model.weights.layers
        for tensor in vars(layer).values()
        if tensor is not None
    )
    head = model.weights.lm_head.nbytes
    expected = (river + model.river.lm_head.nbytes) / (backbone + head)
    assert draft_cost(model.network) == pytest.approx(expected)
