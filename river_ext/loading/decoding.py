"""Pieces of a vocabulary to text, and which of it is certain before the next piece is known."""

import codecs
import re
from functools import cache

from tokenizers import Tokenizer

from ..errors import RiverError
from .tokenizer_trial import complaint_of, stages

NO_CHARACTER = "\ufffd"  # what bytes become that are no character
BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
JOINING = ("Fuse", "ByteLevel")  # steps that make one piece of all
LOCAL_BEHIND_JOINING = ("Fuse", "Strip", "Metaspace")
LOCAL = (*LOCAL_BEHIND_JOINING, "ByteLevel", "ByteFallback", "BPEDecoder", "WordPiece", "CTC", "Replace")
REACH = 8  # pieces; a character may be spread over four


class Decoder:
    """What a tokenizer's own decoder makes of pieces, but for bad bytes among byte pieces, <0x00> to <0xFF>.

    There the library gives up the whole characters around a bad byte as well, which are long in the text.
    Here each bad byte is one U+FFFD. `settle` tells the byte pieces that are certain from those that wait.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decoder = tokenizer.decoder
        try:
            steps = stages(self._decoder)
        except Exception:  # written in Python, it cannot be looked into
            steps = [{"type": "Custom"}]
        kinds = [step["type"] for step in steps]
        self._byte_pieces, self._byte_level = "ByteFallback" in kinds, "ByteLevel" in kinds
        stripped = sum(step["start"] for step in steps if step["type"] == "Strip")
        # how many pieces before it may change what a piece adds to the text; None: all, and later ones too
        self.context = REACH + stripped if _is_local(steps) else None

    def text(self, settled: list[str], waiting: list[str]) -> str:
        """The text if no more pieces come."""
        pieces = settled + [NO_CHARACTER] * len(waiting)
        if self._decoder is None or not pieces:
            return " ".join(pieces)
        try:
            return self._decoder.decode(pieces)
        except BaseException as error:
            raise RiverError(f"the tokenizer cannot decode tokens ({complaint_of(error)[:160]})") from None

    def settle(self, pieces: list[str]) -> tuple[list[str], list[str]]:
        """The pieces that are certain, bad bytes replaced, and the byte pieces of an unfinished character."""
        if not self._byte_pieces:
            return pieces, []
        settled, waiting = [], []
        for piece in pieces:
            if not BYTE_PIECE.fullmatch(piece):
                settled += [NO_CHARACTER] * len(waiting) + [piece]
                waiting = []
                continue
            waiting.append(piece)
            while waiting:
                state = _first_character(bytes(int(byte[3:5], 16) for byte in waiting))
                if state == "unfinished":
                    break
                settled += waiting if state == "whole" else [NO_CHARACTER]
                waiting = [] if state == "whole" else waiting[1:]
        return settled, waiting

    def unfinished(self, settled: list[str], text: str) -> int:
        """Characters at the end of the pieces' text that stand for an unfinished one."""
        if not self._byte_level or not text.endswith(NO_CHARACTER):
            return 0
        reader = codecs.getincrementaldecoder("utf-8")("replace")
        reader.decode(b"".join(map(_byte_level_bytes, settled[-REACH:])))
        return 1 if reader.getstate()[0] else 0


def _is_local(steps: list[dict]) -> bool:
    """Whether text that is there stays as it is when pieces are added, and depends on near ones only.

    Not so where a step looks for several characters in the text of several pieces.
    """
    joined = False
    for step in steps:
        kind = step["type"]
        replaces_one = kind == "Replace" and len(step["pattern"].get("String", "")) == 1
        if kind not in (LOCAL_BEHIND_JOINING if joined else LOCAL) and not replaces_one:
            return False
        joined |= kind in JOINING
    return True


def _first_character(data: bytes) -> str:
    """Bytes are a "whole" character, an "unfinished" one, or the first of them is "bad"."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return "unfinished" if error.reason == "unexpected end of data" else "bad"
    return "whole"


def _byte_level_bytes(piece: str) -> bytes:
    table = _byte_level_table()
    return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()


@cache
def _byte_level_table() -> dict[str, int]:
    """What byte each character stands for: printable Latin-1 for itself, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
