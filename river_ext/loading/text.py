"""Text to tokens, and tokens to text, whole or one at a time."""

from functools import cached_property
from os.path import commonprefix
from pathlib import Path

from tokenizers import Tokenizer

from ..errors import RiverError
from .chat import DEFAULT, TOOL_USE, ChatTemplate, template_names
from .config import ModelConfig
from .decoding import Decoder
from .stop_strings import StopStrings
from .tokenizer import TokenizerSettings
from .tokenizer_trial import complaint_of

TOKEN_CHARACTERS = 64  # a text with more of them per position of the model is not even encoded


class Text:
    """A checkpoint's tokenizer."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, directory: Path | None = None):
        self.tokenizer = tokenizer
        self.decoder = Decoder(tokenizer)
        self._max_characters = TOKEN_CHARACTERS * config.max_length
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}
        self._bos, self._adds_bos = config.bos_token_id, False
        self._directory = directory
        self._chat_templates: dict[str, ChatTemplate] = {}
        if directory:
            settings = TokenizerSettings.read(directory)
            if "bos_token" in settings.roles:
                self._bos = tokenizer.token_to_id(settings.roles["bos_token"])
            # the post-processor decides, unless it adds nothing at all and the checkpoint asks for bos
            self._adds_bos = settings.add_bos_token and tokenizer.num_special_tokens_to_add(False) == 0

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt and those that the tokenizer puts around it; bos never comes twice."""
        tokens = self._tokens(text)
        if self._bos is None:
            return tokens
        tokens = [self._bos, *tokens] if self._adds_bos else tokens
        start = 0
        while tokens[start : start + 2] == [self._bos] * 2:
            start += 1
        return tokens[start:]

    def chat(
        self, messages, add_generation_prompt: bool = True, chat_template: str | None = None, **variables
    ) -> list[int]:
        """The tokens of chat messages, by the checkpoint's template: what it writes, and nothing around it.

        Args:
            chat_template: the name of a template, where the checkpoint has several. None takes "default", or
                "tool_use" if there is one and `tools` are given, as transformers does.
            variables: those that the template knows, such as `tools` or `enable_thinking`.
        """
        text = self.chat_text(messages, add_generation_prompt, chat_template, **variables)
        return self._tokens(text, add_special_tokens=False)

    def chat_text(
        self, messages, add_generation_prompt: bool = True, chat_template: str | None = None, **variables
    ) -> str:
        """What `chat` gives the tokens of."""
        if self._directory is None:
            raise RiverError("chat messages need a checkpoint with a chat template; accepted: text")
        name = chat_template
        if name is None:
            with_tools = variables.get("tools") is not None and TOOL_USE in self._template_names
            name = TOOL_USE if with_tools else DEFAULT
        if not isinstance(name, str):
            raise RiverError(f"chat_template is a {type(name).__name__}; accepted: the name of a template")
        if name not in self._chat_templates:
            self._chat_templates[name] = ChatTemplate.read(self._directory, name)
        return self._chat_templates[name].render(messages, add_generation_prompt, **variables)

    @cached_property
    def _template_names(self) -> list[str]:
        return template_names(self._directory)

    def _tokens(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > self._max_characters:
            raise RiverError(f"a text of {len(text)} characters; accepted: at most {self._max_characters}")
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise RiverError(
                "the text holds a lone surrogate, bytes that are not UTF-8; accepted: Unicode text"
            )
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as error:
            raise RiverError(f"the tokenizer cannot encode the text ({complaint_of(error)[:160]})") from None

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.decoder.text(*self.decoder.settle(self.pieces(tokens)))

    def pieces(self, tokens: list[int]) -> list[str]:
        """What the vocabulary calls the tokens that are text."""
        names = map(self.tokenizer.id_to_token, tokens)
        return [name for name in names if name is not None and name not in self._special]

    def special(self, token: int) -> str:
        """The name of a special token; "" for all others."""
        name = self.tokenizer.id_to_token(token)
        return name if name in self._special else ""


class TextStream:
    """The text of new tokens as it becomes certain, cut before the first stop string.

    It is what decoding prompt and new tokens gives beyond decoding the prompt, whatever the decoder. Held
    back are bytes of an unfinished character, and a tail that may become a stop string. Special tokens are
    no text, but stop strings that contain a special token's name are found.
    """

    def __init__(self, text: Text, prompt: list[int], stop: StopStrings | None = None):
        self.stopped = False
        self._text, self._decoder, self._stop = text, text.decoder, stop or StopStrings()
        self._held: list[str] = []  # what the characters of the stop string's state are in the text
        self._state = 0
        context = self._decoder.context
        # pieces before the window change nothing any more
        self._window, self._waiting = self._decoder.settle(_last(text, prompt, context))
        before = self._decoder.text(self._window, self._waiting)
        self._before: str | None = before  # the prompt's, until it is known whether its end still changes
        unfinished = len(self._waiting) + self._decoder.unfinished(self._window, before)
        self._shown = 0 if context is None else len(before) - unfinished

    def feed(self, token: int) -> str:
        """The text that this token makes certain, often its own."""
        if name := self._text.special(token):
            return self._release_at_special(name)
        settled, self._waiting = self._decoder.settle(self._waiting + self._text.pieces([token]))
        self._window += settled
        if self._decoder.context is None:
            return ""
        text = self._decoder.text(self._window, [])
        unfinished = self._decoder.unfinished(self._window, text)
        new = self._beyond_shown(text[: len(text) - unfinished])
        if not unfinished and len(self._window) > 2 * self._decoder.context:
            self._window, _ = self._decoder.settle(self._window[-self._decoder.context :])
            self._shown, self._before = len(self._decoder.text(self._window, [])), None
        return self._release(new)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        text = self._release(self._beyond_shown(self._decoder.text(self._window, self._waiting)))
        text += "".join(self._held)
        self._held = []
        return text

    def _beyond_shown(self, text: str) -> str:
        """The end of the window's text that is new, which from now on is shown."""
        if len(text) <= self._shown:
            return ""
        if self._before is not None:
            self._shown, self._before = len(commonprefix([self._before, text])), None
        new, self._shown = text[self._shown :], len(text)
        return new

    def _release(self, text: str) -> str:
        """Takes new text; returns what can no longer be part of a stop string."""
        if not self._stop:
            return text
        for character in text:
            self._held.append(character)
            self._state = self._stop.step(self._state, character)
            if length := self._stop.match[self._state]:
                return self._cut(length)
        return self._take(len(self._held) - self._stop.length[self._state])

    def _release_at_special(self, name: str) -> str:
        """The same for a special token, which is part of a stop string as a whole or not at all."""
        state = self._state
        for character in name:
            state = self._stop.step(state, character)
        if self._stop.length[state] < len(name):
            return ""
        self._state = state
        self._held += [""] * len(name)
        if self._stop.match[state] >= len(name):
            return self._cut(self._stop.match[state])
        return self._take(len(self._held) - self._stop.length[state])

    def _cut(self, length: int) -> str:
        self.stopped = True
        text = self._take(len(self._held) - length)
        self._held = []
        return text

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return "".join(taken)


def _last(text: Text, tokens: list[int], count: int | None) -> list[str]:
    """The last pieces of tokens, as many as asked for or all."""
    if count is None:
        return text.pieces(tokens)
    pieces: list[str] = []
    for token in reversed(tokens):
        if len(pieces) == count:
            break
        pieces += text.pieces([token])
    return pieces[::-1]
