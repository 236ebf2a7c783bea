"""Streams against whole decodes, by the tokenizers library itself, for every kind of decoder."""

import os
import random
import time

import pytest
from tiny_model import CONFIG
from tokenizers import Regex, Tokenizer, decoders, models

from river_ext.loading.config import ModelConfig
from river_ext.loading.decoding import Decoder, _byte_level_table
from river_ext.loading.text import Text, TextStream

BYTES = {byte: character for character, byte in _byte_level_table().items()}
PIECES = ["a", "b", "ab", "ba", " ", "  ", "\u2581", "\u2581a", "\u2581\u2581b", "##a", "##b", "a</w>",
          "b</w>", "n't", ".", "?", "|", "<pad>", "\ufffd", "é", "中", "😀", "</w>", "x\u2581"]  # fmt: skip
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_pieces() -> list[str]:
    """Single bytes, and byte strings that begin and end anywhere in characters."""
    text = "é€😀 中ab\ufffd".encode()
    parts = [text[i:j] for i in range(len(text)) for j in range(i + 2, min(i + 6, len(text)))]
    return [BYTES[byte] for byte in range(256)] + ["".join(BYTES[byte] for byte in part) for part in parts]


CHAIN = decoders.Sequence
LLAMA = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
# name: (pieces of the vocabulary, decoder)
FAMILIES = {
    "byte level": (byte_pieces(), decoders.ByteLevel()),
    "byte level, stripped": (byte_pieces(), CHAIN([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])),
    "byte fallback": (PIECES + FALLBACK, CHAIN(LLAMA)),
    "byte fallback, nothing stripped": (PIECES + FALLBACK, CHAIN(LLAMA[:3])),
    "byte fallback alone": (PIECES + FALLBACK, decoders.ByteFallback()),
    "twelve spaces stripped": (PIECES, CHAIN([decoders.Fuse(), decoders.Strip(" ", 12, 0)])),
    "metaspace": (PIECES, decoders.Metaspace()),
    "metaspace, never": (PIECES, decoders.Metaspace(prepend_scheme="never")),
    "word pieces": (PIECES, decoders.WordPiece(cleanup=True)),
    "suffixes": (PIECES, decoders.BPEDecoder("</w>")),
    "ctc": (PIECES, decoders.CTC("<pad>", "|", True)),
    "nested": (PIECES, CHAIN([CHAIN([decoders.Replace("a", "c")]), decoders.Fuse()])),
    "none": (PIECES, None),
    "pairs replaced": (PIECES, CHAIN([decoders.Fuse(), decoders.Replace("ab", "X")])),
    "expressions too": (PIECES, CHAIN([decoders.Fuse(), decoders.Replace(Regex("b.a?"), "<>")])),
}  # fmt: skip
NOT_LOCAL = ("pairs replaced", "expressions too")


def text_of(name) -> Text:
    pieces, decoder = FAMILIES[name]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0]))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "<|end|>"])
    tokenizer.add_tokens(["<think>"])
    return Text(tokenizer, ModelConfig(**CONFIG))


def random_tokens(rng: random.Random, text: Text, count: int) -> list[int]:
    """Any tokens, runs of byte tokens among them that are text as a rule, now and then with a wrong byte."""
    tokens, size = [], text.tokenizer.get_vocab_size()
    firsts = [f for f in map(text.tokenizer.token_to_id, (FALLBACK[0], BYTES[0])) if f is not None]
    while len(tokens) < count:
        if firsts and rng.random() < 0.5:
            data = bytearray("".join(rng.choices("é€😀中a\ufffd ", k=rng.randrange(1, 12))).encode())
            if rng.random() < 0.4:
                data[rng.randrange(len(data))] = rng.randrange(256)
            tokens += [firsts[0] + byte for byte in data]
        if rng.random() < 0.1:
            tokens += [rng.randrange(size)] * rng.randrange(30)
        tokens += [rng.randrange(size + 3) for _ in range(rng.randrange(6))]  # ids without a token, too
    return tokens[:count]


def whole_decode(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The library's, but for byte tokens: those that are no character become the token U+FFFD, one each."""
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    tokens, repaired = [t for t in tokens if t not in special and tokenizer.id_to_token(t) is not None], []
    if "ByteFallback" not in repr(tokenizer.decoder):
        return tokenizer.decode(tokens)
    while tokens:
        for length in (1, 2, 3, 4):
            names = list(map(tokenizer.id_to_token, tokens[:length]))
            if names[0] not in FALLBACK:
                good = True
                break
            try:
                bytes(FALLBACK.index(name) for name in names).decode()
                good = True
                break
            except ValueError:
                good = False
        repaired += tokens[:length] if good else [tokenizer.token_to_id("\ufffd")]
        tokens = tokens[length:] if good else tokens[1:]
    return tokenizer.decode(repaired)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stream_is_the_whole_text_minus_the_prompts(name):
    text, rng = text_of(name), random.Random(name)
    for _ in range(300):
        prompt = random_tokens(rng, text, rng.choice([0, 1, 2, 5, 9, 30]))
        tokens = random_tokens(rng, text, rng.choice([1, 2, 5, 40]))
        whole, before = (whole_decode(text.tokenizer, part) for part in (prompt + tokens, prompt))
        assert text.decode(prompt + tokens) == whole
        stream = TextStream(text, prompt)
        pieces = [stream.feed(token) for token in tokens] + [stream.finish()]
        assert "".join(pieces) == whole[len(os.path.commonprefix([whole, before])) :], (prompt, tokens)
        assert name in NOT_LOCAL or len(pieces[-1]) <= 4, "only an unfinished character may be held back"


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NOT_LOCAL])
def test_a_token_costs_the_same_anywhere(monkeypatch, name):
    decoded = []
    decode = Decoder.text
    monkeypatch.setattr(
        Decoder, "text", lambda self, a, b: decoded.append(len(a) + len(b)) or decode(self, a, b)
    )
    text, rng = text_of(name), random.Random(1)
    tokens = random_tokens(rng, text, 4000)
    stream, start = TextStream(text, tokens[:2000]), time.perf_counter()
    for token in tokens[2000:]:
        stream.feed(token)
    print(f"{name}: {1e6 * (time.perf_counter() - start) / 2000:.0f} us per token")
    assert max(decoded) <= 60 and len(decoded) <= 2 * len(tokens)


@pytest.mark.parametrize("name", ["byte fallback", "byte level"])
def test_characters_are_certain_before_a_bad_byte(name):
    text = text_of(name)
    first = text.tokenizer.token_to_id(FALLBACK[0] if name == "byte fallback" else BYTES[0])
    bad = [first + byte for byte in (*"日".encode(), 0xE6, *b"x", 0xFF, *"\ufffd".encode(), 0xE6)]
    stream = TextStream(text, [])
    pieces = [stream.feed(token) for token in bad] + [stream.finish()]
    assert pieces == ["", "", "日", "", "\ufffdx", "\ufffd", "", "", "\ufffd", "", "\ufffd"]
