"""A checkpoint's tokenizer: tokenizer.json, and what the files beside it change, as in transformers.

tokenizer_config.json adds tokens and names the special ones; where it lists no added tokens, the older
special_tokens_map.json and added_tokens.json do.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from ..errors import RiverError
from . import tokenizer_trial
from .files import is_regular, read_bytes
from .json_object import MAX_JSON_BYTES, read_json_object

NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
FLAGS = ("add_bos_token", "split_special_tokens")
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
WALL_SECONDS = 120  # for the trial; its processor time is limited more tightly
RUN_TRIAL = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory; None where it has no tokenizer.json."""
    path = directory / "tokenizer.json"
    if not is_regular(path):
        return None
    document = read_bytes(path, MAX_JSON_BYTES)
    settings = vars(TokenizerSettings.read(directory))
    complaint = _trial(document, settings)
    if not complaint:
        try:
            return tokenizer_trial.build(document, settings)
        except BaseException as error:
            complaint = tokenizer_trial.complaint_of(error)
    raise RiverError(f"{path}: not a tokenizer ({complaint[:160]})")


def _trial(document: bytes, settings: dict) -> str:
    """Builds and uses the tokenizer in a process of its own; returns what went wrong, or ""."""
    command = [sys.executable, "-I", "-c", RUN_TRIAL, tokenizer_trial.__file__, *sys.path]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(settings).encode() + b"\n" + document,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=WALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"loading it takes more than {WALL_SECONDS} s"
    except OSError as error:
        return f"the process that tries it out does not start: {error.strerror}"
    if done.returncode < 0:
        limits = f"{tokenizer_trial.CPU_SECONDS} s and {tokenizer_trial.MEMORY >> 30} GiB"
        return (
            f"using it ends the process by signal {-done.returncode}; accepted: what takes less than {limits}"
        )
    return done.stdout.decode(errors="replace").strip() or "it fails" if done.returncode else ""


@dataclass
class TokenizerSettings:
    """What the files beside tokenizer.json say. Tokens are keyword arguments of `tokenizers.AddedToken`."""

    listed: list[tuple[int, dict]]  # with their ids, which say no more than the order
    named: list[dict]  # special tokens that have a role
    extra: list[dict]  # special tokens that have none
    legacy: bool  # whether the list comes from the older files
    roles: dict[str, str]  # the texts of bos_token and its like
    add_bos_token: bool
    split_special_tokens: bool

    @classmethod
    def read(cls, directory: Path) -> "TokenizerSettings":
        path = directory / "tokenizer_config.json"
        values = dict(read_json_object(path)) if is_regular(path) else {}
        flags = {key: values.pop(key, None) or False for key in FLAGS}
        for key, value in flags.items():
            if not isinstance(value, bool):
                raise RiverError(f"{path}: {key} is {json.dumps(value)[:60]}; accepted: true or false")
        if "additional_special_tokens" in values and not values.get("extra_special_tokens"):
            values["extra_special_tokens"] = values.pop("additional_special_tokens")  # its older name
        own = _own_roles(values)
        legacy = values.get("added_tokens_decoder") is None
        if legacy:
            own = _read_special_tokens_map(directory / "special_tokens_map.json", values) | own
        older_name = "extra_special_tokens" not in values
        extra = values.get("additional_special_tokens" if older_name else "extra_special_tokens") or []
        if not isinstance(extra, list):
            raise RiverError(f"{path}: extra_special_tokens is no list of tokens")
        roles = {key: values[key] for key in NAMED if values.get(key) is not None} | own
        named = {key: _token(path, key, value) for key, value in roles.items()}
        extra = [_token(path, "extra_special_tokens", value) for value in extra]
        if legacy:
            special = [named[key] for key in NAMED if key in named] + ([] if older_name else extra)
            listed = _legacy_tokens(directory / "added_tokens.json", {t["content"] for t in special})
        else:
            listed = _listed_tokens(path, values["added_tokens_decoder"])
        texts = {key: named[key]["content"] for key in NAMED if key in named}
        return cls(listed, list(named.values()), extra, legacy, texts, **flags)


def _own_roles(values: dict) -> dict:
    """Takes the special tokens with roles of the model's own out of the values of a file."""
    keys = [key for key in values if key.endswith("_token") and key not in NAMED]
    own = {key: values.pop(key) for key in keys if isinstance(values[key], (str, dict))}
    if isinstance(values.get("extra_special_tokens"), dict):
        own |= values.pop("extra_special_tokens")
    return own


def _read_special_tokens_map(path: Path, values: dict) -> dict:
    """Puts what special_tokens_map.json says in the place of the values; returns the model's own roles."""
    newer = dict(read_json_object(path)) if is_regular(path) else {}
    own = _own_roles(newer)
    for key in (*NAMED, *own):
        if (newer | own).get(key) is not None:
            _token(path, key, (newer | own)[key])
    if isinstance(newer.get("extra_special_tokens"), list):
        older = values.get("extra_special_tokens") or []
        newer["extra_special_tokens"] = [*older, *newer["extra_special_tokens"]]
    values |= newer
    return own


def _legacy_tokens(path: Path, special: set[str]) -> list[tuple[int, dict]]:
    """added_tokens.json: ids by text."""
    ids = read_json_object(path) if is_regular(path) else {}
    return [
        (
            _token_id(path, index),
            {"content": content, "normalized": content not in special, "special": content in special},
        )
        for content, index in ids.items()
    ]


def _listed_tokens(path: Path, tokens) -> list[tuple[int, dict]]:
    """added_tokens_decoder: tokens by id."""
    if not isinstance(tokens, dict):
        raise RiverError(f"{path}: added_tokens_decoder is no object of token ids and tokens")
    return [
        (_token_id(path, index), _token(path, f"added_tokens_decoder.{index}", token))
        for index, token in tokens.items()
    ]


def _token_id(path: Path, value) -> int:
    if isinstance(value, bool) or not str(value).isdecimal() or len(str(value)) > 9:
        raise RiverError(f"{path}: {json.dumps(value)[:60]} is no token id; accepted: an integer from 0")
    return int(value)


def _token(path: Path, key: str, value) -> dict:
    """A token from its text, or from an object with its text and flags."""
    token = {"content": value, "special": True} if isinstance(value, str) else value
    if isinstance(token, dict) and isinstance(token.get("content"), str) and token["content"]:
        token = {name: token[name] for name in ("content", *TOKEN_FLAGS) if name in token}
        if all(isinstance(token[name], bool) for name in TOKEN_FLAGS if name in token):
            return token
    raise RiverError(
        f"{path}: {key} holds {json.dumps(value)[:60]}; accepted: a token's text, or an object with it"
    )
