"""The numbers of the documents are those of the results: tables and numbers between markers, and figures."""

import json
import re
import shutil
import sys
import xml.etree.ElementTree

import pytest

from bench import report
from bench.lib import figures, prose, results
from bench.lib.places import places
from bench.tables import layout
from river_ext.errors import RiverError

README = report.ROOT / "README.md"
ids = {"ids": lambda path: path.name}
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
# what looks like a measured number in a sentence or a table
MEASURED = re.compile(
    r"\d[\d.,]* ?(?:%|x\b|times\b|GB/s|tokens/s|[mu]s\b|s\b|nats)|(?<![\d.])0\.\d+(?!\.?\d)"
)
# by document, what looks like one and is none
NOT_MEASURED = {
    "calibrate.md": {
        "what a user asks for": {"1%", "5%", "5 %", "95 %"},
        "arithmetic": {"0.2 %"},
        "thresholds": {"0.9", "0.98"},
    },
    "cpu.md": {
        "a target": {"80 %"},
        "thresholds": {"0.95", "0.9", "0.98", "0.995"},
        "of a format": {"0.5625"},
    },
    "evaluation.md": {
        "limits": {"3 s", "20 s", "0.01 nats"},
    },
    "features.md": {"a threshold": {"0.9"}},
    "imported-rivers.md": {"a limit": {"0.2"}},
    "models.md": {"a name": {"3.x"}},
    "offloading.md": {"what a host link gives, and a division": {"55 GB/s", "17 ms", "0.2", "0.5 s"}},
    "paper-figures.md": {"the paper's": {"0.55"}},
    "serving.md": {"limits": {"30 s"}, "a default": {"0.5"}},
    "thresholds-and-modes.md": {
        "a standard error of that many tokens": {"1 %"},
        "thresholds": {"0.5", "0.8", "0.9", "0.96", "0.97", "0.98"},
    },
    "transformers.md": {"of the format": {"0.28"}},
    "usage.md": {"a threshold": {"0.9"}},
    "w4-format.md": {"of the format": {"0.5625", "28 %"}},
}


def places_of(document):
    return list(places(document.read_text(), document.name))


@pytest.mark.parametrize("document", report.DOCUMENTS, **ids)
def test_tables_are_those_of_the_results(document):
    """If this fails, run `python -m bench.report`."""
    assert document.read_text() == report.rendered(document)


@pytest.mark.parametrize("figure", report.FIGURES, **ids)
def test_figures_are_those_of_the_results(figure):
    sources, _ = report.FIGURES[figure]
    assert figures.is_of(figure, sources)
    assert xml.etree.ElementTree.fromstring(figure.read_text()).tag.endswith("svg")


def test_every_table_has_one_place_and_every_number_one_or_more():
    named = [place.name for path in report.DOCUMENTS for place in places_of(path)]
    assert sorted(name for name in named if name not in report.VALUES) == sorted(report.TABLES)
    assert set(named) >= set(report.VALUES)


@pytest.mark.parametrize("document", report.DOCUMENTS, **ids)
def test_no_number_is_typed_by_hand(document):
    """If this fails, give the number a place in bench/lib/prose.py, or say above why it is not measured."""
    text = document.read_text()
    for place in reversed(places_of(document)):
        text = text[: place.start] + text[place.stop :]
    assert "---:|" not in text
    for fence in FENCE.findall(text):
        assert not re.search(r"^\S.*\d\.\d+ .*\d\.\d+$", fence, re.M), fence
    known = NOT_MEASURED.get(document.name, {})
    typed = {found.rstrip(".,") for found in MEASURED.findall(FENCE.sub("", text))}
    assert typed == set().union(*known.values())


def test_a_changed_digit_is_noticed(one_document):
    text, found = README.read_text(), places_of(README)
    table = next(place for place in found if place.name == "modes")
    start = table.start + re.search(r"\d\.\d\d x", text[table.start : table.stop]).start()
    changed = [text[:start] + "9.99" + text[start + 4 :]]
    changed += [text[: p.start] + "9.99" + text[p.stop :] for p in found if p.name in report.VALUES]
    assert len(changed) > 1
    for one in changed:
        one_document.write_text(one)
        assert report.rendered(one_document) == text


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
        ("scale", lambda r: r["serving"][1]["shares"].__setitem__(0, 9.9), ["scale-serving"]),
        ("scale", lambda r: r["offline"][0].update(start_seconds=99), ["scale-offline"]),
        ("decode", lambda r: r["decode"][0].update(read_gb_s=99.9), ["plain-read"]),
        ("linear", lambda r: r["linear"][0].update(gb_s=99.9), ["linear-dense-gb"]),
        ("cycle", lambda r: r["cycle"][0].update(ms=99.9), ["cycle-step-ms"]),
        ("thresholds", lambda r: r["similarity"]["50"].__setitem__(9, 0.123), ["similarity-plateau"]),
        ("calibrate-demo", lambda r: r["curve"][0].update(different=7), ["calibrate-demo"]),
        ("calibrate-135M", lambda r: r["curve"][0].update(exit_depth=9.9), ["calibrate-135M"]),
        ("eval-demo", lambda r: r["rows"][-1].update(kl=9.9), ["eval-demo"]),
        ("memory", lambda r: r["memory"][0].update(file=999), ["memory-measured"]),
    ],
)
def test_a_changed_result_is_noticed(tmp_path, monkeypatch, name, change, tables):
    makers = report.TABLES | report.VALUES
    before = {place: make() for place, make in makers.items()}
    copied = tmp_path / "results"
    shutil.copytree(report.RESULTS, copied)
    path = copied / report.FILES[name]
    changed = json.loads(path.read_text())
    change(changed)
    path.write_text(json.dumps(changed))
    monkeypatch.setattr(results, "RESULTS", copied)
    assert [place for place, make in sorted(makers.items()) if make() != before[place]] == sorted(tables)


def test_how_ranges_look():
    assert prose.between([2.04, 1.0, 1.5], ".1f") == "1.0 to 2.0"
    assert prose.between([0.94, 0.941], ".2f") == "0.94"


def test_how_tables_look():
    rows = [("a name", "1", ""), ("b", "22.5", "3 %")]
    assert (
        layout.block(("", "x", "y"), rows) == "```\n           x    y\na name     1\nb       22.5  3 %\n```"
    )
    assert layout.markdown(("", "x", "y"), rows) == (
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


@pytest.mark.parametrize(
    "text, said",
    [
        ("a\n<!--report:cycle-->\n", "a.md:2: <!--report:cycle--> without its <!--end--> after it"),
        (
            "a\n<!--report:river-gb-->1 and\n<!--report:cycle-->\n<!--end-->\n",
            "a.md:2: <!--report:river-gb--> without its <!--end--> after it",
        ),
        (
            "<!--report:cycle-->\n<!--report:cycle-->\n<!--end-->\n",
            "a.md:1: <!--report:cycle--> without its <!--end--> after it",
        ),
        ("a\n<!--end-->\n", "a.md:2: <!--end--> without a <!--report:NAME--> before it"),
        (
            "<!--report:cycle-->\n<!--end-->\n\n<!--end-->\n",
            "a.md:4: <!--end--> without a <!--report:NAME--> before it",
        ),
        ("<!-- report:cycle-->\n<!--end-->\n", "a.md:1: <!-- report:cycle-->; accepted: <!--report:NAME-->"),
        ("<!--report:cycle-->\n<!--end\n", "a.md:2: <!--end; accepted: <!--report:NAME--> and <!--end-->"),
        ("<!--report:nothing-->\n<!--end-->", "a.md:1: 'nothing'; accepted: modes, decode-short, "),
    ],
)
def test_a_marker_that_is_wrong_is_named_before_anything_is_written(
    one_document, monkeypatch, capsys, text, said
):
    earlier = one_document.with_name("0.md")
    earlier.write_text("<!--report:river-gb-->old<!--end-->\n")
    monkeypatch.setattr(report, "DOCUMENTS", [earlier, one_document])
    monkeypatch.setattr(sys, "argv", ["report"])
    one_document.write_text(text)
    with pytest.raises(SystemExit) as end:
        report.main()
    assert end.value.code.startswith(f"report.py: {said}") and "\n" not in end.value.code
    assert "old" in earlier.read_text() and one_document.read_text() == text


def test_a_figure_that_cannot_be_drawn_leaves_all_as_it_was(one_document, monkeypatch):
    def fails(source, path):
        path.write_text("<svg>")
        raise RiverError("no")

    old, figure = one_document.read_text(), one_document.with_suffix(".svg")
    figures_of = {figure.with_name("0.svg"): ([one_document], shutil.copy), figure: ([one_document], fails)}
    monkeypatch.setattr(report, "FIGURES", figures_of)
    monkeypatch.setattr(sys, "argv", ["report"])
    with pytest.raises(RiverError):
        report.main()
    assert one_document.read_text() == old
    assert [path.name for path in one_document.parent.iterdir()] == ["a.md"]
    monkeypatch.setattr(report, "FIGURES", dict(list(figures_of.items())[:1]))
    report.main()
    assert one_document.with_name("0.svg").read_text() == old != one_document.read_text()


def test_results_that_lack_something_are_said(one_document, tmp_path, monkeypatch):
    one_document.write_text("<!--report:prefill-->\n<!--end-->")
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    path = tmp_path / report.FILES["prefill"]
    for text, said in [
        ('{"prefill": [{"shape": "1B"}]}', "needs 'tokens'"),
        ("{", "Expecting"),
        (None, "No such file"),
    ]:
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(RiverError, match=f"a.md:1: 'prefill'.*{said}"):
            report.rendered(one_document)


def test_a_figure_of_other_results_is_noticed(tmp_path):
    results, figure = tmp_path / "a.json", tmp_path / "a.svg"
    results.write_text("1")
    assert not figures.is_of(figure, [results])
    figure.write_text(f"<svg>{figures.digest([results])}</svg>")
    assert figures.is_of(figure, [results])
    results.write_text("2")
    assert not figures.is_of(figure, [results])
