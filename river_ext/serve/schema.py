"""The bodies of requests: the fields of OpenAI's API that this server has, and its own.

A wrong type is refused, never converted. A field that the server lacks is refused by its name, unless its
value asks for nothing. Ranges are the engine's to check.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator

from ..checks import short

# fields of OpenAI's API that the server lacks, and their values that ask for nothing
LACKING: dict[str, tuple] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
ROLES = ("system", "developer", "user", "assistant")
MOST_TOP_LOGPROBS = 20


def one_prompt(value) -> str | list[int]:
    """A prompt, or a list of one."""
    if isinstance(value, list) and value and isinstance(value[0], (str, list)):
        if len(value) > 1:
            raise ValueError(f"{len(value)} prompts; accepted: one a request")
        value = value[0]
    if isinstance(value, str) or (isinstance(value, list) and all(type(token) is int for token in value)):
        return value
    raise ValueError("accepted: text, or a list of token ids")


def one_or_by_layer(value) -> float | list[float]:
    values = value if isinstance(value, list) else [value]
    if not all(type(one) in (int, float) for one in values):
        raise ValueError(f"{short(value)}; accepted: a number, or a list of one for each layer")
    return value


def some_strings(value) -> list:
    return [value] if isinstance(value, str) else value


def messages(value) -> list[dict]:
    """Their contents are checked where the chat template gets them."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError("accepted: a list of objects with role and content")
    for number, message in enumerate(value):
        if message.get("role") not in ROLES:
            role = short(message.get("role"))
            raise ValueError(f"message {number} has the role {role}; accepted: {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise ValueError(f"message {number} has tool_calls, which are not supported")
    return value


class FieldError(ValueError):
    """Of a field whose name pydantic does not tell: there is none, or it does not fit another."""

    def __init__(self, message: str, field: str):
        super().__init__(message)
        self.field = field[:60]  # what a client calls it may be of any length


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        """Leaves out what is null or asks for nothing; names what is unknown or not supported."""
        if not isinstance(values, dict):
            raise ValueError("accepted: a JSON object, with the header Content-Type: application/json")
        known = {}
        for name, value in values.items():
            if value is None:
                continue
            if name in cls.model_fields:
                known[name] = value
            elif name not in LACKING:
                raise FieldError(f"no field {short(name)}; accepted: {', '.join(cls.model_fields)}", name)
            elif not asks_for_nothing(value, LACKING[name]):
                accepted = " or ".join(map(repr, LACKING[name]))
                raise FieldError(f"{name}={short(value)} is not supported; accepted: {accepted}", name)
        return known


def asks_for_nothing(value, harmless: Sequence) -> bool:
    return any(type(value) is type(one) and value == one for one in harmless)


class StreamOptions(Fields):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding, of which there is none


class Body(Fields):
    """What completions and chat have in common."""

    prompt_field: ClassVar[str]  # which has the prompt

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    # an error for each of millions of items would take gigabytes
    stop: Annotated[list[str], FailFast(), BeforeValidator(some_strings)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None

    mode: str | None = None
    threshold: Annotated[Any, BeforeValidator(one_or_by_layer)] = None
    min_layers: int | None = None
    draft_tokens: int | str | None = None
    exit_depths: bool = False  # whether the answer has each token's

    @property
    def new_tokens(self) -> int | None:
        """At most; None is what there is room for."""
        raise NotImplementedError

    @property
    def likeliest(self) -> int | None:
        """How many tokens' log-probabilities are wanted beside that of the drawn one; None: not even that."""
        raise NotImplementedError


class CompletionBody(Body):
    prompt_field = "prompt"

    prompt: Annotated[Any, BeforeValidator(one_prompt)]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        return self.logprobs


class ChatBody(Body):
    prompt_field = "messages"

    messages: Annotated[Any, BeforeValidator(messages)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _consistent(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise FieldError(f"top_logprobs={self.top_logprobs} needs logprobs=true", "top_logprobs")
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise FieldError(
                f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens}; "
                "accepted: one of them",
                "max_tokens",
            )
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def likeliest(self) -> int | None:
        return self.top_logprobs if self.logprobs else None
