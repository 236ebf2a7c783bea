"""`river chat`: a conversation, streamed, whose earlier turns stay in the cache."""

import sys
from contextlib import suppress

from river_ext.engine.sequence import GenerationOutput
from river_ext.errors import RiverError
from river_ext.loading.chat import read_template

from . import shared
from .generate import ENGINE_OPTIONS, check_options, own_options
from .terminal import note, print_json, printable

MOST_POSITIONS = 16_384  # of a conversation, if the model has as many
# Without any of them, answers are the backbone's own.
OF_RIVER = {"threshold", "min_layers", "prefill", "river_head", "kv_strategy", "deep_tokens"}
HELP = "/new begins a new conversation, /exit (or the end of input) ends; Ctrl-C stops an answer."


def run(arguments) -> None:
    options = own_options(arguments)
    options.setdefault("mode", "river" if OF_RIVER & set(options) else "lossless")
    check_options(arguments, options)
    read_template(shared.directory(arguments))
    model = shared.load(arguments)
    engine_options = {name: options.pop(name) for name in ENGINE_OPTIONS if name in options}
    max_len = min(model.config.max_length, MOST_POSITIONS)
    with model.engine(slots=1, max_len=max_len, reuse_prompts=True, **engine_options) as engine:
        conversation = Conversation(engine, arguments.system, options, as_json=arguments.json)
        if sys.stdin.isatty() and not arguments.json:
            with suppress(ImportError):
                import readline  # noqa: F401  # input() then has history and editing
            note(f"{shared.model_line(model)}\n{HELP}")
        while (said := _read()) is not None:
            if said == "/exit":
                break
            if said == "/new":
                conversation.forget()
            elif said:
                conversation.answer(said)


def _read() -> str | None:
    """What the user says next; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise RiverError(f"standard input: byte {error.start} is no UTF-8; accepted: UTF-8 text") from None


class Conversation:
    """Turns of a user and a model, and the engine that holds their K and V."""

    def __init__(self, engine, system: str | None, options: dict, as_json: bool):
        self.engine, self.options, self.as_json = engine, options, as_json
        engine.progress = True
        self._first = [{"role": "system", "content": system}] if system else []
        self.forget()

    def forget(self) -> None:
        self.messages = list(self._first)

    def answer(self, said: str) -> None:
        """Streams the model's answer. What cannot be answered leaves the conversation as it was."""
        messages = [*self.messages, {"role": "user", "content": said}]
        try:
            output = self._stream(messages)
        except RiverError as error:
            if self.as_json or not sys.stdin.isatty():
                raise
            note(f"river: {error}; /new begins a new conversation")
            return
        self.messages = [*messages, {"role": "assistant", "content": output.text}]
        if self.as_json:
            print_json({"user": said} | output.to_dict())
            sys.stdout.flush()

    def _stream(self, messages: list[dict]) -> GenerationOutput:
        tokens = self.engine.text.chat(messages)
        # the last new token takes no position of the slot, but one of the model
        room = min(self.engine.max_len + 1, self.engine.network.config.max_length) - len(tokens)
        wanted = self.options.get("max_new_tokens", 256)
        options = self.options | {"max_new_tokens": min(wanted, room) if room > 0 else wanted}
        request = self.engine.submit(tokens, **options)
        while self.engine.busy:
            try:
                events = self.engine.step()
                output = events[-1].output if events else None
                for event in events:
                    if event.piece and not self.as_json:
                        print(printable(event.piece.text), end="", flush=True)
            except KeyboardInterrupt:  # ends the answer, not the conversation
                with suppress(RiverError):
                    self.engine.cancel(request)
        if not self.as_json:
            print(flush=True)
        return output.checked()
