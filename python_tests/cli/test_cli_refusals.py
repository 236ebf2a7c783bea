"""One line for every bad input of the command `river`."""

import os

import pytest
import torch
from commands import SHORT, limited, subprocess_river
from conftest import write_tiny_checkpoint

from river_cli import shared
from river_ext.evaluation.measure import demo_items


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
        (["--mode", "full_w4"], "mode='full_w4'; accepted: no --mode"),
        (["hi", "--temperature", "-1"], "temperature=-1"),
        (["hi", "--temperature", "inf"], "temperature=inf"),
        (["hi", "--top-k", "-1"], "top_k=-1"),
        (["hi", "--top-p", "0"], "top_p=0"),
        (["hi", "--min-p", "1.5"], "min_p=1.5"),
        (["hi", "--min-p", "-0.1"], "min_p=-0.1"),
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
        (["generate", "hi"], "no model: 'hi' is no directory"),
        (["generate", "", "hi"], "no model: '' is no directory"),
        (["generate", "owner/name", "hi"], "hf download owner/name --local-dir name"),
        (["generate", "what is 1/2?"], "no model: 'what is 1/2?' is no directory"),
        (["generate", "/dev/null", "hi"], "no model: '/dev/null' is no directory"),
        (["generate", "\0", "hi"], "no model: "),
        (["generate", "."], "no prompt"),
        (["generate", ".", "hi"], "config.json"),
        (["generate", ".", "--model", ".", "--compare"], "config.json"),
        (["generate", "--file", "x"], "no model"),
        (["info", "."], "config.json"),
        (["info", ".", "more"], "unrecognized arguments: more"),
        (["info", ".", "--", "more"], "more (see river info --help)"),
        (["info", ".", "--demo"], "not allowed with"),
        (["info", ".", "--model", "x"], "not allowed with"),
        (["info", ""], "is empty"),
        (["convert", ".", "-o", "x"], "config.json"),
        (["eval", ".", "--demo"], "config.json"),
        (["eval", ".", "--model", ".", "--demo"], "not allowed with"),
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


@pytest.mark.parametrize(
    "arguments, meant",
    [
        (["genrate", "--demo"], "generate"),
        (["--versoin"], "--version"),
        (["generate", "--demo", "hi", "--temprature", "1"], "--temperature"),
        (["generate", "--demo", "--max_new_tokens=3", "hi"], "--max-new-tokens"),
        (["generate", "--demo", "hi", "--stopp=a b"], "--stop"),
        (["info", "--jsn"], "--json"),
        (["convert", "--modle", "x", "--output", "y"], "--model"),
        (["convert", "--demo", "--ouput", "y"], "--output"),
        (["eval", "--demo", "--threshold", "0.5"], "--thresholds"),
    ],
)
def test_the_name_that_was_meant(refused, arguments, meant):
    assert f"; did you mean {meant}?" in refused(*arguments)


def test_a_name_that_is_close_to_none(refused):
    commands = "generate, chat, serve, batch, info, convert, eval, calibrate, bench"
    assert refused("fly") == f"no command 'fly'; accepted: {commands}"
    assert refused("--", "info").startswith("no command '--'; accepted: ")
    assert refused("info", "--wxyz") == "unrecognized arguments: --wxyz (see river info --help)"
    assert "unrecognized arguments: -x" in refused("generate", "--demo", "hi", "--json", "-x")


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


HOSTILE = [
    "", " ", "-", "--", "-1", "0", "1e999", "nan", "-inf", "0x10", "1_0", "١", "9" * 400, "2147483648",
    "9223372036854775808", "depth:", "depth:-1", "depth:1e1", "\udcff", "\x1b[2J", "a\nb", "/", ".", "..",
    "/dev/null", "/dev/zero", "~", "*", "cuda:99999999999", "meta", "cpu:7", "float64", ",", "x" * 5000,
]  # fmt: skip
COMMANDS = {
    ("generate", "--demo", "def f", *SHORT): (
        "--model --river --device --dtype --threads --file --max-new-tokens --threshold --min-layers "
        "--prefill --mode --temperature --top-k --top-p --min-p --seed --stop --exit-control "
        "--river-head --kv-strategy"
    ),
    ("info",): "--model --river",
    ("info", "--demo"): "--river",
    ("convert",): "--model",
    ("convert", "--demo"): "--device --dtype --threads --group-size --calibrate",
    ("eval", "--demo", "--problems", "1", "--functions", "0", "--thresholds", "0.9"): (
        "--model --river --device --dtype --threads --problems --functions --thresholds --kv-strategy --seed"
    ),
    ("calibrate", "--demo", "--count", "1"): (
        "--prompts --count --max-new-tokens --thresholds --max-disagreement --min-speedup --guarantee "
        "--confidence --timed --min-layers --river-head --output"
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
    monkeypatch.setattr("river_ext.evaluation.measure.demo_items", lambda *a: demo_items(1, 0))
    monkeypatch.setattr("river_cli.evaluate.demo_items", lambda *a: demo_items(1, 0))
    monkeypatch.setattr("river_cli.convert.build_river", accepted)
    monkeypatch.setattr("river_cli.calibrate.calibrate", accepted)
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
