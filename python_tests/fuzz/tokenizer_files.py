"""tokenizer.json and the files beside it, changed: refused, or text comes in pieces as it comes whole."""

import json
import shutil
from pathlib import Path
from random import Random

from . import ACCEPTED, REFUSED, expect, expect_one_line
from .checkpoints import replace_file
from .mutate import HOSTILE, dump_json, mutate_bytes, mutate_json
from .samples import TOKENIZERS, VOCAB_SIZE, random_text, write_checkpoint

COMPONENTS = {
    "normalizer": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaaaaaaaa"}, {"type": "Replace",
        "pattern": {"Regex": "(a+)+$"}, "content": "b"}, {"type": "Replace", "pattern": {"Regex": ""},
        "content": "xxxx"}, {"type": "Prepend", "prepend": "x" * 1000}, {"type": "NFKC"}, {"type":
        "Lowercase"}, {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Strip",
        "strip_left": True, "strip_right": True},

    ],
    "pre_tokenizer": [
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}, {"type":
        "Split", "pattern": {"Regex": "(.*)*x"}, "behavior": "Removed", "invert": True}, {"type": "Digits",
        "individual_digits": True}, {"type": "Whitespace"}, {"type": "Metaspace", "replacement": "\u2581",
        "prepend_scheme": "always", "split": True}, {"type": "CharDelimiterSplit", "delimiter": "a"},
        {"type": "FixedLength", "length": 0},

    ],
    "decoder": [
        {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 10**12,
        "stop": 3}, {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 5000}, {"type":
        "BPEDecoder", "suffix": "</w>"}, {"type": "CTC", "pad_token": "a", "word_delimiter_token": "b",
        "cleanup": True}, {"type": "WordPiece", "prefix": "##", "cleanup": True}, {"type": "Metaspace",
        "replacement": "\u2581", "prepend_scheme": "always", "split": True},

    ],
    "post_processor": [
        {"type": "BertProcessing", "sep": ["x", 10**9], "cls": ["y", 2]}, {"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 50, "pair": [], "special_tokens":
        {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},

    ],
    "truncation": [{"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}],
    "padding": [
        {"strategy": {"Fixed": size}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "a"} for size in (16, 10**10)

    ],
}  # fmt: skip


class State:
    def __init__(self, folder: Path):
        self.starts = [write_checkpoint(folder / f"start{i}", make()) for i, make in enumerate(TOKENIZERS)]
        self.work = folder / "work"


def prepare(folder: Path) -> State:
    return State(folder)


def attempt(state: State, random: Random) -> str:
    import river_ext

    shutil.rmtree(state.work, ignore_errors=True)
    shutil.copytree(random.choice(state.starts), state.work)
    change(state.work, random)
    try:
        model = river_ext.load(state.work, device="cpu")
        if model.text is None:
            expect(not (state.work / "tokenizer.json").exists(), "a tokenizer that is not used")
            return ACCEPTED
        text = random_text(random)
        tokens = model.text.encode(text)
        expect(all(isinstance(token, int) for token in tokens), f"tokens {tokens}")
        check_stream(
            model.text, tokens, [random.randrange(VOCAB_SIZE) for _ in range(random.choice((1, 5, 40)))]
        )
        if tokens and len(tokens) < 60 and max(tokens) < VOCAB_SIZE:
            stop = random.choice(((), "e", ("zz", "</s>"), "<|im_end|>"))
            output = model.generate(text, max_new_tokens=3, stop=stop)
            expect(
                output.stats.prompt_tokens == len(tokens), f"a prompt of {output.stats.prompt_tokens} tokens"
            )
    except river_ext.RiverError as error:
        expect_one_line(error)
        return REFUSED
    return ACCEPTED


def check_stream(text, prompt: list[int], new: list[int]) -> None:
    """The text of new tokens is that of all tokens less that of the prompt."""
    from river_ext.loading.text import TextStream

    stream = TextStream(text, prompt)
    pieces = "".join([*map(stream.feed, new), stream.finish()])
    whole, start = text.decode(prompt + new), text.decode(prompt)
    if whole.startswith(start) and "\ufffd" not in start:  # else new tokens have changed what was there
        expect(pieces == whole[len(start) :], f"{pieces!r} in pieces, {whole[len(start) :]!r} whole")


def change(work: Path, random: Random) -> None:
    path = work / random.choice(("tokenizer.json",) * 4 + ("tokenizer_config.json",))
    document, kind = json.loads(path.read_text()), random.randrange(10)
    if kind == 0:
        replace_file(random, path)
    elif kind == 1:
        path.write_bytes(mutate_bytes(random, path.read_bytes()))
    elif kind == 2:
        name = random.choice(("special_tokens_map.json", "added_tokens.json", "generation_config.json"))
        beside = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "</x>": 300, "eos_token_id": [2, 3]}
        (work / name).write_bytes(dump_json(random, mutate_json(random, beside)))
    elif kind < 7 and path.name == "tokenizer.json":
        part = random.choice(list(COMPONENTS))
        chosen = random.choices(COMPONENTS[part], k=random.choice((1, 2, 12)))
        wrapped = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
        if part in wrapped and (len(chosen) > 1 or random.random() < 0.5):
            document[part] = {"type": "Sequence", wrapped[part]: chosen}
        else:
            document[part] = chosen[0]
        path.write_bytes(dump_json(random, document))
    elif kind < 8 and path.name == "tokenizer.json":
        key = random.choice((
            "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
            "ignore_merges", "merges", "vocab", "type"
))  # fmt: skip
        document["model"][key] = random.choice([*HOSTILE, "x", [["a", "b"]], {"a": 0, "b": 10**9}])
        path.write_bytes(dump_json(random, document))
    else:
        path.write_bytes(dump_json(random, mutate_json(random, document)))
