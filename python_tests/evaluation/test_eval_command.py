"""`river eval --tasks`: published tasks on the command line."""

import re
import sys

import pytest
from published_documents import BOOLQ, HUMANEVAL, write_gsm8k, write_lines

import river_ext.evaluation


def test_gsm8k(river, tmp_path):
    code, out, _ = river(
        "eval", "--demo", "--tasks", "gsm8k", "--data", write_gsm8k(tmp_path), "--limit", "2",
        "--max-gen-toks", "6", "--thresholds", "0.9"
    )  # fmt: skip
    assert code == 0
    assert "gsm8k: 2 documents" in out
    assert "5-shot, no chat template, max_gen_toks 6, greedy" in out
    table, depths = out.split("Exit depths")
    names = ["full bf16", "lossless", "full W4", "River 0.9"]
    for text in (table, depths):
        heads = [line.split("  ")[0] for line in text.splitlines()]
        assert [head for head in heads if head in names] == names
    for head in ("strict-match", "flexible-extract", "exit depth", "tokens/s"):
        assert head in table


def test_json_of_two_tasks(river_json, tmp_path):
    write_lines(write_gsm8k(tmp_path) / "humaneval" / "HumanEval.jsonl", [HUMANEVAL])
    document = river_json(
        "eval", "--demo", "--tasks", "gsm8k,humaneval", "--data", tmp_path, "--limit", "1", "--run-code",
        "--max-gen-toks", "5", "--thresholds", "-2",
    )  # fmt: skip
    gsm8k, humaneval = document["tasks"]
    assert (gsm8k["task"], gsm8k["shots"], gsm8k["documents"], gsm8k["chat"]) == ("gsm8k", 5, 1, False)
    assert (humaneval["task"], humaneval["shots"], humaneval["max_gen_toks"]) == ("humaneval", 0, 5)
    assert gsm8k["stop"][0] == "Question:" and humaneval["stop"][0] == "\nclass"
    full, lossless, w4, early = gsm8k["rows"]
    assert full["accuracy"].keys() == {"strict-match", "flexible-extract"}
    assert full["accuracy"]["strict-match"].keys() == {"count", "total", "value", "standard_error"}
    assert humaneval["rows"][0]["accuracy"].keys() == {"pass@1"}
    assert lossless["equal_sequences"]["value"] == 1 and w4["mean_exit_depth"] == 0
    assert early["tokens_by_depth"][16] == 1 and early["tokens_by_depth"][1] == early["new_tokens"] - 1


def test_a_task_of_the_harness(river, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    for split in ("train", "validation"):
        write_lines(tmp_path / "boolq" / f"{split}.jsonl", BOOLQ)
    options = ["--data", tmp_path, "--limit", "2", "--thresholds", "-2"]
    code, out, _ = river("eval", "--demo", "--tasks", "boolq", "--score-by-steps", *options)
    assert code == 0
    assert "boolq: 2 documents" in out and "token by token from the decoding path" in out
    (early,) = (line for line in out.splitlines() if line.startswith("River -2") and "%" in line)
    assert " 1.00" in early
    code, out, _ = river("eval", "--demo", "--tasks", "boolq", *options)
    assert code == 0 and "from the prefill" in out


@pytest.mark.parametrize("data", [["--data", "DATA"], []])
def test_an_unknown_task_is_refused_before_any_runs(refused, tmp_path, monkeypatch, data):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setattr("river_cli.shared.load", lambda _: pytest.fail("a model is loaded"))
    write_lines(write_gsm8k(tmp_path) / "boolq" / "validation.jsonl", BOOLQ)
    data = [tmp_path if word == "DATA" else word for word in data]
    assert "task 'nonsense'" in refused("eval", "--demo", "--tasks", "boolq, nonsense", *data)
    if data:
        line = refused("eval", "--demo", "--tasks", "gsm8k, hellaswag", *data)
        assert "no documents of hellaswag" in line


def test_without_the_harness(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "river_ext.evaluation.harness", raising=False)
    monkeypatch.delattr(river_ext.evaluation, "harness", raising=False)
    line = refused("eval", "--demo", "--tasks", "boolq", "--limit", "1")
    assert re.search("(lm_eval|datasets) is missing", line)  # which of them is asked for first
    assert "river_ext[eval]" in line and "gsm8k, humaneval" in line


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--tasks", "gsm8k"], "no model; accepted: its directory, or --demo"),
        (["--demo", "--tasks", ""], "--tasks: is empty"),
        (["--demo", "--tasks", ",,"], "--tasks ',,'"),
        (["--demo", "--data", "x"], "--data needs --tasks"),
        (["--demo", "--limit", "0"], "--limit needs --tasks"),
        (["--demo", "--run-code"], "--run-code needs --tasks"),
        (["--demo", "--tasks", "gsm8k", "--problems", "300"], "--problems with --tasks"),
        (["--demo", "--tasks", "gsm8k", "--functions", "9"], "--functions with --tasks"),
        (["--demo", "--tasks", "gsm8k", "--seed", "0"], "--seed with --tasks"),
        (["--demo", "--tasks", "gsm8k", "--data", "missing"], "missing: has no documents of gsm8k"),
        (["--demo", "--tasks", "gsm8k", "--data", "DATA", "--limit", "0"], "--limit=0"),
        (["--demo", "--tasks", "gsm8k", "--data", "DATA", "--max-gen-toks", "0"], "--max-gen-toks=0"),
        (["--demo", "--tasks", "gsm8k", "--data", "DATA", "--max-gen-toks", "512"], "max_gen_toks=512"),
        (["--demo", "--tasks", "gsm8k", "--data", "DATA", "--chat"], "has no chat template"),
        (["--demo", "--tasks", "humaneval", "--data", "DATA"], "--run-code"),
        (["--demo", "--tasks", "humaneval", "--run-code"], "with --data and --run-code, in a sandbox"),
        (["--demo", "--tasks", "gsm8k", "--data", "DATA", "--thresholds", "x"], "--thresholds 'x'"),
    ],
)
def test_refusals(refused, tmp_path, arguments, named):
    write_gsm8k(tmp_path)
    assert named in refused("eval", *(tmp_path if text == "DATA" else text for text in arguments))
