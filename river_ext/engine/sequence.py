"""A request on its way: what has been generated for it so far, and whether that is all."""

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ..errors import RiverError
from ..loading.text import TextStream
from .request import Plan
from .step import StepOutput, not_finite


@dataclass(frozen=True)
class Stats:
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float  # of this prompt
    decode_seconds: float  # of the steps that this request took part in
    tokens_per_second: float  # new tokens after the first, per decoding second; 0 if there is none
    mean_exit_depth: float  # over all new tokens

    def to_dict(self) -> dict:
        """For `json.dumps`."""
        return asdict(self)


@dataclass(frozen=True)
class GenerationOutput:
    """What one request got. Lists have one entry per new token; the first is drawn by the prefill."""

    text: str  # before the stop string or stop token; "" without a tokenizer
    tokens: list[int]  # new tokens, a stop token included
    exit_depths: list[int]
    similarities: list[list[float]]  # of the backbone layers that ran
    finish_reason: str | None  # "stop", "length" or "error"; None in a stream that goes on
    stats: Stats
    logits: Tensor | None = None  # fp32 [new tokens, vocab_size], with return_logits
    error: str | None = None  # why it ended with finish_reason "error"; the tokens before are right

    def checked(self) -> "GenerationOutput":
        """Itself, or RiverError where it ended with an error."""
        if self.error:
            raise RiverError(self.error)
        return self

    def to_dict(self) -> dict:
        """All but the logits, for `json.dumps`."""
        values = {name: value for name, value in vars(self).items() if name != "logits"}
        return values | {"stats": self.stats.to_dict()}


@dataclass
class Sequence:
    """A request on its way: its prompt, and what has been generated so far."""

    plan: Plan
    slot: int
    text_stream: TextStream | None
    tokens: list[int] = field(default_factory=list)
    exit_depths: list[int] = field(default_factory=list)
    similarities: list[list[float]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    text: str = ""
    news: str = ""  # what the last token added to the text
    finish_reason: str | None = None
    error: str | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prompt(self) -> list[int]:
        return self.plan.prompts[self.slot]

    def append(self, token: int, step: StepOutput, row: int) -> None:
        """Takes a new token, its row of the step's output, and decides whether it is the last."""
        if token < 0:
            self._fail(step.similarities[row])
            return
        self.tokens.append(token)
        self.exit_depths.append(step.exit_depths[row])
        self.similarities.append(step.similarities[row])
        if step.logits is not None:
            self.logits.append(step.logits[row])
        self.news = ""
        if token in self.plan.stop_tokens:
            self.finish_reason = "stop"
        elif self.text_stream:
            self.news = self.text_stream.feed(token)
            if self.text_stream.stopped:
                self.finish_reason = "stop"
        if self.finish_reason is None and len(self.tokens) == self.plan.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason and self.text_stream and not self.text_stream.stopped:
            self.news += self.text_stream.finish()
            if self.text_stream.stopped:  # by an unfinished character
                self.finish_reason = "stop"
        self.text += self.news

    def _fail(self, similarities: list[float]) -> None:
        """Ends without a token, for want of finite logits."""
        position = len(self.prompt) + len(self.tokens)
        self.finish_reason, self.error = "error", not_finite(self.plan.dtype, position, similarities)
        if self.text_stream:
            self.text += self.text_stream.finish()

    def output(self) -> GenerationOutput:
        """What there is; with finish_reason None while more is to come."""
        decoded = max(0, len(self.tokens) - 1)
        stats = Stats(
            prompt_tokens=len(self.prompt),
            new_tokens=len(self.tokens),
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            tokens_per_second=decoded / self.decode_seconds if decoded else 0.0,
            mean_exit_depth=sum(self.exit_depths) / max(1, len(self.exit_depths)),
        )
        logits = torch.stack(self.logits) if self.logits else None
        return GenerationOutput(
            text=self.text,
            tokens=list(self.tokens),
            exit_depths=list(self.exit_depths),
            similarities=list(self.similarities),
            finish_reason=self.finish_reason,
            stats=stats,
            logits=logits,
            error=self.error,
        )
