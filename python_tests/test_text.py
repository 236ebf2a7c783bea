"""Tokens to text piece by piece, and how a prompt starts."""

import json

import pytest
from tiny_model import CONFIG, demo_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from river_ext.config import ModelConfig
from river_ext.stop_strings import StopStrings
from river_ext.text import Text, TextStream


def byte_tokenizer() -> Tokenizer:
    """Ids 0..255 are the bytes in the order of their characters; 256 is <s>, 257 </s>."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """Words carry their leading space as in Llama 2, and a decoder that strips the first one."""
    words = ["<unk>", "\u2581Hello", "\u2581world", "!", "\u2581"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def config(bos):
    return ModelConfig(**(CONFIG | {"vocab_size": 300, "bos_token_id": bos}))


def text_of(tokenizer, bos=None, directory=None):
    return Text(tokenizer, config(bos), directory)


def pieces(text, tokens, prompt=(), stop=()):
    """What each token adds, then what `finish` adds."""
    stream = TextStream(text, list(prompt), StopStrings(stop))
    out = []
    for token in tokens:
        out.append(stream.feed(token))
        if stream.stopped:
            return out, True
    return [*out, stream.finish()], stream.stopped


def test_characters_come_with_their_last_byte():
    text = text_of(byte_tokenizer())
    tokens = text.encode("aé€😀b")
    assert len(tokens) == 1 + 2 + 3 + 4 + 1
    assert pieces(text, tokens)[0] == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_an_unfinished_character_at_the_end_is_shown_as_such():
    text = text_of(byte_tokenizer())
    assert pieces(text, text.encode("a😀")[:-1])[0] == ["a", "", "", "", "\ufffd"]


def test_invalid_bytes_do_not_swallow_what_follows():
    text = text_of(byte_tokenizer())
    euro = text.encode("€")
    tokens = [*euro[:2], *text.encode("x"), *euro, euro[1], *text.encode("y")]
    out, _ = pieces(text, tokens)
    assert "".join(out) == text.decode(tokens) == "\ufffdx€\ufffdy"


def test_any_tokens_stream_to_their_text():
    text = demo_model().text
    tokens = [(i * i * 31 + 7 * i) % demo_model().config.vocab_size for i in range(300)]
    assert "".join(pieces(text, tokens)[0]) == text.decode(tokens)


def test_a_prompt_may_end_inside_a_character():
    text = text_of(byte_tokenizer())
    tokens = text.encode("a€b")
    assert pieces(text, tokens[3:], prompt=tokens[:3])[0] == ["€", "b", ""]


def test_special_tokens_are_no_text():
    text = text_of(byte_tokenizer())
    assert pieces(text, [256, *text.encode("a"), 257, *text.encode("b"), 257])[0] == [
        "",
        "a",
        "",
        "b",
        "",
        "",
    ]


def test_leading_space_of_the_first_new_word():
    text = text_of(sentencepiece_like())
    assert pieces(text, [2, 3], prompt=[1])[0] == [" world", "!", ""]
    assert pieces(text, [1, 2])[0] == ["Hello", " world", ""]


@pytest.mark.parametrize(
    ("stop", "expected", "stopped"),
    [
        ((), "one two three", False),
        (("two",), "one ", True),
        (("wo t",), "one t", True),
        (("three", "two"), "one ", True),
        (("one",), "", True),
        (("threes", "eek"), "one two three", False),
        (("e three", "ne"), "o", True),
    ],
)
def test_stop_strings_cut_the_text(stop, expected, stopped):
    text = text_of(byte_tokenizer())
    out, was_stopped = pieces(text, text.encode("one two three"), stop=stop)
    assert ("".join(out), was_stopped) == (expected, stopped)


def test_of_two_stop_strings_in_one_token_the_first_one_cuts():
    text = text_of(sentencepiece_like())
    for stop in (("lo", "el"), ("el", "lo")):
        assert pieces(text, [1, 2], stop=stop) == (["H"], True)


def test_a_possible_stop_string_is_held_back():
    text = text_of(byte_tokenizer())
    out, _ = pieces(text, text.encode("abcabd!"), stop=("abd", "c!"))
    assert out == ["", "", "ab", "c", "", ""]
    out, stopped = pieces(text, text.encode("ab"), stop=("abc",))
    assert (out, stopped) == (["", "", "ab"], False)


def test_the_stop_string_is_not_sought_in_the_prompt():
    text = text_of(byte_tokenizer())
    assert pieces(text, text.encode("bc"), prompt=text.encode("a"), stop=("ab",))[0] == ["b", "c", ""]


def test_bos_without_a_post_processor():
    assert text_of(byte_tokenizer(), bos=256).encode("a")[0] == 256
    assert text_of(byte_tokenizer(), bos=256).encode("<s>a").count(256) == 1
    assert 256 not in text_of(byte_tokenizer()).encode("a")


def test_the_post_processor_decides_about_bos():
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # as Qwen's: adds nothing
    assert 256 not in text_of(tokenizer, bos=256).encode("a")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    assert text_of(tokenizer, bos=256).encode("a").count(256) == 1
    assert text_of(tokenizer).encode("a").count(256) == 1


@pytest.mark.parametrize("add", [True, False, None])
def test_tokenizer_config_decides_about_bos(tmp_path, add):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": add}))
    tokenizer = byte_tokenizer()
    assert (256 in text_of(tokenizer, 256, tmp_path).encode("a")) == (add is not False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert (256 in text_of(tokenizer, 256, tmp_path).encode("a")) == (add is True)


def test_demo_prompts_start_with_the_document_separator():
    tokens = demo_model().text.encode("Question: x")
    assert tokens[0] == demo_model().config.bos_token_id == 0
    assert demo_model().text.decode(tokens) == "Question: x"
