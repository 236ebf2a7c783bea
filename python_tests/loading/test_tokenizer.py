"""Tokenizers from checkpoint directories: as transformers builds them, and none that harm the process."""

import json
import os
import random
import time
from pathlib import Path

import pytest
from tiny_model import CONFIG
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from river_ext.errors import RiverError
from river_ext.loading import tokenizer as tokenizer_module
from river_ext.loading import tokenizer_trial
from river_ext.loading.config import ModelConfig
from river_ext.loading.text import Text
from river_ext.loading.tokenizer import load_tokenizer

HELLO = "hi <s> a</s>b  <new> <|end|> x<tool> </s>  <mine> <more> q"


def byte_tokenizer() -> Tokenizer:
    """Ids 0..255 are bytes, then <s>, </s> and <pad>, which are special, and <|end|>, which is not."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.add_tokens(["<|end|>"])
    return tokenizer


def write(directory: Path, tokenizer=None, **files) -> Path:
    """tokenizer.json, and JSON files by their stems."""
    files = {"config": {"model_type": "llama", "bos_token_id": 256}} | files
    (tokenizer or byte_tokenizer()).save(str(directory / "tokenizer.json"))
    for stem, values in files.items():
        (directory / f"{stem}.json").write_text(json.dumps(values))
    return directory


# --- as in transformers ---------------------------------------------------------------------------------


def token(content: str, **flags) -> dict:
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False) | {"special": True}
    return {"content": content} | plain | flags


def random_files(rng: random.Random) -> dict[str, dict]:
    """Some of the settings that the files beside tokenizer.json may hold, in combinations."""

    def some(**values):
        return {key: rng.choice(options) for key, options in values.items() if rng.random() < 0.5}

    config = some(
        bos_token=["<s>", "<new>", {"__type": "AddedToken", **token("<s>", lstrip=True)}],
        eos_token=["</s>", "<|end|>", {"__type": "AddedToken", **token("</s>", rstrip=True)}],
        additional_special_tokens=[["<more>"], ["<tool>", "<|end|>"], []],
        extra_special_tokens=[["<more>"], {"my_token": "<mine>"}],
        tool_token=["<tool>"],
        split_special_tokens=[True, False],
        add_bos_token=[False],
    )
    if rng.random() < 0.5:
        config["added_tokens_decoder"] = {
            index: choice
            for index, choice in {
                "256": token("<s>"),
                "257": token("</s>", lstrip=True),
                "259": token("<|end|>"),
                "260": token("<new>", special=rng.random() < 0.5, lstrip=rng.random() < 0.5),
            }.items()
            if rng.random() < 0.6
        }
    files = {"tokenizer_config": config}
    if rng.random() < 0.5:
        files["special_tokens_map"] = some(
            bos_token=["<new>", {k: v for k, v in token("<s>", lstrip=True).items() if k != "special"}],
            eos_token=["<|end|>"],
            additional_special_tokens=[["<tool>"]],
            my_token=["<mine>"],
        )
    if rng.random() < 0.5:
        files["added_tokens"] = rng.choice([{"<new>": 260}, {"<tool>": 261, "<new>": 260}, {"<s>": 256}])
    return files


@pytest.mark.parametrize("seed", range(40))
def test_files_beside_count_as_in_transformers(tmp_path, seed):
    transformers = pytest.importorskip("transformers")
    files = random_files(random.Random(seed))
    files["tokenizer_config"]["tokenizer_class"] = "PreTrainedTokenizerFast"
    write(tmp_path, **files)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    ids = theirs(HELLO).input_ids
    assert ours.encode(HELLO).ids == ids, files
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert repr(ours.get_added_tokens_decoder()) == repr(theirs.added_tokens_decoder)


@pytest.mark.parametrize("size", [3, 100])
@pytest.mark.parametrize("setting", ["truncation", "padding", "both"])
def test_truncation_and_padding_of_the_training_are_ignored(tmp_path, setting, size):
    transformers = pytest.importorskip("transformers")
    tokenizer = byte_tokenizer()
    if setting != "padding":
        tokenizer.enable_truncation(16)
    if setting != "truncation":
        tokenizer.enable_padding(length=32, pad_id=258, pad_token="<pad>")
    write(tmp_path, tokenizer, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"})
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)("x" * size).input_ids
    assert len(expected) == size
    assert load_tokenizer(tmp_path).encode("x" * size).ids == expected


def test_dropout_of_the_training_is_ignored(tmp_path):
    alphabet = {c: i for i, c in enumerate("abcd")} | {"ab": 4, "cd": 5, "abcd": 6}
    tokenizer = Tokenizer(models.BPE(alphabet, [("a", "b"), ("c", "d"), ("ab", "cd")], dropout=0.9))
    assert any(tokenizer.encode("abcd").ids != [6] for _ in range(20))
    loaded = load_tokenizer(write(tmp_path, tokenizer))
    assert all(loaded.encode("abcd").ids == [6] for _ in range(20))


@pytest.mark.parametrize(
    ("stem", "values"),
    [
        ("tokenizer_config", {"bos_token": 7}),
        ("tokenizer_config", {"add_bos_token": "yes"}),
        ("tokenizer_config", {"split_special_tokens": 1}),
        ("tokenizer_config", {"eos_token": {"lstrip": True}}),
        ("tokenizer_config", {"eos_token": {"content": "x", "lstrip": 1}}),
        ("tokenizer_config", {"added_tokens_decoder": ["<s>"]}),
        ("tokenizer_config", {"added_tokens_decoder": {"first": token("<s>")}}),
        ("tokenizer_config", {"added_tokens_decoder": {"1": 1}}),
        ("tokenizer_config", {"additional_special_tokens": "<s>"}),
        ("tokenizer_config", {"additional_special_tokens": [1]}),
        ("special_tokens_map", {"bos_token": [1]}),
        ("added_tokens", {"<x>": "first"}),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, stem, values):
    with pytest.raises(RiverError, match=f"{stem}.json: "):
        load_tokenizer(write(tmp_path, **{stem: values}))


# --- hostile files --------------------------------------------------------------------------------------


def nested(count: int, pattern="a", content="a" * 10) -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Replace(pattern, content)] * count)


def changed(tokenizer: Tokenizer, **changes) -> str:
    return json.dumps(json.loads(tokenizer.to_str()) | changes)


def bpe(**changes) -> str:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]} | changes
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model})


def with_part(name: str, part) -> str:
    tokenizer = byte_tokenizer()
    setattr(tokenizer, name, part)
    return tokenizer.to_str()


TWELVE_DECODERS = decoders.Sequence([decoders.Replace("a", "a" * 10)] * 12)
GROWING = {
    "replacements that multiply": with_part("normalizer", nested(12)),
    "of what no sample has": with_part("normalizer", nested(12, "\u0436\u0437", "\u0436\u0437" * 10)),
    "of nothing": with_part("normalizer", nested(12, Regex("(?=[\u0436-\u0437]?)"), "\u0436")),
    "in the decoder": with_part("decoder", TWELVE_DECODERS),
}
HOSTILE = GROWING | {
    "no JSON": "{",
    "empty": "",
    "a list": "[]",
    "no model": json.dumps({"version": "1.0"}),
    "deep": "[" * 100_000,
    "a prefix that is longer than a piece": bpe(continuing_subword_prefix="xyz"),
    "a prefix that cuts a character": bpe(
        vocab={"a": 0, "é": 1, "a\ufffd": 2}, merges=[["a", "é"]], continuing_subword_prefix="x"
    ),
    "an expression that backtracks": with_part(
        "pre_tokenizer", pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    ),
    "a template of many copies": changed(
        byte_tokenizer(),
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 300,
            "pair": [{"Sequence": {"id": which, "type_id": 0}} for which in "AB"],
            "special_tokens": {},
        },
    ),
}  # fmt: skip


def test_replacements_that_are_usual_are_accepted(tmp_path):
    usual = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581"), normalizers.NFKC()]
    usual += [normalizers.Replace(Regex("[0-9]"), "#")] * 12 + [normalizers.Replace("``", '"')] * 12
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizers.Sequence(usual)
    assert load_tokenizer(write(tmp_path, tokenizer)).encode("hi 12").ids == tokenizer.encode("hi 12").ids


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line(tmp_path, name):
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_text(HOSTILE[name])
    start = time.perf_counter()
    with pytest.raises(RiverError, match="tokenizer.json: not a tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert ("characters of one; accepted: 100" in str(caught.value)) == (name in GROWING)
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [("CPU_SECONDS", 1, "ends the process by signal"), ("MEMORY", 64 << 20, "signal|fails|emory|allocate")],
)
def test_the_trial_has_limits(tmp_path, monkeypatch, limit, value, message):
    """A file that outlasts or outgrows them, in a script with tighter ones."""
    source = Path(tokenizer_trial.__file__).read_text()
    lines = [f"{limit} = {value}" if line.startswith(f"{limit} =") else line for line in source.splitlines()]
    script = tmp_path / "trial.py"
    script.write_text("\n".join(lines))
    monkeypatch.setattr(tokenizer_trial, "__file__", str(script))
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("qq", "qq")] * 5000)
    document = json.loads(tokenizer.to_str())
    document["model"]["vocab"] |= {f"{i:x}": i for i in range(300_000)}
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(RiverError, match=message):
        load_tokenizer(tmp_path)


def test_a_trial_leaves_no_process_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "WALL_SECONDS", 0.01)
    with pytest.raises(RiverError, match="takes more than 0.01 s"):
        load_tokenizer(write(tmp_path))
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert not any("tokenizer_trial" in Path(f"/proc/{c}/cmdline").read_text() for c in children)


VALUES = [
    *(None, True, 0, -1, 2**32, 10**19, 1.5, "", "x", "\u2581", "(", "(a+)+$", [], {}, ["a", "b"]),
    *({"String": "a"}, {"Regex": "a*"}, {"Fixed": 10**10}, "Right", "ByteLevel", "Sequence", "Replace"),
]


def places(value, path=()) -> list[tuple]:
    """The paths to values in JSON, but for most of a vocabulary."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = [place for key, item in list(items)[:12] for place in places(item, (*path, key))]
    return [path, *below] if path else below


@pytest.mark.parametrize("seed", range(60))
def test_changed_files_are_refused_or_work(tmp_path, seed):
    rng = random.Random(seed)
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("x", "y")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.enable_padding()
    document = json.loads(tokenizer.to_str())
    for _ in range(rng.choice([1, 1, 2])):
        *path, key = rng.choice(places(document))
        parent = document
        for step in path:
            parent = parent[step]
        if isinstance(parent, list) and rng.random() < 0.3:
            parent.extend([parent[key]] * 12)
        else:
            parent[key] = rng.choice(VALUES)
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    try:
        text = Text(load_tokenizer(tmp_path), ModelConfig(**CONFIG), tmp_path)
        assert isinstance(text.decode(text.encode(HELLO * 20)), str)
    except RiverError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
