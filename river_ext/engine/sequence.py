"""A request on its way: what has been generated for it so far, and whether that is all."""

from dataclasses import asdict, dataclass
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RiverError
from ..loading.stop_strings import StopStrings
from ..loading.text import Text, TextStream
from .drafting import Drafting
from .request import Request
from .step import Exits, NewToken, Row, RowOutput, Work, not_finite


@dataclass(frozen=True)
class Stats:
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float  # of this prompt
    decode_seconds: float  # of the steps that this request took part in
    tokens_per_second: float  # new tokens after the first, per decoding second; 0 if there is none
    mean_exit_depth: float  # over all new tokens
    steps: int  # that this request took part in: in lossless mode, backbone passes
    tokens_per_step: float  # new tokens after the first, per step; 0 if there is none
    drafts: int  # tokens that were proposed, in lossless mode
    quotes: int  # of these, what the text had said before; the river proposed the others
    accepted_drafts: int  # of all of them, new tokens
    draft_seconds: float | None  # of decode_seconds; None where the device has the control
    # The work of steps, not of prefills, per new token after the first: one row is one token in one layer.
    backbone_rows: float
    recomputed_rows: float  # of these, those of earlier tokens: kv_strategy="recompute"
    exit_rows: float
    projected_rows: float  # through the projections of K and V alone: kv_strategy="propagate"

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
    finish_reason: str | None  # "stop", "length", "cancelled" or "error"; None while it goes on
    stats: Stats
    drafted: list[bool]  # proposed, and right: in lossless mode
    logits: Tensor | None = None  # fp32 [new tokens, vocab_size], with return_logits
    logprobs: list[float] | None = None  # of the new tokens, with logprobs: before temperature and filters
    top_logprobs: list[list[tuple[int, float]]] | None = None  # the likeliest tokens, likeliest first
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


class Piece(NamedTuple):
    """What a token adds to a stream. Its text may be empty, or may complete what earlier tokens began."""

    text: str
    token: int
    exit_depth: int

    def to_dict(self) -> dict:
        """For `json.dumps`."""
        return self._asdict()


class Sequence:
    """A request on its way: what has been generated for it so far."""

    def __init__(self, request: Request, text: Text | None):
        self.request = request
        self.tokens: list[int] = []
        self.exit_depths: list[int] = []
        self.similarities: list[list[float]] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.prefill_seconds = self.decode_seconds = 0.0
        self._stream = TextStream(text, request.prompt, StopStrings(request.stop)) if text else None
        self._drafting = None
        if request.draft_tokens is not None:
            temperature = request.sampling.temperature
            self._drafting = Drafting(request.draft_tokens, temperature, request.prompt, self.tokens)
        self.drafted: list[bool] = []
        self._steps = self._drafts = self._quotes = 0
        self._draft_seconds: float | None = 0.0
        self._work = Work()
        self._exits = Exits()
        self._logits: list[Tensor] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []

    @property
    def known(self) -> list[int]:
        """All its tokens, those of the prompt included."""
        return self.request.prompt + self.tokens

    @property
    def needs_prefill(self) -> bool:
        """Whether its next token comes from a pass over all its tokens: the prompt, or what rotates anew."""
        return not self.tokens or self._steps_left == 0

    @property
    def _steps_left(self) -> int:
        """Tokens that steps may draw for it before it ends or rotates anew."""
        left = self.request.max_new_tokens - len(self.tokens)
        last, known = self.request.rotates_anew_after, len(self.request.prompt) + len(self.tokens)
        return left if last is None or known > last + 1 else min(left, last + 1 - known)

    def prefill_took(self, seconds: float) -> None:
        """One that gives a later token than the first is a step like others."""
        if self.tokens:
            self.decode_seconds += seconds
        else:
            self.prefill_seconds += seconds

    def row(self, slot: int) -> Row:
        """Its next step: the last token is fed back."""
        return Row(
            token=self.tokens[-1],
            position=len(self.request.prompt) + len(self.tokens) - 1,
            slot=slot,
            request=self.request,
            remaining=self._steps_left,
            drafting=self._drafting,
            exits=self._exits,
        )

    def take(self, output: RowOutput) -> list[Piece]:
        """Takes new tokens up to the last one that it needs. An exception ends it with an error."""
        try:
            return self._take(output)
        except BaseException as error:  # half of a token is there
            self.fail(f"token {len(self.tokens)} was cut off ({type(error).__name__}: {error})")
            raise

    def _take(self, output: RowOutput) -> list[Piece]:
        self._steps += bool(self.tokens)  # the first token is the prefill's
        self._drafts += output.drafts
        self._quotes += output.quotes
        self._work = Work(*map(add, self._work, output.work))
        if output.draft_seconds is None or self._draft_seconds is None:
            self._draft_seconds = None
        else:
            self._draft_seconds += output.draft_seconds
        if self.needs_prefill:  # which these come from
            self._exits = Exits()
        pieces = []
        for new in output.tokens:
            if self.finish_reason:
                break
            if new.token < 0:
                position = len(self.request.prompt) + len(self.tokens)
                self.fail(not_finite(self.request.dtype, position, new.similarities))
            else:
                pieces.append(self._append(new))
        return pieces

    def _append(self, new: NewToken) -> Piece:
        """Decides, too, whether it is the last one."""
        self.tokens.append(new.token)
        self.exit_depths.append(new.exit_depth)
        self._exits.depths.append(new.exit_depth)
        self.similarities.append(new.similarities)
        self.drafted.append(new.drafted)
        if new.logits is not None:
            self._keep_logits(new.token, new.logits)
        added = self._text_of(new.token)
        self.text += added
        return Piece(added, new.token, new.exit_depth)

    def _text_of(self, token: int) -> str:
        added, stream = "", self._stream
        if token in self.request.stop_tokens:
            self.finish_reason = "stop"
        elif stream:
            added = stream.feed(token)
            if stream.stopped:
                self.finish_reason = "stop"
        if self.finish_reason is None and len(self.tokens) == self.request.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason and stream and not stream.stopped:
            added += stream.finish()
            if stream.stopped:  # by an unfinished character
                self.finish_reason = "stop"
        return added

    def _keep_logits(self, token: int, logits: Tensor) -> None:
        if self.request.return_logits:
            self._logits.append(logits)
        if (count := self.request.logprobs) is not None:
            logprobs = logits.log_softmax(-1)
            self.logprobs.append(logprobs[token].item())
            values, ids = logprobs.sort(descending=True, stable=True)  # ties to the lowest id
            self.top_logprobs.append(list(zip(ids[:count].tolist(), values[:count].tolist(), strict=True)))

    def fail(self, error: str) -> None:
        """No token follows, for this reason."""
        self.error = error
        self.end("error")

    def end(self, reason: str) -> None:
        """No token follows, whatever the last one was."""
        self.finish_reason = reason
        if self._stream:
            self.text += self._stream.finish()

    def output(self) -> GenerationOutput:
        """What there is; with finish_reason None while more is to come."""
        decoded = max(0, len(self.tokens) - 1)
        stats = Stats(
            prompt_tokens=len(self.request.prompt),
            new_tokens=len(self.tokens),
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            tokens_per_second=decoded / self.decode_seconds if decoded else 0.0,
            mean_exit_depth=sum(self.exit_depths) / max(1, len(self.exit_depths)),
            steps=self._steps,
            tokens_per_step=decoded / self._steps if decoded else 0.0,
            drafts=self._drafts,
            quotes=self._quotes,
            accepted_drafts=sum(self.drafted),
            draft_seconds=self._draft_seconds,
            **{name: rows / max(1, decoded) for name, rows in self._work._asdict().items()},
        )
        has_logprobs = self.request.logprobs is not None
        return GenerationOutput(
            text=self.text,
            tokens=list(self.tokens),
            exit_depths=list(self.exit_depths),
            similarities=list(self.similarities),
            finish_reason=self.finish_reason,
            stats=stats,
            drafted=list(self.drafted),
            logits=torch.stack(self._logits) if self._logits else None,
            logprobs=list(self.logprobs) if has_logprobs else None,
            top_logprobs=list(self.top_logprobs) if has_logprobs else None,
            error=self.error,
        )
