"""Exit traces: pieces of text, files, and the page as a browser has it."""

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from commands import PROMPT, SHORT
from tiny_model import demo_model, random_model
from tokenizers import Tokenizer, decoders, models

import river_ext
from river_ext import RiverError, trace
from river_ext.loading.decoding import _byte_level_table

HOSTILE = (
    "</script><script>document.title = 'executed'</script>",
    "<img src=x onerror=\"document.title = 'executed'\">",
    "{trace} {policy} <!-- <script> &lt; &amp;",
    "\u202eturned\u2069 \u200b\x00\x07\x1b[2J\x7f\u2028 \u00ad",
    "\ufffd\u0301é😀مرحبا\n\t",
    "",
)


@pytest.fixture(scope="module")
def generated():
    """Two prompts of the bundled model, a river's and a lossless output of each, and their traces."""
    prompts = [PROMPT, "def f"]
    made = {}
    for mode in ("river", "lossless"):
        outputs = demo_model().generate(prompts, max_new_tokens=24, mode=mode, threshold=0.9)
        made[mode] = outputs, trace.exit_trace(demo_model(), prompts, outputs, {"threshold": 0.9})
    return made


def hostile_trace(document: dict) -> dict:
    """One text, whose pieces, prompt and names are hostile."""
    entry = document["texts"][0]
    (token, *_) = entry["pieces"][0]["tokens"]
    pieces = [{"text": text, "special": False, "tokens": [token]} for text in HOSTILE]
    joined = "".join(HOSTILE)
    text = {**entry, "pieces": pieces, "prompt": joined, "text": joined, "error": joined}
    return {**document, "model": joined, "options": {"stop": [joined], joined: joined}, "texts": [text]}


# --- what it holds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["river", "lossless"])
def test_it_holds_every_token(generated, mode):
    outputs, document = generated[mode]
    assert json.loads(json.dumps(document)) == document
    assert document["layers"] == 16 and document["model"] == "the bundled model"
    assert document["texts"][0]["prompt"] == "<s>" + PROMPT  # as the model has it
    for output, entry in zip(outputs, document["texts"], strict=True):
        tokens = [token for piece in entry["pieces"] for token in piece["tokens"]]
        assert [token["id"] for token in tokens] == output.tokens
        assert [token["exit_depth"] for token in tokens] == output.exit_depths
        assert [token["drafted"] for token in tokens] == output.drafted
        for token, similarities in zip(tokens, output.similarities, strict=True):
            assert token["similarities"] == pytest.approx(similarities, abs=1e-6)
        assert "".join(p["text"] for p in entry["pieces"] if not p["special"]) == output.text == entry["text"]
        assert entry["stats"] == output.stats.to_dict()
        assert entry["finish_reason"] == output.finish_reason
    assert any(outputs[0].drafted) == (mode == "lossless")


def test_one_prompt_is_a_list_of_one(generated):
    outputs, document = generated["river"]
    alone = trace.exit_trace(demo_model(), PROMPT, outputs[0])
    assert alone["texts"] == document["texts"][:1] and alone["options"] == {}


def test_options_fit_json():
    output = demo_model().generate(PROMPT, max_new_tokens=1)
    options = {"threshold": [math.inf, 0.5], "top_k": 0, "stop": ("a",), "seed": None, "x": object}
    document = trace.exit_trace(demo_model(), PROMPT, output, options)
    expected = {"threshold": ["inf", 0.5], "top_k": 0, "stop": ["a"], "seed": None, "x": str(object)}
    assert document["options"] == expected
    json.dumps(document, allow_nan=False)


def byte_level_model():
    """Its tokens are the 256 bytes, in order, <end>, and ids without a name."""
    characters = {byte: character for character, byte in _byte_level_table().items()}
    tokenizer = Tokenizer(models.BPE({characters[byte]: byte for byte in range(256)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return random_model(vocab_size=260, tokenizer=tokenizer)


def byte_fallback_model():
    """The same with the pieces <0x00> to <0xFF>."""
    tokenizer = Tokenizer(models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, []))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<end>"])
    return random_model(vocab_size=260, tokenizer=tokenizer)


END, NAMELESS = 256, 258


@pytest.mark.parametrize("make", [byte_level_model, byte_fallback_model])
@pytest.mark.parametrize(
    "tokens, expected",
    [
        ([*"aé€😀".encode()], [("a", 1), ("é", 2), ("€", 3), ("😀", 4)]),
        ([*b"a\xe2\x82"], [("a", 1), ("\ufffd", 2)]),
        ([*b"a\xe2\x82", END, *b"b"], [("a", 1), ("\ufffd", 2), ("<end>", 1), ("b", 1)]),
        ([NAMELESS, *b"a", NAMELESS, END], [("[258]", 1), ("a", 1), ("[258]", 1), ("<end>", 1)]),
        ([0xFF, *b"a"], [("\ufffd", 1), ("a", 1)]),
        ([], []),
    ],
)
def test_parts_of_a_character_are_one_piece(make, tokens, expected):
    model = make()
    output = made_up(model, tokens)
    (entry,) = trace.exit_trace(model, [0x41], output)["texts"]
    pieces = [
        (piece["text"].replace("\ufffd\ufffd", "\ufffd"), len(piece["tokens"])) for piece in entry["pieces"]
    ]
    assert pieces == expected
    assert [token["id"] for piece in entry["pieces"] for token in piece["tokens"]] == tokens
    named = {"<end>", "[258]"}
    assert all(piece["special"] == (piece["text"] in named) for piece in entry["pieces"])
    assert entry["prompt"] == "A"


def made_up(model, tokens: list[int]):
    output = model.generate([1], max_new_tokens=1)
    count = len(tokens)
    return replace(
        output,
        tokens=tokens,
        exit_depths=[2] * count,
        similarities=[[0.1, 0.9]] * count,
        drafted=[False] * count,
    )


def test_without_a_tokenizer_tokens_are_their_ids():
    model = random_model()
    output = model.generate([5, 6], max_new_tokens=3)
    (entry,) = trace.exit_trace(model, [5, 6], output)["texts"]
    assert entry["prompt"] == "[5][6]"
    assert [piece["text"] for piece in entry["pieces"]] == [f"[{token}]" for token in output.tokens]


def test_outputs_and_prompts_that_do_not_match(generated):
    outputs, _ = generated["river"]
    with pytest.raises(RiverError, match="2 outputs of 1 prompts; accepted: one for each prompt"):
        trace.exit_trace(demo_model(), PROMPT, outputs)
    with pytest.raises(RiverError, match="1 outputs of 2 prompts"):
        trace.exit_trace(demo_model(), [PROMPT, "def f"], outputs[0])


@pytest.mark.parametrize("output", [None, 5, "text", [None], {}], ids=str)
def test_what_is_no_output(output):
    with pytest.raises(RiverError, match=r"output is .*; accepted: what generate returned"):
        trace.exit_trace(demo_model(), PROMPT, output)


# --- files ----------------------------------------------------------------------------------------------


def test_json_is_the_trace(generated, tmp_path):
    river_ext.trace.write(generated["river"][1], tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == generated["river"][1]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_page_holds_the_same(generated, tmp_path):
    """In an element that no text can end; and nothing is named that would be loaded."""
    document = hostile_trace(generated["river"][1])
    trace.write(document, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="trace">(.*?)</script>', page, re.S)
    assert json.loads(data) == document and "<" not in data and data.isascii()
    assert page.count("<script") == 2
    assert not re.search(r"https?:|url\(|import|<link|innerHTML|eval\(", page.replace(data, ""))


@pytest.mark.parametrize(
    "name, why",
    [("a.txt", "ends in .html or .json"), ("a", "ends in .html"), ("folder.html", "exists and is no file"),
     ("missing/a.json", "is no directory that can be written to"), ("", "ends in .html")],
)  # fmt: skip
def test_names_that_are_refused(generated, tmp_path, name, why):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(RiverError, match=why) as error:
        trace.write(generated["river"][1], tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]


@pytest.mark.parametrize("length", [245, 300])
def test_names_that_are_too_long(tmp_path, length):
    with pytest.raises(RiverError, match=r"cannot be written \(File name too long\)"):
        trace.write({}, tmp_path / f"{'a' * length}.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [None, 5, "", "a\0.html", ["a.html"]], ids=repr)
def test_what_is_no_path(path):
    with pytest.raises(RiverError, match=r"trace .*; accepted: the path of a file that ends in .html"):
        trace.write({}, path)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(generated, tmp_path, monkeypatch):
    path = tmp_path / "a.html"
    path.write_text("before")
    (tmp_path / "link.html").symlink_to(path)

    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        with pytest.raises(RiverError, match="a.html: cannot be written .No space left on device"):
            trace.write(generated["river"][1], path)
    assert path.read_text() == "before"
    trace.write(generated["river"][1], tmp_path / "link.html")
    assert path.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "link.html"]


def luminance(colour: str) -> float:
    """WCAG's relative luminance of #rrggbb."""
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    "front, back, least",
    [("ink", "page", 7), ("ink", "shallow", 7), ("ink", "deep", 4.5), ("quiet", "page", 4.5),
     ("quiet", "shallow", 4.5), ("bar", "page", 3), ("bar", "deep", 3), ("draft", "page", 3)],
)  # fmt: skip
def test_colours_can_be_told_apart(mode, front, back, least):
    """By WCAG's ratios for text (4.5) and for signs (3)."""
    source = trace.TEMPLATE.read_text()
    colours = {name: pair for name, *pair in re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", source)}
    light, dark = sorted(map(luminance, (colours[front][mode], colours[back][mode])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= least


# --- the command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [[PROMPT], [PROMPT, "def f"], [PROMPT, "--json"], [PROMPT, "def f", "--compare"], []]
)
def test_the_command_writes_a_trace(river, tmp_path, arguments):
    path = tmp_path / "a.json"
    code, out, err = river("generate", "--demo", *arguments, *SHORT, "--threshold", "0.9", "--trace", path)
    assert code == 0
    document = json.loads(path.read_text())
    prompts = [argument for argument in arguments if not argument.startswith("--")]
    assert document["options"] == {"max_new_tokens": 6, "threshold": 0.9}
    assert len(document["texts"]) == (len(prompts) or 6)
    for prompt, entry in zip(prompts, document["texts"], strict=False):
        output = demo_model().generate(prompt, max_new_tokens=6, threshold=0.9)
        assert (entry["prompt"], entry["text"]) == ("<s>" + prompt, output.text)


def test_the_command_refuses_a_name_before_it_loads_a_model(river, tmp_path, monkeypatch):
    monkeypatch.setattr("river_ext.load", lambda *a: 1 / 0)
    code, out, err = river("generate", "--demo", PROMPT, "--trace", tmp_path / "a.png")
    assert code == 2 and out == "" and "a.png: no trace has this name; accepted: one that ends in" in err


# --- in a browser ---------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Title, new tokens (attributes and text), and the text of the element of details."""

    def __init__(self, source: str):
        super().__init__()
        self.title, self.tokens, self.details, self.rows = "", [], "", 0
        self._open: list[tuple[str, dict]] = []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.rows += tag == "tr"
        if self._is_token(attributes):
            self.tokens.append((attributes, ""))
        if tag not in ("meta", "input", "img", "br"):
            self._open.append((tag, attributes))

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self._open and self._open[-1][0] == "title":
            self.title += data
        if any(self._is_token(attributes) for _, attributes in self._open):
            attributes, text = self.tokens[-1]
            self.tokens[-1] = attributes, text + data
        if any(attributes.get("id") == "details" for _, attributes in self._open):
            self.details += data

    @staticmethod
    def _is_token(attributes: dict) -> bool:
        """Of the text: those of the legend are in no tab order."""
        return "token" in attributes.get("class", "").split() and "tabindex" in attributes


@pytest.fixture
def browse(tmp_path):
    """The page of a trace, or of a changed source, after its script has run in Chromium."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium here; the Debian package chromium has it")

    def run(document: dict, change=lambda source: source) -> Page:
        path = tmp_path / "page.html"
        trace.write(document, path)
        path.write_text(change(path.read_text()))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run(
            [program, *flags, "--dump-dom", path.as_uri()], capture_output=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return Page(done.stdout.decode())

    return run


def at_the_end(script: str):
    return lambda source: source.replace("</body>", f"<script>{script}</script></body>")


def without_policy(source: str) -> str:
    changed = re.sub(r"<meta http-equiv.*?>", "", source)
    assert changed != source
    return changed


def test_a_browser_shows_every_piece(generated, browse):
    outputs, document = generated["lossless"]
    page = browse(document, at_the_end("document.title = 'executed'"))
    assert page.title == "Exit trace"  # the policy allows the page's own script alone
    pieces = [piece for entry in document["texts"] for piece in entry["pieces"]]
    shown = [text.replace("↵", "").replace("⇥", "") for _, text in page.tokens]
    assert shown == [piece["text"] for piece in pieces]
    drafted = sum("drafted" in attributes["class"].split() for attributes, _ in page.tokens)
    assert drafted == sum(sum(output.drafted) for output in outputs) > 0
    depths = {depth for output in outputs for depth in output.exit_depths}
    assert page.rows == 1 + len(depths)
    assert [attributes["tabindex"] for attributes, _ in page.tokens].count("0") == 2


def test_hostile_text_is_text_even_without_the_policy(generated, browse):
    page = browse(hostile_trace(generated["river"][1]), without_policy)
    assert page.title == "Exit trace"
    texts = [text for _, text in page.tokens]
    assert texts[:3] == list(HOSTILE[:3])
    signs = "U+202E", "U+2069", "U+200B", "U+0000", "U+0007", "U+001B", "U+007F", "U+2028", "U+00AD"
    first, second, third, *others, last = signs
    assert texts[3] == f"{first}turned{second} {third}{''.join(others[:3])}[2J{''.join(others[3:])} {last}"
    assert texts[4:] == ["\ufffd\u0301é😀مرحبا↵\n⇥\t", "no text"]


@pytest.mark.parametrize("way", ["focus()", "dispatchEvent(new MouseEvent('mouseenter'))"])
def test_keys_and_pointer_show_the_similarities(generated, browse, way):
    outputs, document = generated["river"]
    script = (
        "const spans = [...document.querySelectorAll('.text .token')]; spans[0].focus();"
        "for (const key of ['ArrowRight', 'ArrowRight', 'ArrowLeft'])"
        "  document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));"
        "const next = spans[spans.indexOf(document.activeElement) + 1];"
        "document.activeElement.blur();"  # or it has the focus again when the window gets it, at some time
        f"next.{way}"
    )
    page = browse(document, lambda source: at_the_end(script)(without_policy(source)))
    token, depth, similarities = (
        values[2] for values in (outputs[0].tokens, outputs[0].exit_depths, outputs[0].similarities)
    )
    assert f"token {token}: left the backbone after layer {depth} of 16" in page.details
    for layer, similarity in enumerate(similarities, start=1):
        assert f"{layer} {similarity:.3f}" in page.details
    assert page.tokens[1][0]["tabindex"] == "0" or way == "focus()"
