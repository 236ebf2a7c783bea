"""Files of prompts and of answers, without Ray."""

import json
import os
import resource
import subprocess
import sys

import pytest
from commands import ROOT

from river_ext import RiverError
from river_ext.scale.lines import Answers, read_lines

LINES = [
    {"id": 7, "prompt": "def"},
    {"prompt": [1, 2], "options": {"seed": 3}},
    {"messages": [{"role": "user", "content": "\u00fc"}], "id": None},
]
GIVEN = [{"output": {"text": "a"}}, {"error": "too long"}, {"output": {"text": "\u00fc"}}]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    first, *others = map(json.dumps, LINES)
    path.write_text("\ufeff" + first + "\n\n" + "\r\n".join(others))  # a mark, a blank line, no last newline
    return path


@pytest.fixture
def answers(tmp_path, prompts):
    """Opens the file of answers."""

    def opened(how="new", run="r", lines=None):
        return Answers(tmp_path / "answers.jsonl", prompts, lines or read_lines(prompts), run, how)

    opened.path = tmp_path / "answers.jsonl"
    return opened


def written(path) -> list[dict]:
    *lines, rest = path.read_text().split("\n")
    assert rest == ""
    return [json.loads(line) for line in lines]


def whole() -> list[dict]:
    return [line | {"run": "r"} | answer for line, answer in zip(LINES, GIVEN, strict=True)]


def test_lines_are_read_with_their_numbers(prompts):
    assert [(line.number, line.fields) for line in read_lines(prompts)] == list(
        zip((1, 3, 4), LINES, strict=True)
    )


@pytest.mark.parametrize(
    "line, why",
    [
        (b"{", "line 2 is not valid JSON"),
        (b'{"prompt": NaN}', "line 2 is not valid JSON (NaN is no number there)"),
        (b'{"prompt": "a", "x": -1e999}', "line 2 is not valid JSON ('-1e999' is too large a number)"),
        (b'{"prompt": "\xff"}', "line 2 is not valid JSON"),
        (b"[" * 99999, "line 2 is not valid JSON"),
        (b"3", "line 2 is 3; accepted: an object"),
        (b"{}", "line 2 has neither; accepted: one of prompt and messages"),
        (b'{"prompt": "a", "messages": []}', "line 2 has prompt and messages; accepted: one of"),
        (b'{"prompt": 3}', "line 2: prompt is 3; accepted: text, or a list of token ids"),
        (b'{"prompt": [1, true]}', "line 2: prompt is [1, True]; accepted"),
        (b'{"prompt": ["a", "b"]}', "line 2: prompt is ['a', 'b']; accepted"),
        (b'{"messages": ["a"]}', "line 2: messages is ['a']; accepted: a list of objects"),
        (b'{"messages": []}', "line 2: messages is []; accepted: a list of objects"),
        (b'{"prompt": "a", "options": 3}', "line 2: options is 3; accepted: an object"),
        (b'{"prompt": "a", "output": 3}', "line 2 has the field output, which its answer has"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line, why):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    with pytest.raises(RiverError) as refused:
        read_lines(path)
    assert str(refused.value).startswith(f"{path}: {why}")


def test_a_file_without_prompts(tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    for name, why in [("empty", "no line in it"), ("nowhere", "cannot be read"), (".", "is a directory")]:
        with pytest.raises(RiverError, match=why):
            read_lines(tmp_path / name)


def test_answers_are_there_at_once(answers):
    with answers() as file:
        for number in range(3):
            file.append([GIVEN[number]])
            assert written(answers.path) == whole()[: number + 1]
        assert (file.resumed, file.done, file.errors) == (0, 3, [3])


@pytest.mark.parametrize("kept", range(4))
@pytest.mark.parametrize("torn", [0, 9, -1])  # bytes of the next line that are there
def test_resume_goes_on_behind_the_last_whole_line(answers, kept, torn):
    with answers() as file:
        file.append(GIVEN)
    expected = answers.path.read_bytes()
    lines = expected.splitlines(keepends=True)
    before = b"".join(lines[:kept])
    answers.path.write_bytes(before + b"".join(lines[kept : kept + 1])[:torn])
    with answers("resume") as file:
        assert file.resumed == file.done == kept
        assert answers.path.read_bytes() == before
        file.append(GIVEN[kept:])
        assert file.errors == [3]
    assert answers.path.read_bytes() == expected


def test_resume_without_answers_begins(answers):
    with answers("resume") as file:
        file.append(GIVEN)
    assert written(answers.path) == whole()


def test_what_is_there_is_replaced_only_if_asked_for(answers):
    answers.path.write_text("of somebody's")
    with pytest.raises(RiverError, match="holds something; accepted: --resume, --force, or another file"):
        answers()
    with pytest.raises(RiverError, match="line 1 is no beginning of an answer; accepted: --force"):
        answers("resume")
    assert answers.path.read_text() == "of somebody's"
    with answers("replace") as file:
        file.append(GIVEN)
    assert written(answers.path) == whole()


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda lines: lines[::-1], r"line 1 answers no line of .*prompts.jsonl in its order"),
        (lambda lines: [lines[0], lines[0]], "line 2 answers no line"),
        (lambda lines: [*lines, lines[2]], "line 4 answers no line"),
        (lambda lines: [lines[0] | {"id": 7.0}], "line 1 answers no line"),
        (lambda lines: [lines[0], lines[1] | {"run": "other"}], "line 2 is of another run"),
        (lambda lines: [lines[0], 3], "line 2 is 3"),
    ],
)
def test_answers_of_something_else_are_not_gone_on_with(answers, change, why):
    before = "".join(json.dumps(line) + "\n" for line in change(whole()))
    answers.path.write_text(before)
    with pytest.raises(RiverError, match=why):
        answers("resume")
    assert answers.path.read_text() == before


def test_what_is_replaced_stays_until_there_is_an_answer(answers):
    answers.path.write_text("of somebody's")
    with answers("replace"):
        pass
    assert answers.path.read_text() == "of somebody's"


def test_a_full_disk_is_named_and_gone_on_from(answers):
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError) as full, answers() as file:
            file.append(GIVEN[:1])
            whole_lines = answers.path.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (whole_lines + 9, most))
            file.append(GIVEN[1:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert full.value.filename == str(answers.path)
    assert answers.path.stat().st_size == whole_lines + 9
    with answers("resume") as file:
        assert file.resumed == 1
        file.append(GIVEN[1:])
    assert written(answers.path) == whole()


def test_two_runs_do_not_write_to_one_file(answers):
    with answers() as file:
        file.append(GIVEN[:1])
        with pytest.raises(RiverError, match="another run writes to it"):
            answers("resume")
        file.append(GIVEN[1:])
    assert written(answers.path) == whole()


def test_places_that_are_no_files(answers, prompts, tmp_path):
    lines = read_lines(prompts)
    os.mkfifo(tmp_path / "fifo")
    os.link(prompts, tmp_path / "link")
    places = {"fifo": "is a FIFO", ".": "is a directory", "link": "holds the prompts"}
    for name, why in places.items():
        with pytest.raises(RiverError, match=why):
            Answers(tmp_path / name, prompts, lines, "r", "replace")
    assert read_lines(prompts) == lines


def test_a_run_without_answers_is_in_nobodys_way(answers):
    with answers():
        pass
    with answers() as file:
        file.append(GIVEN)
    assert written(answers.path) == whole()


WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
import river_ext.scale as scale
for name in dir(scale):
    try:
        getattr(scale, name)
    except scale.RiverError as error:
        print(error)
"""


def test_one_sentence_where_ray_is_missing():
    done = subprocess.run([sys.executable, "-c", WITHOUT_RAY], cwd=ROOT, capture_output=True, text=True)
    line = "river_ext.scale needs the module ray; accepted: after pip install 'river_ext[scale]'\n"
    assert (done.stdout, done.stderr) == (2 * line, "")


@pytest.mark.parametrize("given, found", [(None, "0"), ("1", "1")])
def test_ray_is_not_to_report_its_use_unless_the_user_says_so(given, found):
    environment = {k: v for k, v in os.environ.items() if k != "RAY_USAGE_STATS_ENABLED"}
    environment |= {"RAY_USAGE_STATS_ENABLED": given} if given else {}
    script = "import river_ext.scale, os; print(os.environ['RAY_USAGE_STATS_ENABLED'])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True)
    assert done.stdout.decode().strip() == found
