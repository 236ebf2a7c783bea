"""The command line with random arguments: exit code 0, or 2 and one line; a refusal writes nothing."""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from random import Random

from . import ACCEPTED, REFUSED, expect
from .samples import byte_tokenizer, random_text, write_checkpoint

NUMBERS = [
    "0",
    "1",
    "2",
    "3",
    "-1",
    "1e3",
    "nan",
    "inf",
    "-inf",
    "1e39",
    "1e400",
    "",
    " 1 ",
    "x",
    "9" * 5000,
    "0x10",
    "1_0",
]
OPTIONS = {
    "generate": {
        "--threshold": NUMBERS, "--min-layers": NUMBERS, "--temperature": NUMBERS, "--top-k": NUMBERS,
        "--top-p": NUMBERS, "--min-p": NUMBERS, "--seed": NUMBERS,
        "--prefill": ["full", "min", "last", "depth:1", "depth:", "depth:" + "9" * 5000, "", "x"],
        "--mode": ["river", "full", "full_w4", "", "x"], "--stop": ["a", "", "\udcff", "<|im_end|>"],
        "--dtype": ["auto", "float32", "bfloat16", "float64", ""],
        "--device": ["cpu", "auto", "cuda", "cuda:99", "meta", ""],
        "--exit-control": ["auto", "host", "device", "x"], "--river-head": ["model", "w4", "x"],
        "--compare": None, "--json": None, "--demo": None, "--river": ["RIVER", "MODEL", "nowhere", "",
        "/dev/zero"], "--file": ["PROMPT", "nowhere", "", ".", "/dev/null"],
    },
    "info": {
        "--river": ["RIVER", "MODEL", "nowhere", ""], "--json": None, "--dtype": ["float32"],
    },
    "convert": {
        "--calibrate": ["PROMPT", "MODEL", "nowhere", "", "/dev/zero"],
        "--group-size": ["64", "128", "32", "x", ""], "--force": None, "--json": None, "--dtype":
        ["float32", "bfloat16", "x"], "--output": ["NEW", "OLD", "FULL", "FILE", "", "/", ".", "/dev/null",
        "NEW/deep/er", "\u0000", "x" * 5000],
    },
    "eval": {
        "--thresholds": ["0.5", "", "x", "0.5,,1", "nan"], "--problems": ["1", "0", "-1", "x"], "--seed":
        NUMBERS, "--tasks": ["gsm8k", "humaneval", "", ",", "x" * 5000], "--data": ["nowhere", "PROMPT", ""],
        "--limit": NUMBERS, "--max-gen-toks": NUMBERS, "--chat": None,
    },
    "calibrate": {
        "--prompts": ["PROMPT", "MODEL", "nowhere", "", "/dev/zero"], "--count": ["1", "0", "x", "-1"],
        "--guarantee": ["5%", "0.05", "5", "x%", "nan", ""], "--confidence": ["95%", "1", "x"],
        "--min-speedup": NUMBERS, "--max-new-tokens": NUMBERS, "--timed": NUMBERS, "--output": ["NEW", "OLD",
        "FILE", "", "/", ".", "/dev/null", "NEW/deep", "\u0000", "x" * 5000],
    },
    "bench": {
        "--thresholds": ["0.5", "-2,inf", "", "0.5,,1", "nan"], "--min-layers": NUMBERS, "--json": None,
        "--prompt-tokens": NUMBERS, "--file": ["PROMPT", "nowhere", "/dev/null"], "--chat": None,
        "--dtype": ["auto", "float32", "x"], "--river": ["RIVER", "MODEL", "nowhere"],
    },
}  # fmt: skip
MODELS = ["MODEL"] * 6 + ["nowhere", "", "/dev/zero", "PROMPT", "RIVER", "\x00", "org/name"]


class State:
    def __init__(self, folder: Path):
        import river_ext

        self.folder = folder
        self.model = write_checkpoint(folder / "MODEL", byte_tokenizer())
        river_ext.load(self.model, device="cpu").save_river(folder / "RIVER")
        (folder / "PROMPT").write_bytes("\ufeffthe prompt\r\n".encode())
        self.outputs = folder / "outputs"


def prepare(folder: Path) -> State:
    return State(folder)


def attempt(state: State, random: Random) -> str:
    shutil.rmtree(state.outputs, ignore_errors=True)
    state.outputs.mkdir()
    shutil.copytree(state.folder / "RIVER", state.outputs / "OLD")
    (state.outputs / "FULL").mkdir()
    (state.outputs / "FULL" / "a file").write_text("of somebody's")
    (state.outputs / "FILE").write_text("of somebody's")
    before = contents(state.outputs)
    command = command_line(state, random)
    status, printed, said = call(command, random_text(random))
    what = f"{command}: "
    expect("Traceback" not in said and "Traceback" not in printed, what + "a traceback: " + said[-300:])
    expect(status in (0, 2), what + f"status {status}: {said[-300:]}")
    if status == 2:
        lines = said.splitlines()
        expect(len(lines) == 1 and lines[0].startswith("river: error: "), what + f"said {lines[-3:]}")
        expect(len(lines[0]) < 2000, what + f"a line of {len(lines[0])} characters")
        expect(contents(state.outputs) == before, what + "refused, but something was written")
        return REFUSED
    if "--json" in command and not {"--help", "--version"} & set(command):
        json.loads(printed)
    return ACCEPTED


def command_line(state: State, random: Random) -> list[str]:
    def named(value: str) -> str:
        first = value.split("/")[0]
        if first in ("MODEL", "RIVER", "PROMPT"):
            return str(state.folder / value)
        return str(state.outputs / value) if first in ("NEW", "OLD", "FULL", "FILE") else value

    command = random.choice(
        ["generate"] * 4 + ["info", "convert", "convert", "eval", "calibrate", "bench", "x", "--version", ""]
    )
    line = [command]
    options = dict(OPTIONS.get(command, {"--json": None, "--x": ["1"]}))
    if command in ("generate", "info", "convert", "bench") and random.random() < 0.95:
        line += random.choice([["--model"], []]) + [named(random.choice(MODELS))]
    if command == "eval":  # the bundled model takes its time: only what is refused before
        options = {name: v and [one for one in v if one not in ("0.5", "1")] for name, v in options.items()}
    if command == "convert":
        line += ["--output", named(random.choice(options.pop("--output")))]
    if command == "bench":
        line += ["--turns", random.choice(["1"] * 6 + NUMBERS[:6])]
        line += ["--new-tokens", random.choice(["2"] * 6 + NUMBERS)]
    if command == "generate":
        line += ["--max-new-tokens", random.choice(["2"] * 6 + NUMBERS)]
        line += [
            p for p in random.choice([["the"], ["the"], ["a", "b"], ["-"], [""], [], ["é" * 300], ["x"] * 9])
        ]
        options.pop("--demo")
    for name in random.sample(list(options), min(len(options), random.choice((0, 1, 1, 2, 3)))):
        values = options[name]
        line += [name] if values is None else [f"{name}={named(random.choice(values))}"]
    if command in ("eval", "calibrate"):
        line += ["--demo", "--thresholds=x"]
    odd = ["--help", "--", "--x", "-x", "-", "--json=1"]
    if random.random() < 0.05:
        line.insert(random.randrange(len(line) + 1), random.choice(odd))
    return line


def call(arguments: list[str], stdin: str) -> tuple[int, str, str]:
    """Status, standard output and standard error of `river`, in this process."""
    from river_cli import main

    files = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    kept = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()))
    folder = os.getcwd()
    try:
        with contextlib.redirect_stdout(files[0]), contextlib.redirect_stderr(files[1]):
            try:
                status = main(arguments)
            except SystemExit as error:  # of argparse, after --help or --version
                status = error.code or 0
    finally:
        sys.stdin = kept
        os.chdir(folder)
    for file in files:
        file.flush()
    return status, *(file.buffer.getvalue().decode() for file in files)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))
    }
