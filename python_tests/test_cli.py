"""The command `river`: what it prints where, its exit codes, and one line for every bad input."""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_checkpoint
from tiny_model import demo_model

import river_cli as cli
from river_cli import shared, terminal, threads
from river_ext import __version__
from river_ext.evaluate import demo_items
from river_ext.model import DEMO

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Question: Ana has 21 coins and buys 12 more at the fair. How many coins does Ana have?\nAnswer:"
SHORT = ["--max-new-tokens", "6"]


@pytest.fixture(autouse=True)
def one_demo_model(monkeypatch):
    """Commands that want the plain demo model share one."""
    load = shared.load

    def loaded(arguments):
        plain = (arguments.model, arguments.river, arguments.device, arguments.dtype)
        return demo_model() if plain == (None, None, "auto", "auto") else load(arguments)

    monkeypatch.setattr(shared, "load", loaded)


@pytest.fixture
def river(capsys):
    """Runs a command: (exit code, standard output, standard error)."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def river_json(river):
    """Runs a command with --json that succeeds: the document."""

    def run(*arguments):
        code, out, err = river(*arguments, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        return json.loads(out, parse_constant=pytest.fail)

    return run


@pytest.fixture
def refused(river):
    """Runs a command that fails: its one line, without the prefix."""

    def run(*arguments):
        code, out, err = river(*arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("river: error: ") and err.count("\n") == 1 and err.endswith("\n")
        return err.removeprefix("river: error: ").strip()

    return run


def subprocess_river(*arguments, environment=None, **options):
    """Runs the program itself; its outputs are bytes."""
    command = [sys.executable, "-m", "river_cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (environment or {})
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, env=environment, timeout=300, **streams)


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
        "temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 5, "stop": ["#"],
        "exit_control": "host",
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
    assert {"full bf16", "full W4", "River 0.5"} <= set(heads)
    assert "tokens/s" in out and "Exit depths of River 0.5, 12 tokens" in out and "batch 2" in out
    document = river_json("generate", "--demo", PROMPT, *SHORT, "--compare")
    assert [row["name"] for row in document["rows"]] == ["full bf16", "full W4", "River 0.5"]
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
    assert [row["name"] for row in document["rows"]] == ["full bf16", "full W4", "River 0.5"]
    assert document["rows"][2]["equal_tokens"]["total"] >= 36
    assert document["rows"][0]["accuracy"].keys() == {"problems", "functions"}


def test_prompts_of_files(river_json, tmp_path):
    (tmp_path / "prompt").write_text(PROMPT + "\n")
    document = river_json("generate", "--demo", "def f", "--file", tmp_path / "prompt", *SHORT)
    assert [output["prompt"] for output in document["outputs"]] == ["def f", PROMPT]


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


def test_info_of_a_model(river, river_json):
    document = river_json("info", "--demo")["model"]
    model = demo_model()
    assert document["fingerprint"] == model.fingerprint
    assert document["config"]["num_hidden_layers"] == 16
    packed = [tensor for layer in model.river for tensor in vars(layer).values()]
    assert document["bytes"]["river"] == sum(tensor.nbytes for tensor in packed)
    tensors = [t for layer in model.weights.layers for t in vars(layer).values() if t is not None]
    assert document["bytes"]["backbone"] == sum(tensor.nbytes for tensor in tensors)
    config = model.config
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert document["kv_bytes_per_token"] == per_token
    out = river("info", "--demo")[1]
    assert model.fingerprint in out and "padding  none" in out


def test_info_says_what_is_padded(river, tmp_path):
    directory = write_tiny_checkpoint(tmp_path / "model", intermediate_size=100)
    out = river("info", "--model", directory)[1]
    assert "gate_up_proj 8 rows" in out and "down_proj" in out and "28 columns" in out
    assert "no tokenizer.json" in out


# --- convert --------------------------------------------------------------------------------------------


def test_convert(river, river_json, refused, tmp_path):
    directory = write_tiny_checkpoint(tmp_path / "model")
    code, out, _ = river("convert", "--model", directory, "--output", tmp_path / "river")
    assert code == 0
    assert "3 exit layers" in out and " s\n" in out and "down_proj" in out
    use = shlex.split(out.splitlines()[-1])
    assert use == f"river generate --model {directory} --river {tmp_path / 'river'}".split() + ["a prompt"]
    assert "no tokenizer.json" in refused(*use[1:]), "all but the text is right"
    document = river_json("info", "--model", directory, "--river", tmp_path / "river")["model"]["river"]
    assert document["group_size"] == 64 and document["directory"] == str(tmp_path / "river")


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
    monkeypatch.setattr("river_ext.river.build_river", lambda *a, **k: pytest.fail("too late"))
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

    monkeypatch.setattr("river_ext.river.save_file", interrupted)
    code, _, err = river("convert", "--demo", "--output", tmp_path / "river")
    assert code == 130 and "interrupted" in err
    assert list(tmp_path.iterdir()) == []


# --- eval -----------------------------------------------------------------------------------------------


@pytest.fixture
def short_answers(monkeypatch):
    monkeypatch.setattr("river_ext.evaluate.DEMO_NEW_TOKENS", 6)


def test_eval(river, short_answers):
    code, out, _ = river("eval", "--demo", "--problems", "2", "--functions", "1", "--thresholds", "0.5,0.9")
    assert code == 0
    heads = [line.split("  ")[0] for line in out.splitlines()]
    names = ["full bf16", "full W4", "River 0.5", "River 0.9"]
    assert [head for head in heads if head in names] == names
    for expected in ("problems", "functions", "same output", "KL, nats", "exit depth", "tokens/s"):
        assert expected in out
    assert "2 problems, 1 functions" in out and "one prompt at a time" in out


def test_eval_json(river_json, short_answers):
    document = river_json("eval", "--demo", "--problems", "1", "--functions", "1")
    assert len(document["rows"]) == 7
    assert document["batch"] == 1 and document["problems"] == 1 and document["seconds"] > 0
    first, second = document["rows"][:2]
    assert first["kl"] == 0 and first["equal_sequences"]["value"] == 1
    assert second["options"] == {"mode": "full_w4"} and second["mean_exit_depth"] == 0


def test_eval_of_one_kind_and_of_another_model(river_json, short_answers, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(DEMO / name, tmp_path)
    document = river_json("eval", "--demo", "--model", tmp_path, "--problems", "0", "--functions", "2",
                          "--thresholds", "0.9")  # fmt: skip
    assert document["model"] == str(tmp_path)
    assert document["rows"][0]["accuracy"].keys() == {"functions"}


# --- bad input ------------------------------------------------------------------------------------------


def test_models_that_are_refused(refused, tmp_path):
    assert "missing: no such directory" in refused("generate", "--model", tmp_path / "missing", "hi")
    assert "config.json" in refused("info", "--model", tmp_path)
    directory = write_tiny_checkpoint(tmp_path / "pickle")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    for command in (["info"], ["convert", "--output", tmp_path / "river"], ["generate", "hi"]):
        assert "is a pickle" in refused(*command, "--model", directory)
    assert not (tmp_path / "river").exists()
    directory = write_tiny_checkpoint(tmp_path / "wordless")
    assert "no tokenizer.json" in refused("generate", "--model", directory, *SHORT, "hi")


def test_a_river_of_another_model(river, refused, tmp_path):
    directory = write_tiny_checkpoint(tmp_path / "model")
    assert river("convert", "--model", directory, "--output", tmp_path / "river")[0] == 0
    for command in (["generate", "hi"], ["info"], ["eval"]):
        assert "another checkpoint" in refused(*command, "--demo", "--river", tmp_path / "river")
    assert "no river.json" in refused("generate", "--demo", "--river", directory, "hi")
    assert "--river needs" in refused("info", "--river", tmp_path / "river")


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([""], "prompt is empty"),
        (["a", ""], "prompt is empty"),
        (list("abcdefghi"), "9 prompts"),
        (["\udcff"], "no UTF-8"),
        (["hi", "--threshold", "nan"], "threshold=nan"),
        (["hi", "--threshold", "x"], "--threshold: invalid float value: 'x'"),
        (["hi", "--min-layers", "17"], "min_layers=17"),
        (["hi", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["hi", "--max-new-tokens", "5000"], "from 1 to 511"),
        (["hi", "--prefill", "depth:17"], "prefill='depth:17'"),
        (["hi", "--prefill", "depth:" + 5000 * "9"], "prefill='depth:999"),
        (["hi", "--prefill", ""], "prefill=''"),
        (["hi", "--threads", "0"], "--threads: '0'; accepted: 1 to"),
        (["hi", "--threads", "1" + 5000 * "0"], "--threads: '1000"),
        (["hi", "--river", ""], "--river: is empty"),
        (["hi", "--file", ""], "--file: is empty"),
        (["hi", "--device", ""], "--device: is empty"),
        (["hi", "--dtype", ""], "--dtype: is empty"),
        (["hi", "--seed", 5000 * "9"], "invalid int value: '999"),
        (["hi", "--stop", "\udcff"], "no UTF-8"),
        (["hi", "--mode", "w4"], "mode='w4'"),
        (["hi", "--mode", "full", "--compare"], "mode='full'"),
        (["--mode", "full_w4"], "mode='full_w4'"),
        (["hi", "--temperature", "-1"], "temperature=-1"),
        (["hi", "--temperature", "inf"], "temperature=inf"),
        (["hi", "--top-k", "-1"], "top_k=-1"),
        (["hi", "--top-p", "0"], "top_p=0"),
        (["hi", "--seed", str(2**70)], "seed="),
        (["hi", "--stop", ""], "--stop"),
        (["hi", "--device", "tpu"], "device 'tpu'"),
        (["hi", "--dtype", "int8"], "dtype 'int8'"),
        (["hi", "--model", "x"], "not allowed with"),
        (["hi", "--max-new", "3"], "unrecognized arguments"),
    ],
)
def test_requests_that_are_refused(refused, arguments, named):
    assert named in refused("generate", "--demo", *arguments)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "required: COMMAND"),
        (["fly"], "'fly'"),
        (["generate"], "no prompt"),
        (["generate", "hi"], "no model"),
        (["generate", "--model", "", "hi"], "--model: is empty"),
        (["info", "--model", ""], "--model: is empty"),
        (["convert", "--model", "", "--output", "x"], "--model: is empty"),
        (["convert", "--demo", "--output", ""], "--output: is empty"),
        (["eval", "--demo", "--model", ""], "--model: is empty"),
        (["eval", "--demo", "--thresholds", ""], "--thresholds ''"),
        (["eval", "--demo", "--thresholds", 5000 * "x"], "--thresholds 'xxx"),
        (["convert", "--output", "x"], "--model --demo"),
        (["convert", "--demo"], "--output"),
        (["convert", "--demo", "--output", "x", "--group-size", "32"], "32"),
        (["eval"], "--demo"),
        (["eval", "--demo", "--thresholds", "0.5,,1"], "--thresholds '0.5,,1'"),
        (["eval", "--demo", "--thresholds", "nan"], "nan"),
        (["eval", "--demo", "--problems", "-1"], "--problems=-1"),
        (["eval", "--demo", "--problems", "0", "--functions", "0"], "--functions 0"),
        (["eval", "--demo", "--model", "missing"], "missing"),
    ],
)
def test_commands_that_are_refused(refused, arguments, named):
    assert named in refused(*arguments)


def test_files_that_cannot_be_read(refused, tmp_path):
    (tmp_path / "binary").write_bytes(b"ab\xff")
    assert refused("generate", "--demo", "--file", tmp_path / "no").endswith("no: No such file or directory")
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as large:
        large.truncate(1 << 40)
    for name in tmp_path, tmp_path / "pipe", "/dev/zero":
        assert f"{name}: no regular file" in refused("generate", "--demo", "--file", name)
    assert "large: more than 16 MiB" in refused("generate", "--demo", "--file", tmp_path / "large")
    with open("/dev/zero") as endless:
        done = subprocess_river("generate", "--demo", "-", stdin=endless, preexec_fn=limited(500))
    assert done.returncode == 2 and b"standard input: more than 16 MiB" in done.stderr
    assert "byte 2 is no UTF-8" in refused("generate", "--demo", "--file", tmp_path / "binary")


def test_bad_requests_are_refused_before_the_weights_are_read(refused, monkeypatch):
    monkeypatch.setattr(shared, "load", lambda arguments: pytest.fail("too late"))
    refused("generate", "--demo", "hi", "--top-p", "2")
    refused("eval", "--demo", "--thresholds", "x")


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


HOSTILE = [
    "", " ", "-", "--", "-1", "0", "1e999", "nan", "-inf", "0x10", "1_0", "١", "9" * 400, "2147483648",
    "9223372036854775808", "depth:", "depth:-1", "depth:1e1", "\udcff", "\x1b[2J", "a\nb", "/", ".", "..",
    "/dev/null", "/dev/zero", "~", "*", "cuda:99999999999", "meta", "cpu:7", "float64", ",", "x" * 5000,
]  # fmt: skip
COMMANDS = {
    ("generate", "--demo", "def f", *SHORT): (
        "--model --river --device --dtype --threads --file --max-new-tokens --threshold --min-layers "
        "--prefill --mode --temperature --top-k --top-p --seed --stop --exit-control"
    ),
    ("info",): "--model --river",
    ("info", "--demo"): "--river",
    ("convert",): "--model",
    ("convert", "--demo"): "--device --dtype --threads --group-size",
    ("eval", "--demo", "--problems", "1", "--functions", "0", "--thresholds", "0.9"): (
        "--model --river --device --dtype --threads --problems --functions --thresholds --seed"
    ),
}


class Accepted(Exception):
    """The work begins: the values were good."""


def accepted(*arguments, **options):
    raise Accepted


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_hostile_values_of_every_option(command, river, short_answers, monkeypatch, tmp_path):
    """A result or one line, whatever the value."""
    before = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    # nothing that the values leave to be done may take long
    monkeypatch.setattr("river_ext.evaluate.demo_items", lambda *a: demo_items(1, 0))
    monkeypatch.setattr("river_cli.evaluate.demo_items", lambda *a: demo_items(1, 0))
    monkeypatch.setattr("river_cli.convert.build_river", accepted)
    required = ["--output", "new"] if command[0] == "convert" else []
    refused = 0
    for option in COMMANDS[command].split():
        for value in HOSTILE:
            try:
                code, out, err = river(*command, *required, f"{option}={value}")
            except Accepted:
                continue
            assert code in (0, 2), (option, value)
            if code == 2:
                refused += 1
                assert out == "" and err.startswith("river: error: ") and err.count("\n") == 1, (
                    option,
                    value,
                )
                assert len(err) < 700 and err[:-1].isprintable(), (option, value)
    torch.set_num_threads(before)
    assert refused > len(HOSTILE) // 2
    assert list(tmp_path.iterdir()) == []


# --- the program ----------------------------------------------------------------------------------------


LIGHT = """
import sys, river_cli
code = river_cli.main(sys.argv[1:])
heavy = {"torch", "numpy", "rich", "river_ext"} & sys.modules.keys()
sys.exit(f"{heavy} imported" if heavy else code)
"""


@pytest.mark.parametrize(
    "arguments, code, expected",
    [
        (["--help"], 0, "generate"),
        (["--version"], 0, f"river {__version__}"),
        (["generate", "--help"], 0, "--file FILE"),
        (["info", "--help"], 0, "--river DIR"),
        (["convert", "--help"], 0, "--output DIR"),
        (["eval", "--help"], 0, "--problems N"),
        (["fly"], 2, "'fly'"),
        (["generate", "--demo", "--seed", "x"], 2, "'x'"),
        (["generate", "--demo", ""], 2, "prompt is empty"),
        (["generate", "--demo", "--file", "/dev/zero"], 2, "no regular file"),
    ],
)
def test_torch_is_not_loaded_for_help_and_errors(arguments, code, expected):
    command = [sys.executable, "-c", LIGHT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert expected in done.stdout + done.stderr


def test_errors_of_the_program():
    done = subprocess_river("generate", "--demo", "--json", "--threshold", "nan", "hi")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"river: error: threshold=nan; accepted: a number, not NaN\n"


def test_a_reader_that_stops_reading():
    """Also of what argparse prints, which drops such errors."""
    for arguments in (["info"], ["--help"]):
        read, write = os.pipe()
        os.close(read)
        done = subprocess_river(*arguments, stdout=write)
        os.close(write)
        assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("arguments", (["info"], ["--help"], ["generate", "--demo", "hi", *SHORT]))
def test_a_full_standard_output(arguments):
    with open("/dev/full", "w") as full:
        done = subprocess_river(*arguments, stdout=full)
    assert done.returncode == 2
    *notes, line = done.stderr.decode().splitlines()
    assert line == "river: error: standard output: No space left on device"
    assert "Traceback" not in done.stderr.decode()


def closing(*descriptors: int):
    """For subprocess: what a shell does with >&- and <&-."""

    def close():
        for descriptor in descriptors:
            os.close(descriptor)

    return close


def test_closed_streams():
    done = subprocess_river("--help", preexec_fn=closing(1))
    assert (done.returncode, done.stderr) == (2, b"river: error: standard output is closed\n")
    done = subprocess_river("generate", "--demo", "-", preexec_fn=closing(0))
    assert (done.returncode, done.stdout) == (2, b"") and b"standard input is closed" in done.stderr
    done = subprocess_river("generate", "--demo", "def f", *SHORT, preexec_fn=closing(0, 2))
    assert done.returncode == 0, "notes that nobody can read are no error"
    assert done.stdout.decode() == demo_model().generate("def f", max_new_tokens=6).text + "\n"
    done = subprocess_river("generate", "--demo", "", preexec_fn=closing(0, 1, 2))
    assert done.returncode == 2


def test_an_interrupt_while_torch_is_loaded(tmp_path):
    """Whatever a module makes of a KeyboardInterrupt, there is no traceback."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('loading', flush=True)\n"
        "try:\n    time.sleep(60)\n"
        "except BaseException as error:\n    raise ImportError('torch') from error\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "river_cli", "info"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, env=environment) as process:
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"\nriver: interrupted\n")


READY = "import sys, river_cli; print('ready', file=sys.stderr, flush=True); river_cli.program()"


@pytest.mark.parametrize("seconds", [0.1, 0.4, 0.8, 1.6, 3])
def test_an_interrupt_at_any_time(seconds):
    command = [sys.executable, "-c", READY, "eval", "--demo"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, cwd=ROOT) as process:
        assert process.stderr.readline() == b"ready\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"\nriver: interrupted\n")


def limited(megabytes: int):
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))


def test_too_little_memory_to_load_the_library(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemError('error return without exception set')")
    strange = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}  # what else such an import may say
    for options in {"preexec_fn": limited(150)}, {"environment": strange}:
        done = subprocess_river("info", **options)
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.startswith(b"river: error: river_ext cannot be loaded: ")
        assert done.stderr.count(b"\n") == 1


SMALL_MACHINE = """
import sys, resource, river_ext
model = river_ext.load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
try:
    model.generate([1, 2], max_new_tokens=9_000_000)
except river_ext.RiverError as error:
    print(error)
"""


def test_too_little_memory_for_the_cache(tmp_path):
    """Of 7 GB, for a tiny model with very many positions."""
    directory = write_tiny_checkpoint(tmp_path / "model", max_position_embeddings=10**7)
    command = [sys.executable, "-c", SMALL_MACHINE, str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("not enough memory for a KV cache of 1 x 9000001 positions (")
    assert done.stdout.count("\n") == 1 and done.stderr == ""


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate memory: you tried to"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(ALLOCATOR), RuntimeError("std::bad_alloc")])
def test_memory_that_fails_anywhere_is_one_line(refused, monkeypatch, error):
    def failing(arguments):
        raise error

    monkeypatch.setattr(shared, "load", failing)
    assert refused("generate", "--demo", "hi").startswith("not enough memory")
