"""From a body to a checked request: tokens, room in a slot, the engine's options."""

import math
import re
import secrets
from dataclasses import dataclass
from functools import cached_property

from ..checks import short
from ..engine.engine import Engine
from ..engine.prompt import prompt_tokens
from ..engine.request import Options, request
from ..engine.sequence import Sequence
from ..errors import RiverError
from ..loading.calibrated import CALIBRATED
from ..loading.chat import template_names
from ..loading.text import Text
from ..model import DEMO, Model
from .errors import ApiError
from .schema import Body, ChatBody, CompletionBody

MODES = ("lossless", "river", "full")
SEED_BITS = 53  # JavaScript has no more in a number


@dataclass(frozen=True)
class Served:
    """A model, its engine, and what requests get that do not say what they want."""

    model: Model
    engine: Engine
    mode: str
    threshold: float | str | None = None  # None: the calibrated one, or that of `generate`

    @property
    def name(self) -> str:
        """Of the checkpoint's directory, without the folders above it, which are nobody's concern."""
        directory = self.model.directory
        return "river-demo" if directory in (None, DEMO) else directory.resolve().name

    @property
    def fingerprint(self) -> str:
        return f"fp_{self.model.fingerprint[:12]}"

    @property
    def shown_threshold(self) -> float | tuple[float, ...] | None:
        """What mode river goes by where a request names none; None is infinity, which JSON has not."""
        found, threshold = self.model.config.calibrated, self.threshold
        if threshold in (None, CALIBRATED):
            threshold = found.threshold if found else Options.threshold
        return None if threshold in (math.inf, -math.inf) else threshold

    @property
    def positions(self) -> int:
        """Prompt and new tokens of a request, at most: the last token takes no place in a slot."""
        return min(self.engine.max_len + 1, self.model.config.max_length)

    def check_name(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404, f"model={short(name)}; accepted: {self.name!r}", param="model", code="model_not_found"
            )

    def sequence(self, body: CompletionBody | ChatBody) -> Sequence:
        """Takes a while where the prompt is long; RiverErrors say what is wrong."""
        prompt = self._prompt(body)
        options = self._options(body) | {"max_new_tokens": self._new_tokens(body, len(prompt))}
        try:
            asked = request(self.model.config, self.model.text, prompt, options)
        except RiverError as error:
            raise ApiError(400, str(error), param=field_of(error, body)) from None
        return Sequence(asked, self.model.text)

    @cached_property
    def names(self) -> "TokenNames":
        return TokenNames(self.model.text)

    @cached_property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        directory = self.model.directory
        return directory is not None and bool(template_names(directory))

    def _prompt(self, body: CompletionBody | ChatBody) -> list[int]:
        config, text = self.model.config, self.model.text
        name = body.prompt_field
        if name == "messages" and not self.chats:
            raise ApiError(400, "this model has no chat template; accepted: /v1/completions", param=name)
        prompt = body.prompt if name == "prompt" else [_for_template(message) for message in body.messages]
        try:
            return prompt_tokens(config, text, prompt)
        except RiverError as error:  # may name the template's file, whose folders are nobody's concern
            message = str(error).replace(f"{self.model.directory}/", "")
            raise ApiError(400, message, param=name) from None

    def _new_tokens(self, body: CompletionBody | ChatBody, prompt: int) -> int:
        room, wanted = self.positions - prompt, body.new_tokens
        if room < 1 or (wanted or 1) > room:
            raise ApiError(
                400,
                f"the prompt has {prompt} tokens, max_tokens={wanted}; accepted: {self.positions} in all, "
                "and at least one new one",
                param=body.prompt_field,
                code="context_length_exceeded",
            )
        return wanted or room

    def _options(self, body: CompletionBody | ChatBody) -> dict:
        mode = self.mode if body.mode is None else body.mode
        if mode not in MODES:
            raise ApiError(400, f"mode={mode!r}; accepted: {', '.join(MODES)}", param="mode")
        if mode != "river":
            for name in ("threshold", "min_layers"):
                if getattr(body, name) is not None:
                    raise ApiError(
                        400, f"{name} with mode={mode!r}; accepted: it with mode='river'", param=name
                    )
        own = {"threshold": self.threshold if body.threshold is None else body.threshold}
        own |= {name: getattr(body, name) for name in ("min_layers", "draft_tokens")}
        found = self.model.config.calibrated
        calibrated = found.options(mode, own["threshold"]) if found else {}
        return {
            "mode": mode,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "min_p": body.min_p,
            "seed": secrets.randbits(SEED_BITS) if body.seed is None else body.seed,
            "stop": body.stop,
            "logprobs": body.likeliest,
        } | calibrated | {name: value for name, value in own.items() if value is not None}  # fmt: skip


def field_of(error: RiverError, body: Body) -> str | None:
    """The field that an error of the engine's is about: those of options begin with its name."""
    name = re.match(r"\w*", str(error))[0]
    return name if name in type(body).model_fields else None


class TokenNames:
    """What a token adds to a text, or the name of a special one. Parts of characters are U+FFFD."""

    def __init__(self, text: Text):
        self._text, self._known = text, {}
        self._before = text.encode("a")[-1:]  # tokens behind another keep their blanks

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._text.special(token) or self._added(token)
        return self._known[token]

    def _added(self, token: int) -> str:
        return self._text.decode([*self._before, token]).removeprefix(self._text.decode(self._before))


def _for_template(message: dict) -> dict:
    """Most templates know no developers, whom OpenAI called the system before, and no text in parts."""
    if message["role"] == "developer":
        message = message | {"role": "system"}
    parts = message.get("content")
    if isinstance(parts, list) and all(map(_is_text, parts)):  # what is none is refused by its type
        message = message | {"content": "\n".join(part["text"] for part in parts)}
    return message


def _is_text(part) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
