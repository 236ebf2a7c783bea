"""JSON lines: prompts in one file, answers in another, which holds the beginning of all answers at any time.

A line of the first is an object with `prompt` (text or token ids) or `messages` (of a chat). It may have
`options`, those of `Model.generate` that are its own, and any other fields, which its answer repeats. Blank
lines are nobody's. Line n of the second file answers the n-th of the others, whoever computed it:

    the fields of the prompt's line, "run": RUN, "output": {...}, or "error": "..." in place of the output

RUN names all that the answers depend on, so that a file is not gone on with by other means.
"""

import fcntl
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..checks import short
from ..engine.prompt import is_chat
from ..errors import RiverError
from ..loading.files import is_regular, open_regular
from ..loading.json_object import same

PROMPTS = ("prompt", "messages")
ANSWERS = ("run", "output", "error")  # fields of an answer, beside those of its prompt's line


class Line(NamedTuple):
    number: int  # in its file, from 1 on
    fields: dict


def read_lines(path: str | Path) -> list[Line]:
    """All prompts of a file; RiverError names the first line that is none."""
    lines = []
    with open_regular(path) as file:
        for number, data in enumerate(file, start=1):
            if data.strip():
                fields = _object(f"{path}: line {number}", data.removeprefix(b"\xef\xbb\xbf"))
                _check_fields(f"{path}: line {number}", fields)
                lines.append(Line(number, fields))
    if not lines:
        raise RiverError(f'{path}: no line in it; accepted: lines such as {{"prompt": "..."}}')
    return lines


def prompt_of(fields: dict) -> str | list:
    return fields[next(name for name in PROMPTS if name in fields)]


def _object(where: str, data: bytes) -> dict:
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise RiverError(f"{where} is not valid JSON ({str(error)[:160]})") from None
    if not isinstance(value, dict):
        raise RiverError(f'{where} is {short(value)}; accepted: an object such as {{"prompt": "..."}}')
    return value


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number there")


def _finite(digits: str) -> float:
    """JSON that is written again has no word for what Python makes of 1e999."""
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{short(digits)} is too large a number")
    return value


def _check_fields(where: str, fields: dict) -> None:
    given = [name for name in PROMPTS if name in fields]
    if len(given) != 1:
        found = " and ".join(given) or "neither"
        raise RiverError(f"{where} has {found}; accepted: one of {' and '.join(PROMPTS)}")
    prompt, (name,) = prompt_of(fields), given
    ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if name == "prompt" and not isinstance(prompt, str) and not ids:
        raise RiverError(f"{where}: prompt is {short(prompt)}; accepted: text, or a list of token ids")
    if name == "messages" and not is_chat(prompt):
        raise RiverError(f"{where}: messages is {short(prompt)}; accepted: a list of objects")
    if not isinstance(fields.get("options", {}), dict):
        raise RiverError(f"{where}: options is {short(fields['options'])}; accepted: an object")
    if taken := [name for name in ANSWERS if name in fields]:
        raise RiverError(f"{where} has the field {taken[0]}, which its answer has; accepted: another name")


class Answers:
    """The file of answers, open to append to it. Nobody else writes to it meanwhile."""

    def __init__(self, path: str | Path, prompts: str | Path, lines: Sequence[Line], run: str, how: str):
        """how: "new": no answers are there yet; "resume": there may be some; "replace": the first one that
        is appended takes their place."""
        self.path, self.lines, self.run = Path(path), lines, run
        self.errors: list[int] = []  # numbers of the lines that have one
        self._replaces = how == "replace"
        if os.path.exists(path) and os.path.samefile(path, prompts):
            raise RiverError(f"{path}: holds the prompts; accepted: another file for the answers")
        is_regular(path)  # or refused: to open a FIFO would wait for its reader
        self._file = open(path, "a+b")  # noqa: SIM115 (it stays open)
        try:
            self._lock()
            self.resumed = self.done = self._begin(how, prompts)
        except BaseException:
            self._file.close()
            raise

    def append(self, answers: Sequence[dict]) -> None:
        """Of the next lines, each {"output": ...} or {"error": ...}. The file has them when this returns."""
        whole = []
        for answer in answers:
            line = self.lines[self.done + len(whole)]
            if "error" in answer:
                self.errors.append(line.number)
            whole.append(json.dumps(line.fields | {"run": self.run} | answer, allow_nan=False) + "\n")
        with self._naming_errors():
            if self._replaces:
                self._file.truncate(0)
                self._replaces = False
            self._file.write("".join(whole).encode())
            self._file.flush()
        self.done += len(whole)

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_) -> None:
        with self._naming_errors():  # it writes once more what a full disk has refused
            self._file.close()

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            raise

    def _lock(self) -> None:
        try:
            with self._naming_errors():
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RiverError(f"{self.path}: another run writes to it; accepted: after its end") from None

    def _begin(self, how: str, prompts: str | Path) -> int:
        """The number of answers that are there."""
        if how == "replace":
            return 0
        if how == "new" and os.fstat(self._file.fileno()).st_size:
            raise RiverError(f"{self.path}: holds something; accepted: --resume, --force, or another file")
        done, end = 0, 0
        self._file.seek(0)
        for data in self._file:
            if data.endswith(b"\n"):
                self._check_answer(done, _object(f"{self.path}: line {done + 1}", data), prompts)
                done, end = done + 1, end + len(data)
            else:
                self._check_torn(done, data)
        self._file.truncate(end)
        return done

    def _check_torn(self, index: int, data: bytes) -> None:
        """What a kill has left of an answer is cut off; anything else is somebody's."""
        fields = self.lines[index].fields if index < len(self.lines) else {}
        begin = json.dumps(fields | {"run": self.run})[:-1].encode()
        if not begin.startswith(data) and not data.startswith(begin):
            raise RiverError(f"{self.path}: line {index + 1} is no beginning of an answer; accepted: --force")

    def _check_answer(self, index: int, answer: dict, prompts: str | Path) -> None:
        where = f"{self.path}: line {index + 1}"
        fields = {name: value for name, value in answer.items() if name not in ANSWERS}
        if index >= len(self.lines) or not same(fields, self.lines[index].fields):
            raise RiverError(f"{where} answers no line of {prompts} in its order; accepted: --force")
        if answer.get("run") != self.run:
            raise RiverError(
                f"{where} is of another run, with another model, river, dtype, version or other options; "
                "accepted: the same, or --force"
            )
        if "error" in answer:
            self.errors.append(self.lines[index].number)
