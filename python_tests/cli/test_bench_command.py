"""`river bench`: its table, its document, random weights where there is a config alone, and refusals."""

import json
import re
import shutil

import pytest
from conftest import TINY_CONFIG

from river_ext.model import DEMO

SHORT = "--new-tokens", "6", "--turns", "1"


@pytest.fixture
def lone(tmp_path):
    """A config.json alone."""
    (tmp_path / "shape").mkdir()
    path = tmp_path / "shape" / "config.json"
    path.write_text(json.dumps({**TINY_CONFIG, "torch_dtype": "bfloat16"}))
    return path


def test_the_document(river_json):
    document = river_json("bench", "--demo", *SHORT, "--thresholds", "0.5,0.9", "--river-head", "w4")
    names = ["full bf16", "lossless", "full W4, W4 head", "River 0.5, W4 head", "River 0.9, W4 head"]
    assert [result["name"] for result in document["results"]] == names
    assert document["machine"]["processor"] and document["peak_memory_bytes"] > 50e6
    assert len(document["prompt_tokens"]) == 3 and document["new_tokens"] == 6
    full, lossless, *_ = document["results"]
    assert full["x_full"] == 1 and lossless["same_output"]["value"] == 1
    assert full["options"] == {"mode": "full"} and full["exit_depth"] == 16
    for result in document["results"]:
        assert len(result["runs"]) == 3 and result["first_token_ms"] > 0
        speeds = sorted(run["tokens_per_second"] for run in result["runs"])
        assert result["tokens_per_second"] == speeds[1]
    assert document["results"][3]["options"] == {"threshold": 0.5, "min_layers": 1, "river_head": "w4"}


def test_the_table(river):
    code, out, err = river("bench", "--demo", *SHORT)
    assert code == 0, err
    rows = out.split("\n\n")[1].splitlines()[1:]
    assert [row.split("  ")[0] for row in rows] == ["full bf16", "lossless", "full W4", "River 0.5"]
    assert "1.00 x" in rows[0] and "3 of 3" in rows[1] and "%" in rows[0]
    assert "Random weights" not in out


def test_prompts_of_files_and_random_ones(river_json, tmp_path):
    (tmp_path / "a").write_text("Question: Ana has 21 coins.\nAnswer:\n")
    tokens = river_json("bench", "--demo", *SHORT, "--file", tmp_path / "a")["prompt_tokens"]
    assert len(tokens) == 1
    assert river_json("bench", "--demo", *SHORT, "--prompt-tokens", "33")["prompt_tokens"] == [33]


def test_random_weights_in_the_shape_of_a_config(river_json, river, lone):
    fixed = "--thresholds=-2", "--min-layers", "2"
    document = river_json("bench", lone, *SHORT, *fixed)
    assert document["random_weights"] and document["prompt_tokens"] == [128]
    assert document["results"][-1]["exit_depth"] == 2 and document["results"][2]["exit_depth"] == 0
    assert all(len(run["tokens"]) == 6 for result in document["results"] for run in result["runs"])
    assert river_json("bench", lone.parent, *SHORT, "--dtype", "float32")["dtype"] == "float32"
    code, out, _ = river("bench", "--model", lone.parent, *SHORT)
    assert code == 0 and ", random weights\n" in out and "say nothing of a trained model" in out


def test_a_prompt_without_text_gets_random_ids(river_json, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(DEMO, directory)
    (directory / "tokenizer.json").unlink()
    document = river_json("bench", directory, *SHORT)
    assert document["prompt_tokens"] == [128] and not document["random_weights"]


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "required"),
        (["--demo", "--turns", "0"], "--turns=0"),
        (["--demo", "--new-tokens", "1"], "--new-tokens=1"),
        (["--demo", "--new-tokens", "99999"], "--new-tokens=99999"),
        (["--demo", "--prompt-tokens", "0"], "--prompt-tokens=0"),
        (["--demo", "--prompt-tokens", "99999"], "--prompt-tokens=99999"),
        (["--demo", "--thresholds", "x"], "--thresholds 'x'"),
        (["--demo", "--thresholds", "nan"], "nan"),
        (["--demo", "--min-layers", "17"], "min_layers=17"),
        (["--demo", "--min-layers", "0"], "min_layers=0"),
        (["--demo", "--river-head", "x"], "river_head='x'"),
        (["--demo", "--prompt-tokens", "9", "--file", "x"], "not allowed with"),
        (["--demo", "--prompt-tokens", "9", "--chat"], "--chat with --prompt-tokens"),
        (["--demo", "--file", "missing"], "missing"),
        (["--demo", "--chat"], "chat template"),
        (["missing"], "missing"),
        (["--demo", "--resident-layers", "2"], "unrecognized"),
    ],
)
def test_refusals(refused, arguments, named):
    assert named in refused("bench", *arguments)


def test_refusals_of_random_weights(refused, lone, tmp_path):
    (tmp_path / "text").write_text("hello")
    assert "--river belongs to the weights" in refused("bench", lone, "--river", tmp_path)
    assert refused("bench", lone, "--file", tmp_path / "text").startswith("--file with random weights")
    assert refused("bench", lone, "--chat").startswith("--chat with random weights")
    assert "--dtype" in refused("bench", lone, "--dtype", "int8")
    lone.write_text("{")
    assert "config.json" in refused("bench", lone)


def test_random_weights_that_no_memory_holds(refused, lone, monkeypatch):
    """It is said before any is drawn."""
    monkeypatch.setattr("river_ext.random_model.random_weights", lambda _: pytest.fail("weights are drawn"))
    size = {"hidden_size": 65536, "num_attention_heads": 256, "num_key_value_heads": 256, "head_dim": 256}
    lone.write_text(json.dumps({**TINY_CONFIG, **size, "num_hidden_layers": 999, "torch_dtype": "bfloat16"}))
    for arguments in ((), ("--dtype", "float32")):
        line = refused("bench", lone, *arguments)
        needed, there = map(float, re.findall(r"([\d.]+) GB", line))
        assert needed > 999 * 65536**2 * 4 * 2.5e-9 and needed > there > 0, line
