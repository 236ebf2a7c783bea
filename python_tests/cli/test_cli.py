"""The command `river`: what it prints where, and its exit codes."""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from commands import PROMPT, ROOT, SHORT, subprocess_river
from conftest import write_tiny_checkpoint
from tiny_model import demo_model

import river_cli as cli
from river_cli import shared, terminal, threads
from river_cli.arguments import parse
from river_ext import __version__, ops
from river_ext.calibration.unfinished import UnfinishedRiver
from river_ext.demo_tasks.generator import train_item
from river_ext.loading.families import FAMILIES, MULTIMODAL
from river_ext.model import DEMO

# --- generate -------------------------------------------------------------------------------------------


def test_generate_prints_the_text_alone(river):
    code, out, err = river("generate", "--demo", PROMPT, *SHORT)
    assert code == 0
    assert out == demo_model().generate(PROMPT, max_new_tokens=6).text + "\n"
    assert "6 new tokens, mean exit depth" in err


def test_generate_several(river):
    code, out, _ = river("generate", "--demo", PROMPT, "def f", *SHORT)
    texts = [output.text for output in demo_model().generate([PROMPT, "def f"], max_new_tokens=6)]
    assert code == 0
    assert out.startswith("--- 1: Question: Ana has 21 coins") and "\n--- 2: def f\n" in out
    assert all(text in out for text in texts)


def test_generate_streams_to_a_terminal(river, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, out, _ = river("generate", "--demo", PROMPT)
    assert code == 0
    assert out == demo_model().generate(PROMPT).text + "\n"


def test_options_reach_the_model(river_json):
    options = {
        "max_new_tokens": 9, "threshold": 0.9, "min_layers": 3, "prefill": "last", "mode": "river",
        "temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "seed": 5,
        "stop": ["#"], "exit_control": "host", "river_head": "w4",
    }  # fmt: skip
    flags = [
        part
        for name, value in options.items()
        for part in ("--" + name.replace("_", "-"), value[0] if isinstance(value, list) else str(value))
    ]
    document = river_json("generate", "--demo", PROMPT, *flags)
    expected = demo_model().generate(PROMPT, **options)
    assert document["options"] == options
    assert document["outputs"][0]["tokens"] == expected.tokens


def test_kv_strategy(river, river_json, refused, short_answers):
    document = river_json("generate", "--demo", PROMPT, *SHORT, "--kv-strategy", "mask", "--compare")
    expected = demo_model().generate(PROMPT, max_new_tokens=6, kv_strategy="mask")
    assert document["outputs"][0]["tokens"] == expected.tokens
    assert [row["name"] for row in document["rows"]] == ["full bf16", "lossless", "full W4", "mask 0.5"]
    one_problem = "eval", "--demo", "--problems", "1", "--functions", "0", "--thresholds", "0.9"
    row = river_json(*one_problem, "--kv-strategy", "propagate")["rows"][-1]
    assert row["name"] == "propagate 0.9" and row["options"]["kv_strategy"] == "propagate" and row["kl"] > 0
    refusal = refused(*one_problem, "--kv-strategy", "drop")
    assert refusal.startswith("kv_strategy='drop'; accepted: 'share', 'mask', 'recompute'")


def test_generate_json(river_json):
    document = river_json("generate", "--demo", PROMPT, "def f", *SHORT)
    assert document["version"] == __version__ and document["dtype"] == "bfloat16"
    assert document["fingerprint"] == demo_model().fingerprint
    output = document["outputs"][0]
    expected = demo_model().generate([PROMPT, "def f"], max_new_tokens=6)[0]
    for name in ("text", "tokens", "exit_depths", "similarities", "finish_reason"):
        assert output[name] == getattr(expected, name)
    assert output["prompt"] == PROMPT
    assert output["stats"]["new_tokens"] == 6


def test_infinity_is_valid_json(river_json):
    document = river_json("generate", "--demo", PROMPT, *SHORT, "--threshold", "inf")
    assert document["options"]["threshold"] == "inf"
    assert set(document["outputs"][0]["exit_depths"]) == {16}


def test_generate_compare(river, river_json):
    code, out, _ = river("generate", "--demo", PROMPT, "def f", *SHORT, "--compare")
    assert code == 0
    heads = [line.split("  ")[0] for line in out.splitlines()]
    assert {"full bf16", "lossless", "full W4", "River 0.5"} <= set(heads)
    assert "tokens/s" in out and "Exit depths of River 0.5, 12 tokens" in out and "batch 2" in out
    document = river_json("generate", "--demo", PROMPT, *SHORT, "--compare")
    assert [row["name"] for row in document["rows"]] == ["full bf16", "lossless", "full W4", "River 0.5"]
    assert document["outputs"][0]["tokens"] == demo_model().generate(PROMPT, max_new_tokens=6).tokens


def test_the_demo(river):
    code, out, _ = river("generate", "--demo", *SHORT)
    assert code == 0
    assert out.count("Question:") == 4 and out.count("def ") >= 2
    assert out.count("  right") + out.count("  wrong") == 6
    for expected in ("the bundled demo model", "tokens/s", "exit depth", "full W4", "█", "by the prefill"):
        assert expected in out
    assert "36 tokens are what full depth has at the same place" in " ".join(out.split())
    assert river("generate", "--demo", *SHORT, "--seed", "1")[1].split("\n")[3] != out.split("\n")[3]


def test_the_demo_json(river_json):
    document = river_json("generate", "--demo", *SHORT)
    assert len(document["outputs"]) == 6
    assert [row["name"] for row in document["rows"]] == ["full bf16", "lossless", "full W4", "River 0.5"]
    assert document["rows"][3]["equal_tokens"]["total"] >= 36
    assert document["rows"][0]["accuracy"].keys() == {"problems", "functions"}


def test_prompts_of_files(river_json, tmp_path):
    (tmp_path / "prompt").write_text(PROMPT + "\n")
    document = river_json("generate", "--demo", "def f", "--file", tmp_path / "prompt", *SHORT)
    assert [output["prompt"] for output in document["outputs"]] == ["def f", PROMPT]


def copy_of_the_demo(directory):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(DEMO / name, directory)
    return directory


def test_the_directory_of_the_model_comes_before_the_prompts(river_json, tmp_path, monkeypatch):
    """By its place alone: with --demo or --model, the name of a directory is a prompt like any other."""
    monkeypatch.chdir(copy_of_the_demo(tmp_path))
    (tmp_path / "def f").mkdir()
    for line, model, prompts in (
        ([".", "def f"], ".", ["def f"]),
        ([".", "."], ".", ["."]),
        (["--demo", ".", "def f"], DEMO, [".", "def f"]),
        (["--model", ".", "def f"], ".", ["def f"]),
        ([".", "--threshold", "2", "a", "--seed", "1", "def f"], ".", ["a", "def f"]),
        (["--seed", "1", ".", "- a"], ".", ["- a"]),
    ):
        document = river_json("generate", "--max-new-tokens", "1", *line)
        assert document["model"] == str(model) and [o["prompt"] for o in document["outputs"]] == prompts
    (tmp_path / "text").write_text("def f")
    dashed = parse(["generate", ".", "a", "--seed", "1", "--", "--json", "-1"])
    assert (dashed.model, dashed.prompts, dashed.json) == (".", ["a", "--json", "-1"], False)
    document = river_json("generate", ".", "--file", "text", "--max-new-tokens", "1")
    assert [output["prompt"] for output in document["outputs"]] == ["def f"]


def test_files_of_windows_give_the_same_prompt(river_json, tmp_path):
    """But only one byte order mark is one, and "\\r" alone is text."""
    (tmp_path / "crlf").write_bytes(b"\xef\xbb\xbf" + PROMPT.replace("\n", "\r\n").encode() + b"\r\n")
    (tmp_path / "odd").write_bytes("\ufeff\ufeffdef\rf\n\n".encode())
    document = river_json(
        "generate", "--demo", "--file", tmp_path / "crlf", "--file", tmp_path / "odd", PROMPT, *SHORT
    )
    plain, crlf, odd = document["outputs"]
    assert crlf["prompt"] == PROMPT and crlf["tokens"] == plain["tokens"]
    assert odd["prompt"] == "\ufeffdef\rf\n"


def test_text_streams_into_a_pipe():
    """Each piece as soon as it is certain, and nothing but the text."""
    command = [sys.executable, "-m", "river_cli", "generate", "--demo", PROMPT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        pieces = []
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            pieces.append(piece)
    assert len(pieces) > 3
    assert b"".join(pieces).decode() == demo_model().generate(PROMPT).text + "\n"


def test_a_prompt_from_standard_input():
    """And plain text when not on a terminal: no escape sequences, nothing that the encoding lacks."""
    command = ["generate", "--demo", "-", "--compare", *SHORT]
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    done = subprocess_river(*command, input=PROMPT.encode() + b"\n", environment=ascii_only)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(demo_model().generate(PROMPT, max_new_tokens=6).text.encode())
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"#####" in done.stdout


def test_a_terminal_is_not_steered(monkeypatch):
    assert terminal.printable("a\x1b[2Jb") == "a\x1b[2Jb"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert terminal.printable("a\x1b[2Jb\n\té\u200d") == "a\ufffd[2Jb\n\té\u200d"


# --- info -----------------------------------------------------------------------------------------------


def test_info(river, river_json):
    code, out, _ = river("info")
    assert code == 0
    assert __version__ in out and torch.__version__ in out
    document = river_json("info")
    assert document["version"] == __version__ and document["torch"] == torch.__version__
    assert document["build"]["cpu_isa"] and "model" not in document
    assert document["model_types"] == [*FAMILIES, *MULTIMODAL] and document["max_prompts"] == ops.MAX_ROWS
    assert "llama, mistral, qwen2" in out and "up to 8 at a time" in out


def test_info_of_a_model(river, river_json):
    document = river_json("info", "--demo")["model"]
    model = demo_model()
    assert document["fingerprint"] == model.fingerprint
    assert document["config"]["num_hidden_layers"] == 16
    packed = [tensor for layer in model.river for tensor in vars(layer).values()]
    assert document["bytes"]["river"] == sum(tensor.nbytes for tensor in packed)
    assert document["bytes"]["river_head"] == model.river.lm_head.nbytes
    tensors = [t for layer in model.weights.layers for t in vars(layer).values() if t is not None]
    assert document["bytes"]["backbone"] == sum(tensor.nbytes for tensor in tensors)
    config = model.config
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert document["kv_bytes_per_token"] == per_token
    out = river("info", "--demo")[1]
    assert model.fingerprint in out and "padding  none" in out
    assert river_json("info", DEMO)["model"] == document


def test_info_says_what_is_padded(river, tmp_path):
    directory = write_tiny_checkpoint(tmp_path / "model", intermediate_size=100)
    out = river("info", "--model", directory)[1]
    assert "gate_up_proj 8 rows" in out and "down_proj" in out and "28 columns" in out
    assert "no tokenizer.json" in out


def test_info_names_the_chat_templates(river, river_json, tmp_path):
    directory = write_tiny_checkpoint(tmp_path / "model")
    assert river_json("info", directory)["model"]["chat_templates"] == []
    assert "chat template    none" in river("info", directory)[1]
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    assert river_json("info", directory)["model"]["chat_templates"] == ["default", "rag"]
    assert "chat template    default, rag\n" in river("info", directory)[1]


# --- convert --------------------------------------------------------------------------------------------


def test_convert(river, river_json, refused, tmp_path):
    directory = write_tiny_checkpoint(tmp_path / "model")
    code, out, _ = river("convert", directory, "-o", tmp_path / "river")
    assert code == 0
    assert "3 exit layers and a head" in out and "lm_head" in out and " s\n" in out and "down_proj" in out
    use = shlex.split(out.splitlines()[-1])
    assert use == f"river generate --model {directory} --river {tmp_path / 'river'}".split() + ["a prompt"]
    assert "no tokenizer.json" in refused(*use[1:]), "all but the text is right"
    document = river_json("info", "--model", directory, "--river", tmp_path / "river")["model"]["river"]
    assert document["group_size"] == 64 and document["directory"] == str(tmp_path / "river")
    assert document["lm_head"] is True
    out = river("info", "--model", directory, "--river", tmp_path / "river")[1]
    assert "groups of 64, with a head" in out


def test_convert_json_force_and_use(river_json, refused, tmp_path):
    output = tmp_path / "river"
    convert = ["convert", "--demo", "--output", output]
    first = river_json(*convert)
    assert first["bytes"] == sum(file.stat().st_size for file in output.iterdir())
    assert first["group_size"] == 64 and first["seconds"] > 0
    assert all(0 < error < 0.05 for error in first["relative_squared_error"].values())
    generated = river_json("generate", "--demo", "--river", output, PROMPT, *SHORT)["outputs"][0]
    assert generated["tokens"] == demo_model().generate(PROMPT, max_new_tokens=6).tokens

    assert f"{output}: exists" in refused(*convert, "--group-size", "128")
    assert json.loads((output / "river.json").read_text())["group_size"] == 64, "it is untouched"
    assert river_json(*convert, "--force", "--group-size", "128")["group_size"] == 128
    assert json.loads((output / "river.json").read_text())["group_size"] == 128
    assert [path.name for path in tmp_path.iterdir()] == ["river"]


def test_outputs_that_are_refused_before_the_work(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("river_ext.quant.exit_river.build_river", lambda *a, **k: pytest.fail("too late"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    for name in ("file", "folder"):
        assert "exists" in refused("convert", "--demo", "--output", tmp_path / name)
    line = refused("convert", "--demo", "--output", tmp_path / "file" / "river")
    assert "file is no directory" in line
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_force_replaces_rivers_alone(refused, tmp_path):
    assert "/: exists and is not a saved river" in refused("convert", "--demo", "--output", "/", "--force")
    (tmp_path / "mine").write_text("mine")
    assert "is not a saved river" in refused("convert", "--demo", "--output", tmp_path, "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_interrupted_convert_leaves_nothing(river, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("river_ext.quant.river_store.save_file", interrupted)
    code, _, err = river("convert", "--demo", "--output", tmp_path / "river")
    assert code == 130 and "interrupted" in err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def texts(tmp_path):
    """A file of texts for --calibrate, of the demo's tasks."""
    draw = random.Random(0)
    items = [train_item(draw) for _ in range(20)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": item.prompt + item.completion}) + "\n" for item in items))
    return path


def test_convert_with_calibration(river, river_json, texts, tmp_path):
    output = tmp_path / "river"
    code, out, _ = river("convert", "--demo", "--output", output, "--calibrate", texts)
    assert code == 0
    facts = json.loads((output / "river.json").read_text())
    assert facts["quantiser"] == "gptq"
    found = facts["calibration"]
    assert f"calibrated on {found['tokens']} tokens of 18 texts; on {found['held_out_tokens']} tokens" in out
    assert f"{found['agreement_before']:.1%} before, {found['agreement']:.1%} now" in out
    assert f"{found['kl_before']:.4f} before, {found['kl']:.4f} now" in out
    assert found["kl"] < found["kl_before"]
    assert river_json("info", "--demo", "--river", output)["model"]["river"]["calibration"] == found
    assert f"{found['agreement']:.1%}" in river("info", "--demo", "--river", output)[1]
    again = river_json("convert", "--demo", "--output", output, "--calibrate", texts, "--force")
    assert again["calibration"] == found, "it is the same every time"
    assert json.loads((output / "river.json").read_text())["sha256"] == facts["sha256"]


def test_an_interrupted_calibration_goes_on(river, river_json, texts, tmp_path, monkeypatch):
    """A Ctrl-C in the third layer leaves two, and no river; the next time they are there."""
    output, saved = tmp_path / "river", []
    convert = ["convert", "--demo", "--output", output, "--calibrate", texts]
    real = UnfinishedRiver.save

    def save(self, index, layer):
        if saved == [0, 1]:
            raise KeyboardInterrupt
        saved.append(index)
        real(self, index, layer)

    monkeypatch.setattr(UnfinishedRiver, "save", save)
    code, _, err = river(*convert)
    assert code == 130 and "interrupted" in err
    assert [file.name for file in output.iterdir()] == [".calibration"]
    assert len(list((output / ".calibration").iterdir())) == 2
    assert "no river.json in it" in river("generate", "--demo", "--river", output, "hi")[2]
    saved.clear()
    assert river_json(*convert)["calibration"]["texts"] == 18
    assert saved == list(range(2, 16))
    assert len(list(output.iterdir())) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no text in it"),
        (b"\xff\xfe", "byte 0 is no UTF-8"),
        (b'{"text": "short"}\n', "tokens in those to calibrate on; accepted: at least 8 texts"),
        (b'{"content": "a text"}\n', 'line 1 has no field "text"'),
        (b"a text", "line 1 is not valid JSON"),
    ],
)
def test_refused_calibration_texts(refused, tmp_path, content, message):
    texts = tmp_path / "texts.jsonl"
    texts.write_bytes(content)
    line = refused("convert", "--demo", "--output", tmp_path / "river", "--calibrate", texts)
    assert f"{texts}: " in line and message in line
    assert list(tmp_path.iterdir()) == [texts]


# --- eval -----------------------------------------------------------------------------------------------


def test_eval(river, short_answers):
    code, out, _ = river("eval", "--demo", "--problems", "2", "--functions", "1", "--thresholds", "0.5,0.9")
    assert code == 0
    heads = [line.split("  ")[0] for line in out.splitlines()]
    names = ["full bf16", "lossless", "full W4", "River 0.5", "River 0.9"]
    assert [head for head in heads if head in names] == names
    for expected in ("problems", "functions", "same output", "KL, nats", "exit depth", "tokens/s"):
        assert expected in out
    assert "2 problems, 1 functions" in out and "one prompt at a time" in out


def test_eval_json(river_json, short_answers):
    document = river_json("eval", "--demo", "--problems", "1", "--functions", "1")
    assert len(document["rows"]) == 8
    assert document["batch"] == 1 and document["problems"] == 1 and document["seconds"] > 0
    first, second, third = document["rows"][:3]
    for row in (first, second):
        assert row["kl"] == 0 and row["equal_sequences"]["value"] == 1
    assert third["options"] == {"mode": "full_w4"} and third["mean_exit_depth"] == 0


def test_eval_of_one_kind_and_of_another_model(river_json, short_answers, tmp_path):
    document = river_json("eval", "--demo", copy_of_the_demo(tmp_path), "--problems", "0", "--functions", "2",
                          "--thresholds", "0.9")  # fmt: skip
    assert document["model"] == str(tmp_path)
    assert document["rows"][0]["accuracy"].keys() == {"functions"}


# --- threads, interrupts, bugs ------------------------------------------------------------------------


def test_threads(river_json):
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    try:
        for count in {1, cores}:
            document = river_json("generate", "--demo", "hi", *SHORT, "--threads", str(count))
            assert document["threads"] == count
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("load, count, said", [(1.4, 2, False), (1.6, 2, True), (9.0, 1, False)])
def test_a_busy_machine_is_said(river, monkeypatch, load, count, said):
    monkeypatch.setattr(os, "getloadavg", lambda: (load * len(os.sched_getaffinity(0)), 0.0, 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    code, _, err = river("generate", "--demo", "hi", *SHORT)
    assert code == 0 and ("--threads 1 may be faster" in err) is said


def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch):
    for name in "OMP_WAIT_POLICY", "GOMP_SPINCOUNT":
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["info"]) == 0
    assert os.environ.pop("GOMP_SPINCOUNT") == threads.SPIN_COUNT
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert cli.main(["info"]) == 0
    assert "GOMP_SPINCOUNT" not in os.environ


def test_interrupt(river, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(shared, "load", interrupted)
    code, out, err = river("generate", "--demo", "hi")
    assert (code, out) == (130, "") and "interrupted" in err


def test_bugs_keep_their_traceback(monkeypatch):
    for bug in (KeyError("bug"), OSError("no file is named")):

        def broken(arguments, bug=bug):
            raise bug

        monkeypatch.setattr(shared, "load", broken)
        with pytest.raises(type(bug)):
            cli.main(["generate", "--demo", "hi"])


@pytest.mark.parametrize("module", ["river_cli", "river_ext.cli"])
def test_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"river {__version__}\n")


def test_what_is_said_of_lossless_decoding(river):
    code, out, err = river("generate", "--demo", PROMPT, *SHORT, "--mode", "lossless", "--draft-tokens", "3")
    assert code == 0
    said = r"6 new tokens, \d\.\d\d per backbone pass, \d+% of the drafts were right; "
    assert re.match(said + "--compare in place of --mode shows", err)
    assert "; --compare shows" in river("generate", "--demo", PROMPT, *SHORT)[2]
    full = river("generate", "--demo", PROMPT, *SHORT, "--mode", "full")
    assert full[1] == out and "mean exit depth 16.00 of 16 layers" in full[2]
