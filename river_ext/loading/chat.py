"""Chat messages as text, by the checkpoint's own template, as transformers' apply_chat_template writes them.

A template runs under limits in a process of its own, chat_worker.py, which starts with the first messages and
stays for those that follow, so that these take less than a millisecond. Nothing inside of a process bounds
jinja2 reliably: one multiplication or one `center` may take any time and memory, even while the template
compiles. A limit of processor time is enough, since templates cannot sleep.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import RiverError
from .files import is_regular, read_text
from .json_object import MAX_JSON_BYTES, read_json_object
from .tokenizer import RUN_TRIAL, TokenizerSettings

DEFAULT, TOOL_USE = "default", "tool_use"  # names of templates that transformers chooses by itself
TOKENIZER_CONFIG = "tokenizer_config.json"
WORKER = Path(__file__).with_name("chat_worker.py")
MAX_TEMPLATE_BYTES = 1 << 20
MAX_CHARACTERS = 16 << 20  # of the text, far more than the positions of any model hold
MEMORY = 1 << 30  # bytes of address space
CPU_SECONDS = 5  # for the messages of one prompt
MESSAGE = "{'role': ..., 'content': ...}"
CONTENT = "text, or a list of {'type': 'text', 'text': ...}"
REASONING = ("reasoning_content", "thinking", "reasoning")  # names that go for a message's reasoning


class ChatTemplate:
    """A checkpoint's chat template. Threads may share it, and a forked process starts a worker of its own."""

    def __init__(self, source: Path, template: str, special_tokens: dict[str, str]):
        self.source, self.template, self.special_tokens = source, template, special_tokens
        self._lock = threading.Lock()
        self._worker: subprocess.Popen | None = None
        self._owner = 0  # the id of the process that started the worker
        self._stop = lambda: None

    @classmethod
    def read(cls, directory: Path, name: str = DEFAULT) -> "ChatTemplate":
        return cls(*read_template(directory, name), TokenizerSettings.read(directory).roles)

    def render(self, messages, add_generation_prompt: bool = True, **variables) -> str:
        """The text of messages; the variables are the template's, such as `tools` or `enable_thinking`."""
        values = {"tools": None, "documents": None} | self.special_tokens | variables
        values |= {"messages": checked_messages(messages), "add_generation_prompt": add_generation_prompt}
        try:
            request = json.dumps(values).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RiverError(
                f"the messages or the template's variables cannot be written as JSON ({str(error)[:100]})"
            ) from None
        if len(request) > MAX_JSON_BYTES:
            raise RiverError(f"messages of {len(request)} bytes; accepted: {MAX_JSON_BYTES >> 20} MiB")
        reply = self._ask(request)
        if "complaint" in reply:
            raise RiverError(f"{self.source}: the chat template {reply['complaint']}")
        return reply["text"]

    def _ask(self, request: bytes) -> dict:
        with self._lock:
            try:
                worker = self._running()
                with suppress(BrokenPipeError):  # it ends, and its answer is empty
                    worker.stdin.write(request + b"\n")
                    worker.stdin.flush()
                answer = worker.stdout.readline()
                if answer.endswith(b"\n"):
                    return json.loads(answer)
                return {"complaint": _cause_of(worker.wait())}
            except BaseException as error:
                self._stop()  # an answer that nobody has read must not become that of the next messages
                if not isinstance(error, OSError):
                    raise
                return {"complaint": f"needs a process of its own, which does not start: {error.strerror}"}

    def _running(self) -> subprocess.Popen:
        if self._worker is None or self._owner != os.getpid() or self._worker.poll() is not None:
            self._stop()
            command = [sys.executable, "-I", "-c", RUN_TRIAL, str(WORKER), *sys.path]
            self._worker = worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self._owner = os.getpid()
            self._stop = weakref.finalize(self, _end, worker, self._owner)
            settings = {"template": self.template, "memory": MEMORY, "seconds": CPU_SECONDS}
            worker.stdin.write(json.dumps(settings | {"max_characters": MAX_CHARACTERS}).encode() + b"\n")
        return self._worker


def _end(worker: subprocess.Popen, owner: int) -> None:
    """Ends a worker, of which a fork of its owner only has the ends of the pipes."""
    if os.getpid() == owner:
        worker.kill()
        worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        with suppress(OSError):  # what was not written
            pipe.close()


def _cause_of(code: int) -> str:
    """Why a worker has ended, from its exit code."""
    if code == -signal.SIGXCPU:
        return f"takes more than {CPU_SECONDS} s of processor time; accepted: less"
    return f"ends the process that renders it (code {code}); accepted: what takes at most {MEMORY >> 30} GiB"


def template_names(directory: Path) -> list[str]:
    """The templates of a checkpoint directory; one without a name of its own is the default one."""
    return list(_template_files(directory) or _configured_templates(directory))


def read_template(directory: Path, name: str = DEFAULT) -> tuple[Path, str]:
    """A template of a checkpoint directory, and the file that it is in."""
    files = _template_files(directory)
    texts = {} if files else _configured_templates(directory)
    if not files | texts:
        raise RiverError(
            f"{directory}: has no chat template; accepted: chat_template.jinja, or chat_template in "
            f"{TOKENIZER_CONFIG}"
        )
    if name in files:
        return files[name], read_text(files[name], MAX_TEMPLATE_BYTES)
    if name in texts:
        return directory / TOKENIZER_CONFIG, texts[name]
    names = ", ".join(map(repr, files | texts))[:80]
    raise RiverError(f"{directory}: has no chat template {name[:40]!r}; accepted: chat_template={names}")


def _template_files(directory: Path) -> dict[str, Path]:
    """By name. Where there is one, transformers leaves out all that tokenizer_config.json has."""
    files = {DEFAULT: directory / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    return {name: path for name, path in files.items() if is_regular(path)}


def _configured_templates(directory: Path) -> dict[str, str]:
    """The texts in tokenizer_config.json by name: one is as good as a list with a default one alone."""
    path = directory / TOKENIZER_CONFIG
    found = read_json_object(path).get("chat_template") if is_regular(path) else None
    if found is None:
        return {}
    items = [{"name": DEFAULT, "template": found}] if isinstance(found, str) else found
    if not isinstance(items, list):
        raise RiverError(
            f"{path}: chat_template is {json.dumps(found)[:60]}; accepted: a template's text, or a list "
            "of objects with name and template"
        )
    for item in items:
        if not isinstance(item, dict) or not all(isinstance(item.get(k), str) for k in ("name", "template")):
            raise RiverError(
                f"{path}: chat_template holds {json.dumps(item)[:60]}; accepted: objects of name and template"
            )
        if len(item["template"]) > MAX_TEMPLATE_BYTES:
            raise RiverError(
                f"{path}: a chat_template of {len(item['template'])} characters; accepted: at most 1 MiB"
            )
    return {item["name"]: item["template"] for item in items}


def checked_messages(messages) -> list[dict]:
    """Messages as templates get them: without keys that hold None, and reasoning by its usual name."""
    if not isinstance(messages, (list, tuple)) or not messages:
        what = "no messages" if isinstance(messages, (list, tuple)) else f"a {type(messages).__name__}"
        raise RiverError(f"{what} for the chat template; accepted: a list of {MESSAGE}")
    return [_checked_message(f"message {index}", message) for index, message in enumerate(messages)]


def _checked_message(name: str, message) -> dict:
    if not isinstance(message, Mapping):
        raise RiverError(f"{name} is a {type(message).__name__}; accepted: {MESSAGE}")
    message = {key: value for key, value in message.items() if value is not None}
    for key in ("role", "content"):
        if key not in message and not (key == "content" and "tool_calls" in message):
            raise RiverError(f"{name} has no {key!r}; accepted: {MESSAGE}")
    if not isinstance(message["role"], str):
        raise RiverError(f"the role of {name} is a {type(message['role']).__name__}; accepted: text")
    _check_content(name, message.get("content", ""))
    reasoning = next((message[key] for key in REASONING if key in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning} | message | {"reasoning_content": reasoning}
    return message


def _check_content(name: str, content) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, (list, tuple)):
        raise RiverError(f"the content of {name} is a {type(content).__name__}; accepted: {CONTENT}")
    for part in content:
        if not isinstance(part, Mapping):
            raise RiverError(f"{name} has a {type(part).__name__} in its content; accepted: {CONTENT}")
        if part.get("type") != "text":
            raise RiverError(f"{name} has a part of type {str(part.get('type'))[:40]!r}; accepted: {CONTENT}")
        if not isinstance(part.get("text"), str):
            raise RiverError(f"{name} has a text part without text; accepted: {CONTENT}")
