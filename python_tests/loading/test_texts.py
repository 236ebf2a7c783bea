"""Files of texts: plain ones, JSON lines, and what is refused."""

import json

import pytest

from river_ext.errors import RiverError
from river_ext.loading.texts import read_texts


@pytest.fixture
def file(tmp_path):
    """A file that holds some bytes."""

    def write(content, name="texts"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_blank_lines_separate_texts(file):
    content = "\ufeff\n\n one\ntwo \n \t\n\n\nthree\r\n\r\nfour é"
    assert read_texts(file(content)) == ["one\ntwo", "three", "four é"]
    assert read_texts(file("only one")) == ["only one"]


def test_json_lines(file):
    lines = [{"text": " a\n\nb "}, {"text": ""}, {"text": "\u2028 c\u2028d", "other": 1}]
    content = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    assert read_texts(file(content, "x.jsonl")) == ["a\n\nb", "c\u2028d"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("texts", b"", "texts: no text in it; accepted"),
        ("texts", b" \n\n\t\n", "texts: no text in it"),
        ("x.jsonl", b"", "x.jsonl: no text in it"),
        ("x.jsonl", b'{"text": " "}\n', "x.jsonl: no text in it"),
        ("texts", b"good\n\nb\xe4d", r"texts: byte 7 is no UTF-8; accepted: UTF-8 text"),
        ("texts", "wide".encode("utf-16"), "texts: byte 0 is no UTF-8"),
        ("x.jsonl", b'{"text": "a"}\nplain', "x.jsonl: line 2 is not valid JSON"),
        ("x.jsonl", b"[" * 100_000, "x.jsonl: line 1 is not valid JSON"),
        ("x.jsonl", b'{"text": "a"}\n\n{"content": "b"}', 'x.jsonl: line 3 has no field "text"'),
        ("x.jsonl", b'{"text": ["a"]}', 'x.jsonl: line 1 has no field "text"'),
        ("x.jsonl", b'"text"', 'x.jsonl: line 1 has no field "text"'),
    ],
)
def test_refused_files(file, name, content, message):
    with pytest.raises(RiverError, match=message) as error:
        read_texts(file(content, name))
    assert "\n" not in str(error.value)


def test_only_regular_files(tmp_path):
    for path, message in (
        (tmp_path, "a directory"),
        ("/dev/zero", "a device"),
        (tmp_path / "x", "cannot be read"),
    ):
        with pytest.raises(RiverError, match=message):
            read_texts(path)
