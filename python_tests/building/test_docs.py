"""What the documents say of the repository is true: links, paths, commands, and no machine of anybody's."""

import math
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from river_cli.arguments import parse

ROOT = Path(__file__).resolve().parents[2]
NAMED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md", "bench/NOTES.md")
DOCUMENTS = [*(ROOT / name for name in NAMED), *sorted((ROOT / "docs").glob("*.md"))]
ENTRIES = {path.name for path in ROOT.iterdir() if path.is_dir()} | {".ci", ".github"}
MADE = ("build/", ".venv/")  # what commands make: nothing of the repository

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
CODE = re.compile(r"`([^`\n]+)`")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def anchors(document: Path) -> set[str]:
    """Those that the headings of a document get: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", document.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    broken = []
    for link in LINK.findall(FENCE.sub("", document.read_text())):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def missing_paths(text: str) -> list[str]:
    """Paths from the repository's root in the words of code, inline or in a block, that are not there."""
    words = " ".join([*CODE.findall(FENCE.sub("", text)), *FENCE.findall(text)]).split()
    paths = [word.strip("\"'(),:;").removeprefix("./").partition("::")[0] for word in words]
    in_repository = [path for path in paths if path.split("/")[0] in ENTRIES and "/" in path]
    return [path for path in in_repository if not path.startswith(MADE) and not any(ROOT.glob(path))]


@each_document
def test_links_and_paths_exist(document):
    assert broken_links(document) == []
    assert missing_paths(document.read_text()) == []


def test_what_does_not_exist_would_be_noticed(tmp_path):
    document = tmp_path / "a.md"
    document.write_text("# One word\n[a](a.md#one-word) [b](b.md) [c](#two) [d](https://example.org/x)\n")
    assert broken_links(document) == ["b.md", "#two"]
    text = "`csrc/river.h`, `csrc/*.md`, `csrc/none.h` and `T/2`\n```\nbash bench/none.sh  build/x\n```\n"
    assert missing_paths(text) == ["csrc/none.h", "bench/none.sh"]


def features() -> list[str]:
    """What stands beside each feature: a command, or a test."""
    text = (ROOT / "docs" / "features.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| what ")]
    rows = [re.fullmatch(r"\| .* \| `([^`]+)` \|", line) for line in lines]
    assert all(rows) and len(rows) > 30
    return [row[1] for row in rows]


def test_every_feature_has_a_test_or_a_command_that_works(river, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for feature in features():
        program, *arguments = shlex.split(feature)
        if program != "river":
            path, _, name = feature.partition("::")
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M), feature
        elif arguments[0] in ("chat", "eval"):
            assert "chat" not in arguments or "--demo" not in arguments  # that model has no chat template
            parse(arguments)  # which have tests of their own
        else:
            quick = ("--max-new-tokens", "3") if arguments[0] == "generate" else ()
            assert river(*arguments, *quick)[0] == 0, feature
    assert {path.name for path in tmp_path.iterdir()} == {"trace.html", "demo-river"}


@each_document
def test_no_machine_and_no_registry_is_named(document):
    text = document.read_text()
    assert not re.search(r"(?<![\w.~])/(work|home|root|tmp|opt|mnt|Users)\b", text)
    assert not re.search(r"\b(pypi|pythonhosted|download\.pytorch|conda|artifactory|localhost)\b", text)


def test_the_readme_is_short():
    assert 700 <= len((ROOT / "README.md").read_text().split()) <= 1000


def readme_blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)


def test_the_commands_of_the_readme_are_ones():
    (block,) = [block for block in readme_blocks("") if block.startswith("river ")]
    commands = [shlex.split(command) for command in re.split(r"^(?=river )", block, flags=re.M) if command]
    assert [command[1] for command in commands] == ["generate", "eval", "info"]
    for _, *arguments in commands:
        parse(arguments)
    (block,) = [block for block in readme_blocks("") if block.startswith("make ")]
    targets = re.findall(r"^make (\w+)", block, re.M)
    assert targets == ["demo", "test"]
    subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True)


def transcripts(document: Path) -> list[tuple[list[str], str]]:
    """The commands after "$ " in blocks of a document, and what they print."""
    blocks = re.findall(r"^```\n(\$ .*?)^```$", document.read_text(), re.M | re.S)
    parts = [part.partition("\n") for block in blocks for part in re.split(r"^\$ ", block, flags=re.M)[1:]]
    return [(shlex.split(command), printed) for command, _, printed in parts]


@pytest.mark.parametrize("name", ["README.md", "docs/usage.md"])
def test_what_commands_print_is_what_the_documents_show(name, river, real_model, monkeypatch):
    (make, _), *others = transcripts(ROOT / name)
    assert make == ["python3", "tools/real_model.py", "smollm2"] and others
    monkeypatch.setattr("river_cli.hint", lambda: None)  # a busy machine is no part of it,
    monkeypatch.setattr("river_ext.progress.LINE_EVERY", math.inf)  # nor a slow one
    for (program, *arguments), expected in others:
        assert program == "river"
        code, out, err = river(*[real_model if argument == "smollm2" else argument for argument in arguments])
        assert (code, " ".join((out + err).split())) == (0, " ".join(expected.split()))


def test_the_python_of_the_readme_runs(capsys):
    (code,) = readme_blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    text, depths = capsys.readouterr().out.rsplit("[", 1)
    assert "21 + 12 = 33" in text and set(depths.strip(" ]\n").split(", ")) != {"16"}


def test_the_workflow_runs_what_ci_runs():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "run: .ci/run" in workflow and "contents: read" in workflow
    assert all(re.fullmatch(r"\S+@v\d+", action) for action in re.findall(r"uses: (.*)", workflow))
