"""What an answer is in OpenAI's forms: one object, or the chunks of a stream."""

import secrets
import time
from abc import ABC, abstractmethod

from ..engine.sequence import GenerationOutput
from .prepare import Served
from .schema import Body
from .worker import Ticket, Token

LEAST_LOGPROB = -9999.0  # JSON has no infinities


class Reply(ABC):
    """The answer to one request."""

    prefix: str  # of its id
    whole_kind: str
    chunk_kind: str

    def __init__(self, served: Served, body: Body, ticket: Ticket):
        self.served, self.body, self.ticket = served, body, ticket
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }
        self._characters = 0  # of the text so far

    def whole(self, tokens: list[Token], output: GenerationOutput) -> dict:
        choice = self._choice(self.message(output.text), tokens, output)
        ending = {"usage": usage(output), "river": self._river(output)}
        return self._head | {"object": self.whole_kind, "choices": [choice]} | ending

    def chunk(self, tokens: list[Token], output: GenerationOutput | None, first: bool) -> dict:
        text = "".join(token.text for token in tokens)
        choice = self._choice(self.delta(text, first), tokens, output)
        ending = {"river": self._river(output)} if output else {}
        if self.body.stream_options.include_usage:
            ending["usage"] = None  # that of the last chunk counts
        return self._head | {"object": self.chunk_kind, "choices": [choice]} | ending

    def usage_chunk(self, output: GenerationOutput) -> dict:
        return self._head | {"object": self.chunk_kind, "choices": [], "usage": usage(output)}

    @abstractmethod
    def message(self, text: str) -> dict:
        """The part of a choice that holds a whole text."""

    @abstractmethod
    def delta(self, text: str, first: bool) -> dict:
        """The part of a choice that holds a text of a stream."""

    @abstractmethod
    def logprobs(self, tokens: list[Token]) -> dict: ...

    def _choice(self, content: dict, tokens: list[Token], output: GenerationOutput | None) -> dict:
        wanted = self.body.likeliest is not None
        choice = {
            "index": 0,
            **content,
            "logprobs": self.logprobs(tokens) if wanted else None,
            "finish_reason": output.finish_reason if output else None,
        }
        if self.body.exit_depths:
            names = ("id", "text", "exit_depth", "drafted")
            choice["tokens"] = [{name: getattr(token, name) for name in names} for token in tokens]
        return choice

    def _river(self, output: GenerationOutput) -> dict:
        """What OpenAI's API has no place for."""
        request, stats = self.ticket.sequence.request, output.stats.to_dict()
        return {"seed": request.sampling.seed, "mode": self.body.mode or self.served.mode} | stats

    def likeliest(self, token: Token) -> list[tuple[str, float]]:
        """Names and log-probabilities of the likeliest tokens in its place."""
        return [(self.served.names[id], finite(logprob)) for id, logprob in token.likeliest]


class Completion(Reply):
    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def message(self, text: str) -> dict:
        return {"text": text}

    def delta(self, text: str, first: bool) -> dict:
        return {"text": text}

    def logprobs(self, tokens: list[Token]) -> dict:
        columns = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            columns["tokens"].append(self.served.names[token.id])
            columns["token_logprobs"].append(finite(token.logprob))
            # the drawn one, too, as OpenAI has it; of equal names the likeliest stays
            drawn = columns["tokens"][-1], columns["token_logprobs"][-1]
            columns["top_logprobs"].append(dict([drawn, *reversed(self.likeliest(token))]))
            columns["text_offset"].append(self._characters)
            self._characters += len(token.text)
        return columns


class Chat(Reply):
    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def message(self, text: str) -> dict:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str, first: bool) -> dict:
        role = {"role": "assistant"} if first else {}
        return {"delta": role | ({"content": text} if text or first else {})}

    def logprobs(self, tokens: list[Token]) -> dict:
        content = []
        for token in tokens:
            top = [named(*pair) for pair in self.likeliest(token)]
            drawn = named(self.served.names[token.id], finite(token.logprob))
            content.append(drawn | {"top_logprobs": top})
        return {"content": content, "refusal": None}


def usage(output: GenerationOutput) -> dict:
    prompt, new = output.stats.prompt_tokens, output.stats.new_tokens
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def named(name: str, logprob: float) -> dict:
    """The bytes are null where a token is a part of a character, which no text shows."""
    data = None if "\ufffd" in name else list(name.encode())
    return {"token": name, "logprob": logprob, "bytes": data}
