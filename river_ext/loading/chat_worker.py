"""Renders one chat template in a process of its own: messages come in as lines of JSON, their text goes out.

A template is a program that somebody else wrote. The sandbox of jinja2 keeps it from the machine, but not
from looping, growing without end, or arithmetic that no signal handler interrupts; limits of the process do.
The process stays alive between prompts because starting it takes a hundred times as long as rendering one.
This file imports neither torch nor the rest of the package and runs by its path, so that it starts quickly.
"""

import json
import re
import resource
import signal
import sys
import time
from datetime import datetime
from importlib.metadata import version

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

OLDEST_JINJA = (3, 1, 6)  # there are known ways out of the sandbox of older ones


class Complaint(Exception):
    """What is wrong with a template, as the end of a sentence that begins with it."""


class Refusal(Exception):
    """What a template raises by itself, about the messages."""


class Dict:
    """The function `dict` of a template, without the attributes of Python's."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args) -> dict:
        return dict.fromkeys(*args)


class PublicNamespace(Namespace):
    """A template's variables that outlive its loops; none has the name of one of Python's internals."""

    def __init__(*args, **kwargs):  # without names of its own, which a template may give away
        self, *args = args
        values = dict(*args, **kwargs)
        for name in values:
            refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name, value) -> None:
        refuse_private(name)
        Namespace.__setitem__(self, name, value)


class Generation(Extension):
    """The block {% generation %}, which marks what the assistant says for training, and renders as it is."""

    tags = {"generation"}

    def parse(self, parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller) -> str:
        return caller()


class Sandbox(ImmutableSandboxedEnvironment):
    """What templates find in transformers; but reading an attribute like __class__ ends them at once."""

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        self.filters["tojson"] = to_json
        self.globals |= {
            "dict": Dict(),
            "namespace": PublicNamespace,
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
        }

    def unsafe_undefined(self, obj, attribute):
        refuse_private(attribute)
        return super().unsafe_undefined(obj, attribute)


def refuse_private(name) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"the attribute {name!r} is unsafe")


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """jinja2's own one would escape what HTML does not hold."""
    options = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators}
    return json.dumps(value, sort_keys=sort_keys, **options)


def raise_exception(message):
    raise Refusal(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def compiled(source: str) -> jinja2.Template:
    found = version("jinja2")
    if tuple(int(number) for number in re.findall(r"\d+", found)[:3]) < OLDEST_JINJA:
        raise Complaint(f"needs jinja2 >= {'.'.join(map(str, OLDEST_JINJA))}; {found} is installed")
    try:
        return Sandbox().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise Complaint(f"does not compile: line {error.lineno}: {error.message}") from None
    except Exception as error:
        raise Complaint(f"does not compile: {described(error)}") from None


def rendered(template: jinja2.Template, variables: dict, max_characters: int) -> str:
    pieces, size = [], 0
    try:
        for piece in template.generate(**variables):
            pieces.append(piece)
            size += len(piece)
            if size > max_characters:
                raise Complaint(f"makes more than {max_characters} characters of the messages")
    except Refusal as error:
        raise Complaint(f"refuses the messages: {error}") from None
    except SecurityError as error:
        raise Complaint(f"is refused by the sandbox: {error}") from None
    except (Complaint, MemoryError):  # without memory the process had better end
        raise
    except Exception as error:
        raise Complaint(f"fails: {described(error)}") from None
    return "".join(pieces)


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def limit(kind: int, value: int) -> None:
    """What the system enforces, whatever the process is at. Limits of the user may be lower still."""
    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def main() -> None:
    """The template and its limits are in the first line of the standard input, variables in all others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the terminal is meant for the parent
    settings = json.loads(sys.stdin.buffer.readline())
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_AS, settings["memory"])
    template = None
    for line in sys.stdin.buffer:
        limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + settings["seconds"])
        try:
            template = template or compiled(settings["template"])
            reply = {"text": rendered(template, json.loads(line), settings["max_characters"])}
        except Complaint as complaint:
            reply = {"complaint": str(complaint)[:300]}
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
