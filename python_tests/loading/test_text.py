"""Tokens to text piece by piece, and how a prompt starts."""

import json

import pytest
from tiny_model import CONFIG, demo_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from river_ext.errors import RiverError
from river_ext.loading.config import ModelConfig
from river_ext.loading.decoding import Decoder
from river_ext.loading.stop_strings import StopStrings
from river_ext.loading.text import Text, TextStream
from river_ext.loading.tokenizer import load_tokenizer


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


# --- special tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "tokens", "expected"),
    [
        (("</s>",), ["a", 257, "b"], "a"),
        (("b</s>",), ["a", "b", 257, "c"], "a"),
        (("</s>b",), ["a", 257, "b", "c"], "a"),
        (("b</s><s>c",), ["a", "b", 257, 256, "c"], "a"),
        (("b</s>c",), ["a", "b", 257, "d"], None),
        (("b</s>c",), ["a", "b", 257, 257, "c"], "a"),  # the second one is nothing
        (("abd", "b</s>d"), ["a", "b", 257, "c"], None),
        (("/s",), ["a", 257, "b"], None),  # a part of the name is no token
        (("</s>",), ["<", "/", "s", ">", "b"], ""),  # written out, it is text
        (("ab",), ["a", 257, "b"], ""),  # between two characters of the text is nothing
        (("b<s>", "bc"), ["a", "b", 257, "c"], "a"),
        ((">", "</s>c"), ["a", 257, "b"], None),
    ],
)
def test_stop_strings_with_special_tokens(stop, tokens, expected):
    text = text_of(byte_tokenizer())
    tokens = [token if isinstance(token, int) else text.encode(token)[0] for token in tokens]
    out, stopped = pieces(text, tokens, stop=stop)
    assert stopped == (expected is not None)
    assert "".join(out) == (expected if stopped else text.decode(tokens))


def test_text_before_an_unfinished_character_is_searched_at_once():
    """Two tokens of one text each: the second has the stop string and the first byte of a character."""
    tokenizer = Tokenizer(models.WordLevel({"ab": 0, "c!\u00e2": 1, "\u0124": 2}, unk_token="ab"))  # 2: 0x82
    tokenizer.decoder = decoders.ByteLevel()
    assert pieces(text_of(tokenizer), [0, 1, 2], stop=("bc",)) == (["a", ""], True)
    assert pieces(text_of(tokenizer), [0, 1, 2]) == (["ab", "c!", "", "\ufffd"], False)
    assert pieces(text_of(tokenizer), [0, 1], stop=("\ufffd",)) == (["ab", "c!", ""], True)


# --- how a prompt starts --------------------------------------------------------------------------------


def template(single="<s> $A"):
    return processors.TemplateProcessing(single, special_tokens=[("<s>", 256), ("</s>", 257)])


PROCESSORS = {
    "none": None,
    "byte level": processors.ByteLevel(trim_offsets=True),  # as Qwen's: adds nothing
    "bos": template(),
    "eos": template("$A </s>"),
    "both": template("<s> $A </s>"),
    "sequence": processors.Sequence([processors.ByteLevel(trim_offsets=False), template()]),  # as Llama 3's
}


@pytest.mark.parametrize("add", [True, False, None])
@pytest.mark.parametrize("name", PROCESSORS)
def test_the_post_processor_decides_about_bos(tmp_path, name, add):
    """As in transformers, but for files like DeepSeek's: add_bos_token beside one that adds nothing."""
    transformers = pytest.importorskip("transformers")
    tokenizer = byte_tokenizer()
    if PROCESSORS[name] is not None:
        tokenizer.post_processor = PROCESSORS[name]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {} if add is None else {"add_bos_token": add}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": 257}))
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)("hi").input_ids
    if add and name in ("none", "byte level"):
        expected = [256, *expected]
    assert text_of(load_tokenizer(tmp_path), 257, tmp_path).encode("hi") == expected


@pytest.mark.parametrize("name", PROCESSORS)
def test_bos_never_comes_twice(tmp_path, name):
    """A prompt from a chat template begins with it already."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": True}))
    tokenizer = byte_tokenizer()
    if PROCESSORS[name] is not None:
        tokenizer.post_processor = PROCESSORS[name]
    tokens = text_of(tokenizer, 257, tmp_path).encode("<s>hi<s>")
    assert tokens[:2] == [256, tokenizer.token_to_id("h")] and tokens.count(256) == 2


def test_config_json_alone_adds_no_bos():
    assert 256 not in text_of(byte_tokenizer(), bos=256).encode("a")


def test_demo_prompts_start_with_the_document_separator():
    tokens = demo_model().text.encode("Question: x")
    assert tokens[0] == demo_model().config.bos_token_id == 0
    assert demo_model().text.decode(tokens) == "Question: x"


# --- texts that are hard to take ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt", ["\0", "a\0b", "\uffff\ufdd0", "\u202e\u0301", "\ufeffa\r\n", "\U0010ffff"]
)
def test_any_characters_are_text(prompt):
    text = text_of(byte_tokenizer())
    assert text.decode(text.encode(prompt)) == prompt


def test_a_text_that_cannot_fit_is_not_even_encoded():
    text = text_of(byte_tokenizer())
    limit = 64 * config(None).max_length
    assert len(text.encode("x" * limit)) == limit
    with pytest.raises(RiverError, match=f"a text of {limit + 1} characters; accepted: at most {limit}"):
        text.encode("x" * (limit + 1))


class Panic(BaseException):
    """As the tokenizers library raises where its code fails."""


@pytest.mark.parametrize("error", [Panic("index out\nof bounds"), ValueError("no"), Panic()])
def test_errors_of_the_library_are_one_line(monkeypatch, error):
    class Broken:
        def __getattr__(self, name):
            raise error

    text = text_of(byte_tokenizer())
    text.tokenizer = text.decoder._decoder = Broken()
    with pytest.raises(RiverError, match="the tokenizer cannot encode the text") as caught:
        text.encode("a")
    assert "\n" not in str(caught.value)
    with pytest.raises(RiverError, match="the tokenizer cannot decode tokens"):
        text.decoder.text(["a"], [])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_are_no_errors_of_the_library(error):
    class Interrupted:
        def encode(self, text, **options):
            raise error

    text = text_of(byte_tokenizer())
    text.tokenizer = Interrupted()
    with pytest.raises(error):
        text.encode("a")


def test_a_decoder_that_fails_is_an_error():
    """One that fails on a user's tokens only: of the library, by a text that its trial does not have."""
    tokenizer = byte_tokenizer()
    tokenizer.decoder = decoders.Strip(" ", 0, 3)
    with pytest.raises(RiverError, match="the tokenizer cannot decode tokens"):
        Decoder(tokenizer).text([""], [])
