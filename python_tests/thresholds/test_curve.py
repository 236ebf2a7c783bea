"""The curve and the choice, against what free generation does; the file, and what generation makes of it."""

import json
import math
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_model import demo_model, random_model, random_prompt

import river_ext
from river_ext.engine.drafting import draft_cost
from river_ext.errors import RiverError
from river_ext.loading.calibrated import Calibrated, read_calibrated, write_calibrated
from river_ext.quant.exit_river import river_sha256, save_river
from river_ext.scale.replica import checked_replica
from river_ext.thresholds import drafts
from river_ext.thresholds.calibrate import calibrate, steps
from river_ext.thresholds.choice import Targets, choose
from river_ext.thresholds.curve import Answer, Point, curve, full_depth, speed_by_bytes, speeds_over

NEW_TOKENS, THRESHOLDS = 12, (0.9, 0.6, -2.0)


@pytest.fixture(scope="module")
def calibration():
    """Of a random model, whose exit layers are far from its backbone; how often `advance` was called."""
    prompts, calls = [random_prompt(length, seed=length) for length in (3, 5, 8, 4)], []
    right = lambda number, text: number % 2 == 0  # noqa: E731
    found = calibrate(
        random_model(), prompts, Targets(0.5), THRESHOLDS[::-1], max_new_tokens=NEW_TOKENS, timed=2,
        is_right=right, advance=lambda: calls.append(None),
    )  # fmt: skip
    return found, prompts, len(calls)


def test_points_are_what_generation_does(calibration):
    found, prompts, calls = calibration
    model = random_model()
    assert [point.threshold for point in found.points] == list(THRESHOLDS)
    assert calls == steps(len(prompts), len(THRESHOLDS), 2)
    full = model.generate(prompts, mode="full", max_new_tokens=NEW_TOKENS)
    for point in found.points:
        own = model.generate(prompts, threshold=point.threshold, max_new_tokens=NEW_TOKENS)
        differ = [a.tokens != b.tokens for a, b in zip(own, full, strict=True)]
        assert (point.answers, point.different) == (len(prompts), sum(differ))
        differing, depths = 0, []
        for prompt, reference in zip(prompts, full, strict=True):
            score = model.score(
                prompt + reference.tokens, prompt_length=len(prompt), threshold=point.threshold
            )
            differing += sum(score.logits[i].argmax() != token for i, token in enumerate(reference.tokens))
            depths += score.exit_depths[1:]
        assert (point.tokens, point.different_tokens) == (len(prompts) * NEW_TOKENS, differing)
        assert point.exit_depth == pytest.approx(sum(depths) / len(depths))
        assert point.right == 2 == found.right
    assert found.points[-1].different > 0  # the river of a random model is another model


def test_never_exiting_differs_nowhere():
    found = calibrate(random_model(), [random_prompt(4)], Targets(0.5), [1.0], max_new_tokens=6, timed=1)
    (point,) = found.points
    assert (point.different_tokens, point.different, point.exit_depth, point.by_bytes) == (0, 0, 4, 1)


def test_speeds_are_of_prompts_that_decode(monkeypatch):
    """An answer that ends with its first token has no speed."""
    from river_ext.thresholds import calibrate as module

    prompts, ran, runs = (
        [random_prompt(length, seed=length) for length in (3, 5, 8)],
        [],
        module.measured_runs,
    )

    def answers(model, found, *more):
        return [Answer(found[0], [7], ""), *full_depth(model, found[1:], *more)]

    def recorded(model, found, *more):
        ran.append(found)
        return runs(model, found, *more)

    monkeypatch.setattr(module, "full_depth", answers)
    monkeypatch.setattr(module, "measured_runs", recorded)
    for asked, timed in ((1, 1), (3, 2)):
        found = calibrate(random_model(), prompts, Targets(0.99), [0.9], max_new_tokens=3, timed=asked)
        assert ran.pop() == prompts[1 : 1 + timed]
        assert found.timed == timed == found.as_dict()["timed"]


def test_right_is_what_free_generation_ends_with():
    """Also where full depth's answer ends before the threshold's own."""
    model, prompt, texts = random_model(), random_prompt(5, seed=5), []
    own = model.generate(prompt, threshold=-2.0, max_new_tokens=NEW_TOKENS).tokens
    full = model.generate(prompt, mode="full", max_new_tokens=NEW_TOKENS).tokens
    first = next(i for i, tokens in enumerate(zip(own, full, strict=True)) if len(set(tokens)) > 1)
    assert first + 1 < NEW_TOKENS

    class Spelling:
        """The model; its texts are its tokens, spelt out."""

        config, network, score = model.config, model.network, staticmethod(model.score)

        def generate(self, prompt, **options):
            out = model.generate(prompt, **options)
            return replace(out, text=str(out.tokens))

    def is_right(number, text):
        texts.append(text)
        return True

    for end in (first, first + 1):  # the same up to there, and not any more
        answer = Answer(prompt, full[:end], "full")
        curve(Spelling(), [answer], [-2.0], {-2.0: 1.0}, NEW_TOKENS, lambda: None, is_right)
    assert texts == ["full", str(own)]


def test_speed_by_bytes_counts_the_weights_of_the_layers_that_ran():
    model = random_model()
    layers, head = model.network.layers, model.network.lm_head.nbytes

    def size(weights):
        return sum(t.nbytes for t in vars(weights).values() if isinstance(t, torch.Tensor))

    full = sum(size(layer.weights) for layer in layers) + head
    shallow = size(layers[0].weights) + sum(size(layer.river) for layer in layers[1:])
    assert speed_by_bytes(model, [4], False) == 1
    assert speed_by_bytes(model, [1, 1], False) == pytest.approx(full / (shallow + head))
    assert speed_by_bytes(model, [1, 4], False) == pytest.approx(full / ((shallow + head + full) / 2))
    w4 = speed_by_bytes(model, [1], True)
    assert w4 == pytest.approx(full / (shallow + model.network.lm_head_w4.nbytes))


def test_draft_lengths_count_passes_and_drafts(calibration):
    found, prompts, _ = calibration
    model = random_model()
    by_length = {length.draft_tokens: length for length in found.lengths}
    assert list(by_length) == ["auto", 1, 2, 3, 4, 5, 6, 7]
    runs = [
        model.generate(prompt, mode="lossless", draft_tokens=3, max_new_tokens=NEW_TOKENS)
        for prompt in prompts[:2]
    ]
    passes, made = sum(r.stats.steps for r in runs), sum(r.stats.drafts for r in runs)
    three, cost = by_length[3], draft_cost(model.network)
    assert three.tokens_per_pass == pytest.approx(2 * (NEW_TOKENS - 1) / passes)
    assert three.right == pytest.approx(sum(r.stats.accepted_drafts for r in runs) / made)
    assert three.by_bytes == pytest.approx(2 * (NEW_TOKENS - 1) / (passes + made * cost))


def test_quotes_cost_no_draft_step():
    stats = SimpleNamespace(steps=4, drafts=20, quotes=12, accepted_drafts=15)
    output = SimpleNamespace(tokens=[1] * 20, stats=stats)
    counted = drafts._counted([output, output], cost=0.25)
    assert counted == {"tokens_per_pass": 19 / 4, "right": 0.75, "by_bytes": 19 / (4 + 8 * 0.25)}


def test_the_fastest_length_is_fixed_only_if_it_is_clearly_faster():
    def lengths(auto, three, least=1.01):
        """By the clock so fast, by bytes the other way round."""
        pairs = (("auto", auto, 1.0), (3, three, least))
        return [drafts.DraftLength(length, 1, 1, 3 - speed, speed, least) for length, speed, least in pairs]

    assert drafts.fastest(lengths(1.0, 1.2), by_bytes=False) == 3
    assert drafts.fastest(lengths(1.0, 1.2), by_bytes=True) == "auto"
    assert drafts.fastest(lengths(1.0, 1.02), by_bytes=False) == "auto"
    assert drafts.fastest(lengths(1.0, 1.2, least=0.99), by_bytes=False) == "auto"  # not on every prompt
    assert drafts.fastest(lengths(1.2, 1.0, least=0.99), by_bytes=True) == 3


# --- the choice -------------------------------------------------------------------------------------------


def point(threshold, depth, tokens=0, different=0, by_bytes=1.0, measured=1.0, answers=100) -> Point:
    return Point(threshold, depth, 1000, tokens, answers, different, None, by_bytes, measured)


CURVE = [
    point(0.99, 14, tokens=2, different=0, by_bytes=1.1, measured=1.05),
    point(0.98, 12, tokens=8, different=1, by_bytes=1.3, measured=1.2),
    point(0.95, 3, tokens=30, different=20, by_bytes=2.0, measured=1.6),
    point(0.9, 2, tokens=9, different=0, by_bytes=2.1, measured=1.7),
]


@pytest.mark.parametrize(
    ("targets", "threshold"),
    [
        ({}, 0.9),  # 1 % of tokens, and the fewest layers
        ({"max_disagreement": 0.005}, 0.99),
        ({"max_disagreement": 0.001}, None),
        ({"min_speedup": 1.15}, 0.98),  # the fewest different tokens of those that are fast enough
        ({"min_speedup": 1.15, "by_bytes": True}, 0.98),
        ({"min_speedup": 1.55}, 0.9),
        ({"min_speedup": 1.25}, 0.9),
        ({"min_speedup": 1.25, "by_bytes": True}, 0.98),
        ({"min_speedup": 3}, None),
        ({"max_disagreement": 0.005, "min_speedup": 1.2}, None),
        ({"guarantee": 0.05}, 0.98),  # 0.9 comes after one that fails
        ({"guarantee": 0.05, "min_speedup": 1.3}, None),
        ({"guarantee": 0.3}, 0.9),
        ({"guarantee": 0.3, "max_disagreement": 0.0085}, 0.98),
    ],
)
def test_the_choice(targets, threshold):
    found = choose(CURVE, Targets(**targets))
    assert (found and found.threshold) == threshold


def test_targets_that_cannot_be_are_refused():
    for options, said in [
        ({"max_disagreement": 0}, "max_disagreement=0; accepted"),
        ({"guarantee": 1}, "guarantee=1; accepted"),
        ({"guarantee": 5e-324}, "guarantee=5e-324; accepted: a share from 1e-06 on"),
        ({"guarantee": 0.1, "confidence": math.nan}, "confidence=nan; accepted"),
        ({"min_speedup": math.inf}, "min_speedup=inf; accepted"),
    ]:
        with pytest.raises(RiverError, match=said):
            Targets(**options)
    with pytest.raises(RiverError, match="accepted: 2995731 or more"):
        Targets(guarantee=1e-6).check_prompts(range(60))
    Targets(guarantee=0.05).check_prompts(range(59))
    with pytest.raises(RiverError, match="58 prompts are too few to promise 5 % .* accepted: 59 or more"):
        Targets(guarantee=0.05).check_prompts(range(58))
    with pytest.raises(RiverError, match="1 prompts are too few .* or more, all different"):
        calibrate(random_model(), [random_prompt(4)] * 59, Targets(guarantee=0.05), [0.9])


# --- the file ---------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    """A file for the bundled model; keyword arguments change what it says."""

    def write(**changes):
        model = demo_model()
        found = Calibrated(
            threshold=0.97, min_layers=2, river_head="model", draft_tokens=3, fingerprint=model.fingerprint,
            river_sha256=river_sha256(model.river), dtype=model.network.dtype,
        )  # fmt: skip
        path = tmp_path / "calibrated.json"
        write_calibrated(path, replace(found, **changes), {"curve": []})
        return path

    return write


def test_a_file_comes_back(file):
    path = file()
    found = read_calibrated(path, 16)
    assert (found.threshold, found.min_layers, found.draft_tokens) == (0.97, 2, 3)
    assert found.dtype == demo_model().network.dtype
    assert json.loads(path.read_text())["measured"] == {"curve": []}
    assert read_calibrated(file(draft_tokens="auto", threshold=0.5), 16).threshold == 0.5  # replaced
    assert read_calibrated(file(threshold=(1.0, -2.0, 0.5)), 3).threshold == (1.0, -2.0, 0.5)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_word_stands_for_the_numbers(file):
    model = river_ext.load(device="cpu", calibrated=file())
    options = {"max_new_tokens": 8, "min_layers": 2}
    expected = model.generate("Question:", threshold=0.97, **options)
    found = model.generate(["Question:", "def"], threshold=["calibrated", 0.5], **options)
    assert found[0].exit_depths == expected.exit_depths and found[0].tokens == expected.tokens
    assert min(model.generate("Question:", **options).exit_depths) < min(expected.exit_depths[1:])
    assert model.score([5, 6, 7, 8], prompt_length=2, threshold="calibrated", min_layers=2).exit_depths
    drafted = model.generate("Question:", mode="lossless", draft_tokens="calibrated", max_new_tokens=9)
    assert (
        drafted.stats.drafts
        == model.generate("Question:", mode="lossless", draft_tokens=3, max_new_tokens=9).stats.drafts
    )
    for changes, said in [
        ({"min_layers": 1}, "min_layers=1 with threshold='calibrated', which was measured with min_layers=2"),
        ({"prefill": "min"}, "prefill='min' with"),
        ({"river_head": "w4"}, "river_head='w4' with"),
        ({"kv_strategy": "mask"}, "kv_strategy='mask' with"),
        ({"batch_policy": "min"}, "batch_policy='min' with"),
        ({"threshold": "calibrate"}, "threshold='calibrate'; accepted"),
    ]:
        with pytest.raises(RiverError, match=said):
            model.generate("Question:", **{"threshold": "calibrated", **options, **changes})


def test_a_file_with_a_threshold_for_each_layer(file):
    by_layer = (1.0, 1.0, 0.98, *[0.9] * 13)
    model = river_ext.load(device="cpu", calibrated=file(threshold=by_layer))
    options = {"max_new_tokens": 8, "min_layers": 2}
    expected = model.generate("Question:", threshold=by_layer, **options)
    assert model.generate("Question:", threshold="calibrated", **options).exit_depths == expected.exit_depths
    assert set(expected.exit_depths) == {4, 16}  # a threshold of 0.9 leaves after 2 or 3
    several = model.generate(["Question:", "def"], threshold="calibrated", **options)
    assert several[0].exit_depths == expected.exit_depths


def test_without_a_file_the_word_is_refused():
    for options in ({"threshold": "calibrated"}, {"draft_tokens": "calibrated", "mode": "lossless"}):
        with pytest.raises(
            RiverError, match="='calibrated' needs a model that was loaded with calibrated=FILE"
        ):
            demo_model().generate("a", **options)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fingerprint": "x"}, "belongs to another checkpoint"),
        ({"river_sha256": "x"}, "another river"),
        ({"dtype": torch.float16}, "was measured in torch.float16, the model is in torch.bfloat16"),
        ({"threshold": (0.5,) * 15}, "threshold has 15 numbers, the model 16 layers; accepted: one for each"),
        ({"min_layers": 17}, "min_layers is 17; accepted: an integer from 1 to 16"),
    ],
)
def test_a_file_of_something_else_is_refused(file, changes, said, refused):
    """Before any request, whoever reads it."""
    path = file(**changes)
    with pytest.raises(RiverError, match=said):
        river_ext.load(device="cpu", calibrated=path)
    if "river_sha256" not in changes:  # which no replica is needed for
        with pytest.raises(RiverError, match=said):
            checked_replica(None, replicas=1, calibrated=path)
    for command in (["serve", "--demo", "--port", "0"], ["generate", "--demo", "hi"]):
        assert said in refused(*command, "--calibrated", path)


def test_a_file_for_a_head_that_the_river_has_not_is_refused(file, tmp_path):
    river = copy(demo_model().river)
    river.lm_head = None
    save_river(tmp_path / "river", river, demo_model().config, demo_model().fingerprint)
    given = {"device": "cpu", "river": tmp_path / "river"}
    path = file(river_sha256=river_sha256(river))
    assert river_ext.load(**given, calibrated=path).config.calibrated.river_head == "model"
    with pytest.raises(RiverError, match='river_head is "w4", and this river has no head; accepted: model'):
        river_ext.load(**given, calibrated=file(river_sha256=river_sha256(river), river_head="w4"))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("format", "x", "format is"),
        ("format_version", 2, "format_version is 2"),
        ("threshold", "0.5", "a number from -2 to 1"),
        ("threshold", 1.5, "a number from -2 to 1"),
        ("threshold", [0.5, 1.5], "threshold.1 is 1.5; accepted: a number from -2 to 1"),
        ("threshold", [0.5] * 3, "threshold has 3 numbers, the model 2 layers"),
        ("min_layers", 0, "min_layers is 0"),
        ("min_layers", 3, "an integer from 1 to 2"),
        ("river_head", "w8", "model, w4"),
        ("draft_tokens", 8, "an integer from 1 to 7"),
        ("draft_tokens", None, "an integer from 1 to 7"),
        ("fingerprint", None, "a string"),
        ("dtype", "int8", "bfloat16"),
        ("prefill", "min", "prefill is"),
    ],
)
def test_a_damaged_file_is_refused(file, key, value, said):
    path = file()
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(RiverError, match=said):
        read_calibrated(path, 2)


def test_nothing_of_anybodys_is_replaced(file, tmp_path):
    path = tmp_path / "notes.json"
    path.write_text("{}")
    found = read_calibrated(file(), 16)
    for other in (path, tmp_path):
        with pytest.raises(RiverError, match="exists and is no calibrated threshold"):
            write_calibrated(other, found, {})
    with pytest.raises(RiverError, match="no directory that can be written to"):
        write_calibrated(tmp_path / "none" / "a.json", found, {})
    assert path.read_text() == "{}"


def test_speeds_are_those_of_prompts_with_decoded_tokens():
    model = random_model()
    runs = [model.generate(random_prompt(4), max_new_tokens=n) for n in (1, 4, 4)]
    assert speeds_over(runs, runs) == [1, 1]
    assert speeds_over(runs[:1], runs[:1]) == [1]  # of none: no faster, no slower
    assert full_depth(model, [random_prompt(4)], 3, lambda: None)[0].tokens
