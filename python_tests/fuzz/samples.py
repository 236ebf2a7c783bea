"""Tiny checkpoints that inputs start from, with a tokenizer and all the files that stand beside one."""

import json
import sys
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "ops")]

VOCAB_SIZE = 320


def byte_tokenizer() -> Tokenizer:
    """Ids 0..255 are bytes, then a few merges and special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"th": 256, "he": 257, "an": 258}
    tokenizer = Tokenizer(models.BPE(vocab, [("t", "h"), ("h", "e"), ("a", "n")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 259)])
    return tokenizer


def fallback_tokenizer() -> Tokenizer:
    """Characters that are not in the vocabulary become tokens of their bytes, as in Llama 2."""
    words = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] + ["\u2581", "\u2581Hello", "!"]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def word_tokenizer() -> Tokenizer:
    """WordPiece, with its clean-up."""
    words = ["[UNK]", "hello", "##s", "wor", "##ld", ".", "'", "s", "n", "##t"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


TOKENIZERS = (byte_tokenizer, fallback_tokenizer, word_tokenizer)


def write_checkpoint(folder: Path, tokenizer: Tokenizer | None = None, **changes) -> Path:
    """model.safetensors, config.json, and with a tokenizer tokenizer.json and tokenizer_config.json."""
    from conftest import write_tiny_checkpoint

    sizes = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 2, "max_position_embeddings": 64}
    write_tiny_checkpoint(folder, **(sizes | changes))
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    return folder


def random_text(random: Random) -> str:
    alphabet = "abc the han Hello world \n\t<s></s>é€😀\u0301\u2581\x00\ufffd"
    return "".join(random.choice(alphabet) for _ in range(random.choice((0, 1, 3, 20))))
