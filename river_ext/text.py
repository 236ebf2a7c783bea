"""Text to tokens and back, a token at a time."""

from pathlib import Path

from tokenizers import Tokenizer

from .config import ModelConfig, read_json_object
from .errors import RiverError

CONTEXT = 8  # prompt tokens that the first new tokens are decoded behind
UNFINISHED = "\ufffd"  # what a decoder puts in place of a character whose bytes are not all there


class Text:
    """A checkpoint's tokenizer. `encode` starts with bos where the checkpoint says so.

    The tokenizer's own post-processor comes first, then `add_bos_token` of tokenizer_config.json; a tokenizer
    that has neither gets config.json's bos, if there is one.
    """

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, directory: Path | None = None):
        self.tokenizer = tokenizer
        path = directory / "tokenizer_config.json" if directory else None
        settings = read_json_object(path) if path and path.is_file() else {}
        add_bos = settings.get("add_bos_token")
        if add_bos is None:
            add_bos = tokenizer.post_processor is None
        self._bos = [config.bos_token_id] if add_bos and config.bos_token_id is not None else []

    def encode(self, text: str) -> list[int]:
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise RiverError(
                "the text holds a lone surrogate, bytes that are not UTF-8; accepted: Unicode text"
            )
        tokens = self.tokenizer.encode(text).ids
        return tokens if tokens[:1] == self._bos else self._bos + tokens

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


class TextStream:
    """The text of new tokens as it becomes certain, cut before the first stop string.

    Two things are held back: tokens that end inside a character, and a tail that may become a stop string.
    """

    def __init__(self, text: Text, prompt: list[int], stop: tuple[str, ...] = ()):
        self.stopped = False
        self._text, self._stop = text, stop
        self._tokens = prompt[-CONTEXT:]
        self._held = ""
        # text of tokens [start, read) is known; what follows is decoded behind it
        self._start, self._read = 0, len(self._tokens)
        while self._read > 0 and text.decode(self._tokens[: self._read]).endswith(UNFINISHED):
            self._read -= 1

    def feed(self, token: int) -> str:
        """The text that this token makes certain, often its own."""
        self._tokens.append(token)
        known, new = self._decoded()
        if new.endswith(UNFINISHED) or len(new) <= len(known):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._release(new[len(known) :])

    def finish(self) -> str:
        """What was held back, when no token follows."""
        known, new = self._decoded()
        self._read = len(self._tokens)
        text = self._release(new[len(known) :]) + self._held
        self._held = ""
        return text

    def _decoded(self) -> tuple[str, str]:
        decode = self._text.decode
        return decode(self._tokens[self._start : self._read]), decode(self._tokens[self._start :])

    def _release(self, text: str) -> str:
        """Takes new text; returns what can no longer be part of a stop string."""
        text = self._held + text
        found = [place for place in map(text.find, self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))
