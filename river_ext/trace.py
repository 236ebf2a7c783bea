"""Exit traces: at which depth each token left the backbone, as JSON or as an HTML page to look at.

    out = model.generate(prompt, threshold=0.9)
    trace = river_ext.trace.exit_trace(model, prompt, out)
    river_ext.trace.write(trace, "trace.html")

The page is one file. It loads nothing, and its policy forbids every script but its own.
"""

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from .checks import short
from .engine.prompt import prompt_list, prompt_tokens
from .engine.sequence import GenerationOutput
from .errors import RiverError
from .loading.files import path_of
from .loading.text import Text, TextStream
from .model import DEMO, Model

TEMPLATE = Path(__file__).with_suffix(".html")
ENDS = "ends in .html or .json"
DIGITS = 6  # of a similarity, behind the point


def exit_trace(
    model: Model,
    prompt: str | Sequence,
    output: GenerationOutput | Sequence[GenerationOutput],
    options: Mapping | None = None,
) -> dict:
    """What `write` writes and `json.dumps` takes.

    `texts` has an entry for each prompt; its `pieces` are the new tokens in order: a piece has a `text` and
    one or more `tokens`, several where a character is spread over them. Each token has its `id`,
    `exit_depth`, `drafted` (an accepted draft) and `similarities`, of the backbone layers that ran.

    Args:
        prompt, output: what `Model.generate` took and what it returned; of one prompt, or lists.
        options: the keyword arguments that it took, to be shown beside the text.
    """
    prompts, many = prompt_list(prompt)
    outputs = [output] if isinstance(output, GenerationOutput) else output
    if not isinstance(outputs, (list, tuple)) or not all(isinstance(o, GenerationOutput) for o in outputs):
        raise RiverError(f"output is {short(output)}; accepted: what generate returned for the prompts")
    if len(outputs) != len(prompts):
        raise RiverError(f"{len(outputs)} outputs of {len(prompts)} prompts; accepted: one for each prompt")
    return {
        "model": _name_of(model),
        "layers": model.config.num_hidden_layers,
        "options": _plain(options or {}),
        "texts": [_entry(model, *pair) for pair in zip(prompts, outputs, strict=True)],
    }


def _name_of(model: Model) -> str:
    """Without the folders above it, which are nobody's concern who gets the page."""
    if model.directory is None:
        return ""
    return "the bundled model" if model.directory == DEMO else model.directory.resolve().name


def _plain(value):
    """For JSON, which has no infinities: they become text, like all else that it lacks."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    known = isinstance(value, (str, int, float, type(None)))
    return value if known and not (isinstance(value, float) and not math.isfinite(value)) else str(value)


def _entry(model: Model, prompt, output: GenerationOutput) -> dict:
    before = prompt_tokens(model.config, model.text, prompt)
    tokens = zip(output.tokens, output.exit_depths, output.drafted, output.similarities, strict=True)
    facts = (
        {
            "id": token,
            "exit_depth": depth,
            "drafted": drafted,
            "similarities": [round(similarity, DIGITS) for similarity in similarities],
        }
        for token, depth, drafted, similarities in tokens
    )
    return {
        "prompt": "".join(piece.text for piece in _pieces(model.text, [], before)),
        "text": output.text,
        "pieces": [
            {
                "text": piece.text,
                "special": piece.special,
                "tokens": [next(facts) for _ in range(piece.tokens)],
            }
            for piece in _pieces(model.text, before, output.tokens)
        ],
        "finish_reason": output.finish_reason,
        "error": output.error,
        "stats": output.stats.to_dict(),
    }


# --- tokens to pieces of text ---------------------------------------------------------------------------


class _Piece(NamedTuple):
    text: str
    special: bool  # no text, but the name of a token
    tokens: int


def _pieces(text: Text | None, before: list[int], tokens: list[int]) -> Iterator[_Piece]:
    """The text that tokens add to those before them, in pieces that are whole characters."""
    start = 0
    for is_text, run in groupby(tokens, lambda token: not _name_of_special(text, token)):
        run = list(run)
        if is_text:
            yield from _text_pieces(TextStream(text, before + tokens[:start]), run)
        else:
            yield from (_Piece(_name_of_special(text, token), True, 1) for token in run)
        start += len(run)


def _name_of_special(text: Text | None, token: int) -> str:
    """Of a special token, or of one that has no text; "" for all others."""
    if text is None or text.tokenizer.id_to_token(token) is None:
        return f"[{token}]"
    return text.special(token)


def _text_pieces(stream: TextStream, tokens: list[int]) -> list[_Piece]:
    pieces, waiting = [], 0
    for token in tokens:
        waiting += 1
        if added := stream.feed(token):
            pieces.append(_Piece(added, False, waiting))
            waiting = 0
    rest = stream.finish()  # what an unfinished character becomes
    if waiting:
        pieces.append(_Piece(rest, False, waiting))
    elif rest:
        pieces[-1] = pieces[-1]._replace(text=pieces[-1].text + rest)
    return pieces


# --- files ----------------------------------------------------------------------------------------------


def write(trace: dict, path: str | Path) -> None:
    """Writes a page where the path ends in .html, JSON where it ends in .json: whole, or not at all."""
    path = check_path(path)
    text = _page(trace) if path.suffix == ".html" else json.dumps(trace, allow_nan=False) + "\n"
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        raise RiverError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):  # it has become the file, or could not be written
            scratch.unlink()


def check_path(path: str | Path) -> Path:
    """Where `write` would write, or a RiverError."""
    path = Path(os.path.realpath(path_of(path, "trace", f"the path of a file that {ENDS}")))
    if path.suffix not in (".html", ".json"):
        raise RiverError(f"{path}: no trace has this name; accepted: one that {ENDS}")
    if os.path.exists(path) and not os.path.isfile(path):  # False of a name that is too long
        raise RiverError(f"{path}: exists and is no file; accepted: a new file, or one to replace")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise RiverError(f"{path}: cannot be written, {path.parent} is no directory that can be written to")
    return path


def _page(trace: dict) -> str:
    template = TEMPLATE.read_text(encoding="utf-8")
    # ASCII alone, and "<" escaped as well: no text can end the element that holds it
    data = json.dumps(trace, allow_nan=False).replace("<", "\\u003c")
    head, tail = template.replace("{policy}", policy_of(template)).split("{trace}")
    return head + data + tail


def policy_of(page: str) -> str:
    """A Content-Security-Policy that allows a page its own script and its own style, and nothing else."""
    own = [f"{kind}-src {_hash_of(kind, page)}" for kind in ("script", "style")]
    return "; ".join(["default-src 'none'", *own, "base-uri 'none'", "form-action 'none'"])


def _hash_of(kind: str, template: str) -> str:
    """Of the one element of a kind that has no attributes, as a policy names it."""
    (content,) = re.findall(f"<{kind}>(.*?)</{kind}>", template, re.S)
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"
