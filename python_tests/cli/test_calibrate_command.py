"""`river calibrate`, and the commands that take what it writes."""

import json

import pytest

from river_cli.arguments import parse
from river_cli.calibrate import _use
from river_ext.errors import RiverError
from river_ext.thresholds.calibrate import Calibration

DEMO = "calibrate", "--demo", "--max-new-tokens", "6", "--timed", "1", "--thresholds", "0.9,0.99"


@pytest.fixture
def written(river_json, tmp_path):
    """The file of a short run, and what that printed."""
    path = tmp_path / "demo.json"
    return path, river_json(*DEMO, "--count", "3", "--max-disagreement", "90%", "-o", path)


def test_the_table_and_the_choice(river, tmp_path):
    path = tmp_path / "demo.json"
    code, out, _ = river(*DEMO, "--count", "3", "--max-disagreement", "0.9", "-o", path)
    assert code == 0
    assert "3 prompts, 18 tokens of full depth at" in out
    assert "threshold  exit depth  same tokens  same answers  95 % bound" in out
    assert "drafts  tokens per pass" in out
    assert "For at most 90 % of tokens different, in answers of up to 6 tokens:\n  threshold 0.9; in" in out
    assert "; in lossless mode, draft_tokens" in out
    assert f"river generate --demo --calibrated {path} 'a prompt'" in out
    assert json.loads(path.read_text())["threshold"] == 0.9


def test_the_document(written):
    path, document = written
    assert (document["threshold"], document["prompts"], document["output"]) == (0.9, 3, str(path))
    assert [point["threshold"] for point in document["curve"]] == [0.99, 0.9]
    assert [length["draft_tokens"] for length in document["drafts"]] == ["auto", *range(1, 8)]
    assert document["full_depth"]["right"] == 0  # no answer ends within six tokens
    assert json.loads(path.read_text())["measured"]["curve"] == document["curve"]


def test_generation_by_the_file(written, river_json, river):
    path, _ = written
    short = "--demo", "Question:", "--max-new-tokens", "6"
    found = river_json("generate", *short, "--calibrated", path)["outputs"]
    assert found[0]["tokens"] == river_json("generate", *short, "--threshold", "0.9")["outputs"][0]["tokens"]
    assert (
        river_json("generate", *short, "--calibrated", path, "--threshold", "2")["options"]["threshold"] == 2
    )
    lossless = river_json("generate", *short, "--calibrated", path, "--mode", "lossless")
    assert lossless["options"]["draft_tokens"] == "calibrated"
    code, out, err = river("generate", *short, "--calibrated", path, "--compare")
    assert code == 0 and "River 0.9" in out, err


def test_options_of_the_measurement_come_with_the_file(river_json, river, tmp_path):
    path = tmp_path / "demo.json"
    own = "--min-layers", "3", "--river-head", "w4", "--guarantee", "99%"
    river_json(*DEMO, "--count", "2", *own, "-o", path)
    short = "generate", "--demo", "Question:", "--max-new-tokens", "6", "--calibrated", path
    options = river_json(*short)["options"]
    assert (options["min_layers"], options["river_head"]) == (3, "w4")
    code, _, err = river(*short, "--min-layers", "2")
    assert code == 2 and "min_layers=2 with threshold='calibrated'" in err


def test_thresholds_by_layer(river, river_json, tmp_path):
    path = tmp_path / "demo.json"
    document = river_json(*DEMO, "--count", "6", "--per-layer", "--max-disagreement", "90%", "-o", path)
    assert (document["learnt"], document["prompts"]) == (3, 6)
    by_layer = [point for point in document["curve"] if isinstance(point["threshold"], list)]
    assert by_layer and {len(point["threshold"]) for point in by_layer} == {16}
    facts = json.loads(path.read_text())
    facts["threshold"] = by_layer[0]["threshold"]
    path.write_text(json.dumps(facts))
    short = "generate", "--demo", "Question:", "--max-new-tokens", "6", "--calibrated", path
    assert river_json(*short)["outputs"][0]["tokens"]
    code, out, err = river(*short, "--compare")
    assert code == 0 and "River by layer" in out, err
    code, out, _ = river(*DEMO, "--count", "6", "--per-layer", "--max-disagreement", "90%")
    assert code == 0 and "6 prompts, 3 of them to learn from, " in out and "by layer  " in out


def test_prompts_of_a_file(river_json, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"question": "Question: Ana"}, {"prompt": "def f", "text": "x"}, {"text": "Answer:"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    document = river_json(*DEMO, "--prompts", path, "--max-disagreement", "99%")
    assert document["prompts"] == 3 and document["full_depth"]["right"] is None
    assert river_json(*DEMO, "--prompts", path, "--count", "2", "--max-disagreement", "99%")["prompts"] == 2


def test_no_threshold_for_a_target_is_said_after_the_table(river, tmp_path):
    path = tmp_path / "demo.json"
    code, out, err = river(*DEMO, "--count", "2", "--min-speedup", "1000", "-o", path)
    assert code == 2 and not path.exists()
    assert "same answers" in out and "--calibrated" not in out
    assert err.startswith("river: error: no threshold meets the target (1000 times as fast), so nothing is")


def test_what_was_measured_is_shown_where_it_cannot_be_written(river, tmp_path, monkeypatch):
    def full(self, path, model):
        raise RiverError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(Calibration, "write", full)
    code, out, err = river(*DEMO, "--count", "2", "--max-disagreement", "90%", "-o", tmp_path / "a.json")
    assert code == 2 and "same answers" in out and "--calibrated" not in out
    assert "No space left on device" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["calibrate"], "--demo"),
        (["calibrate", "."], "what to calibrate on; accepted: --prompts FILE"),
        (
            ["calibrate", "--demo", "--guarantee", "5%", "--count", "58"],
            "58 prompts are too few to promise 5 %",
        ),
        (["calibrate", "--demo", "--per-layer", "--count", "1"], "1 prompts for thresholds by layer"),
        (
            ["calibrate", "--demo", "--per-layer", "--guarantee", "5%", "--count", "116"],
            "too few to promise 5 %",
        ),
        (["calibrate", "--demo", "--guarantee", "5"], "--guarantee: '5'; accepted: above 0 and below 1"),
        (["calibrate", "--demo", "--guarantee", "1e-300"], "guarantee=1e-300; accepted: a share from 1e-06"),
        (["calibrate", "--demo", "--guarantee", "x%"], "--guarantee: 'x%'; accepted"),
        (["calibrate", "--demo", "--confidence", "100%"], "--confidence: '100%'; accepted"),
        (["calibrate", "--demo", "--max-disagreement", "nan"], "--max-disagreement: 'nan'; accepted"),
        (["calibrate", "--demo", "--min-speedup", "0"], "min_speedup=0.0; accepted"),
        (["calibrate", "--demo", "--count", "0"], "--count: '0'; accepted"),
        (["calibrate", "--demo", "--timed", "0"], "--timed=0; accepted"),
        (["calibrate", "--demo", "--thresholds", "0.9,,1"], "--thresholds '0.9,,1'; accepted"),
        (["calibrate", "--demo", "--thresholds", "inf"], "--thresholds 'inf'; accepted: numbers from -2"),
        (["calibrate", "--demo", "--max-new-tokens", "0"], "max_new_tokens=0; accepted"),
        (["calibrate", "--demo", "--river-head", "w8"], "river_head='w8'; accepted"),
        (["calibrate", "--demo", "--prompts", "nowhere"], "nowhere: cannot be read"),
        (["calibrate", "--demo", "-o", "nowhere/a.json"], "no directory that can be written to"),
        (["calibrate", "--demo", "--chat"], "chat"),
        (["generate", "--demo", "hi", "--calibrated", "nowhere"], "nowhere: cannot be read"),
        (["generate", "--demo", "hi", "--threshold", "calibrated"], "loaded with calibrated=FILE"),
        (["generate", "--demo", "hi", "--threshold", "x"], "--threshold: invalid float value: 'x'"),
    ],
)
def test_refusals(arguments, said, refused):
    assert said in refused(*arguments)


def test_the_proposed_command_has_the_chat_template_of_the_measurement():
    arguments = parse(["calibrate", "DIR", "--prompts", "FILE", "--chat", "-o", "a.json"])
    assert _use(arguments) == "river generate --model DIR --calibrated a.json --chat 'a prompt'"
