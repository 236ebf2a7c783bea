"""The numbers of the documents are those of the results: tables between markers, and figures."""

import json
import re
import shutil
import sys
import xml.etree.ElementTree

import pytest

from bench import report
from bench.lib import figures

ids = {"ids": lambda path: path.name}
# documents in which every table of numbers is generated
GENERATED = [
    report.ROOT / name for name in ("README.md", "docs/cpu.md", "docs/evaluation.md", "docs/offloading.md")
]


@pytest.mark.parametrize("document", report.DOCUMENTS, **ids)
def test_tables_are_those_of_the_results(document):
    """If this fails, run `python -m bench.report`."""
    assert document.read_text() == report.rendered(document.read_text())


@pytest.mark.parametrize("figure", report.FIGURES, **ids)
def test_figures_are_those_of_the_results(figure):
    sources, _ = report.FIGURES[figure]
    assert figures.is_of(figure, sources)
    assert xml.etree.ElementTree.fromstring(figure.read_text()).tag.endswith("svg")


def test_every_table_has_one_place():
    named = [place[2] for path in report.DOCUMENTS for place in report.PLACE.finditer(path.read_text())]
    assert sorted(named) == sorted(report.TABLES)
    assert sum(path.read_text().count("<!--report:") for path in report.DOCUMENTS) == len(named)


@pytest.mark.parametrize("document", GENERATED, **ids)
def test_no_table_is_typed_by_hand(document):
    text = report.PLACE.sub("", document.read_text())
    assert "---:|" not in text
    for fence in re.findall(r"^```\n(.*?)^```$", text, re.M | re.S):
        assert not re.search(r"^\S.*\d\.\d+ .*\d\.\d+$", fence, re.M), fence


def test_a_changed_digit_is_noticed():
    text = (report.ROOT / "README.md").read_text()
    place = report.PLACE.search(text)
    number = re.search(r"\d\.\d\d x", place[3])
    start = place.start(3) + number.start()
    assert report.rendered(text[:start] + "9.99" + text[start + 4 :]) == text


@pytest.mark.parametrize(
    "name, change, tables",
    [
        ("lossless", lambda r: r["texts"][0]["settings"][1].update(x_full_bf16=9.99), ["modes", "lossless"]),
        ("decode", lambda r: r["decode"][0].update(ms=999.9), ["decode", "decode-short"]),
        ("cycle", lambda r: r["cycle"][1].update(ms=99.9), ["cycle"]),
        ("engine", lambda r: r["engine"][3].update(tokens_per_second=9999), ["engine"]),
        ("peers", lambda r: r["peers"][0].update(tokens_per_second=9999), ["peers"]),
        ("paper", lambda r: r["values"][0].update(r=0.999), ["paper-correlations"]),
        ("paper", lambda r: r["drift"]["settings"][1]["kl"].__setitem__(1, 9.9), ["paper-drift"]),
        ("gsm8k", lambda r: r["tasks"][0]["rows"][3].update(tokens_per_second=99.9), ["gsm8k"]),
        ("peers-text", lambda r: r["peers"][1].update(x=9.99), ["peers-text"]),
        ("gsm8k", lambda r: r["tasks"][0].update(shots=9), ["gsm8k"]),
        ("prefill", lambda r: r["prefill"][0].update(ms=99), ["prefill"]),
        ("thresholds", lambda r: r["forced"][2].update(same=0.999), ["prefill-policies", "thresholds"]),
        ("memory", lambda r: r["memory"][0].update(file=999), ["memory-measured"]),
    ],
)
def test_a_changed_result_is_noticed(tmp_path, monkeypatch, name, change, tables):
    before = {table: make() for table, make in report.TABLES.items()}
    results = tmp_path / "results"
    shutil.copytree(report.RESULTS, results)
    path = results / report.FILES[name]
    changed = json.loads(path.read_text())
    change(changed)
    path.write_text(json.dumps(changed))
    monkeypatch.setattr(report, "RESULTS", results)
    assert [t for t, make in sorted(report.TABLES.items()) if make() != before[t]] == sorted(tables)


def test_how_tables_look():
    rows = [("a name", "1", ""), ("b", "22.5", "3 %")]
    assert (
        report.block(("", "x", "y"), rows) == "```\n           x    y\na name     1\nb       22.5  3 %\n```"
    )
    assert report.markdown(("", "x", "y"), rows) == (
        "| | x | y |\n|---|---:|---:|\n| a name | 1 | |\n| b | 22.5 | 3 % |"
    )


@pytest.fixture
def one_document(tmp_path, monkeypatch):
    document = tmp_path / "a.md"
    document.write_text("before\n<!--report:cycle-->\nold\n<!--end-->\nafter\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "DOCUMENTS", [document])
    monkeypatch.setattr(report, "FIGURES", {})
    return document


def test_writing_and_checking(one_document, monkeypatch, capsys):
    old = one_document.read_text()
    monkeypatch.setattr(sys, "argv", ["report", "--check"])
    with pytest.raises(SystemExit) as end:
        report.main()
    assert end.value.code == 1 and one_document.read_text() == old
    assert capsys.readouterr().out == "a.md\n"
    monkeypatch.setattr(sys, "argv", ["report"])
    report.main()
    assert one_document.read_text() == old.replace("old", report.TABLES["cycle"]())
    monkeypatch.setattr(sys, "argv", ["report", "--check"])
    with pytest.raises(SystemExit) as end:
        report.main()
    assert not end.value.code


def test_results_that_lack_something_are_said(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="table 'nothing'; accepted: modes, decode-short"):
        report.rendered("<!--report:nothing-->\n<!--end-->")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    path = tmp_path / report.FILES["prefill"]
    for text, said in [
        ('{"prefill": [{"shape": "1B"}]}', "needs 'tokens'"),
        ("{", "'prefill': Expecting"),
        (None, "No such file"),
    ]:
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(SystemExit, match=said):
            report.rendered("<!--report:prefill-->\n<!--end-->")


def test_a_figure_of_other_results_is_noticed(tmp_path):
    results, figure = tmp_path / "a.json", tmp_path / "a.svg"
    results.write_text("1")
    assert not figures.is_of(figure, [results])
    figure.write_text(f"<svg>{figures.digest([results])}</svg>")
    assert figures.is_of(figure, [results])
    results.write_text("2")
    assert not figures.is_of(figure, [results])
