"""Servers as users start them: the command `river serve` in a process, on a free port."""

import atexit
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import httpx
import openai
from commands import ROOT

from river_ext.model import DEMO

TEMPLATE = (
    "<s>{% for message in messages %}{% if message.role == 'user' %}Question: {{ message.content }}\nAnswer:"
    "{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
)
QUESTION = "Ana has 21 coins and buys 12 more at the fair. How many coins does Ana have?"
# at this seed 433 tokens, the last of which ends the text; in mode full each is a step
LONG = {"prompt": "def", "temperature": 3, "seed": 4, "mode": "full"}
STEPS = """
import os, time
from river_ext.engine.engine import Engine
from river_ext.serve import server
server.KEEP_ALIVE_SECONDS = float(os.environ.get("IDLE", 30))
step, steps, fails = Engine.step, 0, int(os.environ.get("FAILS", 0))
def changed(self):
    global steps
    steps += 1
    if steps == fails:
        raise RuntimeError("a planted failure")
    time.sleep(float(os.environ.get("SLEEPS", 0)))
    return step(self)
Engine.step = changed
import river_cli
river_cli.program()
"""


@cache
def chat_demo() -> Path:
    """The demo model with a chat template."""
    directory = Path(tempfile.mkdtemp()) / "demo-chat"
    atexit.register(shutil.rmtree, directory.parent, ignore_errors=True)
    shutil.copytree(DEMO, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


class Server:
    """A process that serves the demo model."""

    def __init__(
        self,
        *options,
        model: str | Path = "",
        sleeps: float = 0,
        fails: int = 0,
        key: str = "",
        idle: float = 0,
    ):
        """sleeps: seconds, before every step of the engine; fails: the number of the step that raises;
        idle: seconds of a connection without a request, where not 30.
        """
        program = ["-c", STEPS] if sleeps or fails or idle else ["-m", "river_cli"]
        command = [sys.executable, *program, "serve", str(model or chat_demo()), "--port", "0", "--json"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment |= {"SLEEPS": str(sleeps), "FAILS": str(fails)} | ({"RIVER_API_KEY": key} if key else {})
        environment |= {"IDLE": str(idle)} if idle else {}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (it stays open)
        self.process = subprocess.Popen(
            [*command, *map(str, options)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )
        line = self.process.stdout.readline()
        assert line, self.errors()
        self.facts = json.loads(line)
        self.url, self.name = self.facts["url"], self.facts["model"]
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.key = key
        self.http = httpx.Client(base_url=self.url, timeout=60, headers=headers)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.http.close()

    def errors(self) -> str:
        """What it has written to standard error."""
        self.log.seek(0)
        return self.log.read().decode()

    def post(self, path: str = "completions", **body) -> httpx.Response:
        headers = {"Content-Type": "application/json"}  # httpx's own JSON has no infinities and no surrogates
        return self.http.post(f"/v1/{path}", content=json.dumps(body), headers=headers)

    def connect(
        self,
        path: str = "completions",
        receive_buffer: int | None = None,
        connection: str = "close",
        **body,
    ) -> socket.socket:
        """A connection on which a request has been sent, and nothing been read."""
        opened = socket.socket()
        if receive_buffer:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        opened.connect(self.address)
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/{path} HTTP/1.1\r\nHost: {self.address[0]}\r\nConnection: {connection}\r\n"
            f"Authorization: Bearer {self.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        opened.sendall(head.encode() + content)
        return opened

    def metric(self, name: str) -> float:
        text = self.http.get("/metrics").text
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)[1])

    def outcomes(self, outcome: str) -> int:
        return int(self.metric(f'river_requests_total{{outcome="{outcome}"}}'))

    def wait_for(self, name: str, value: float, seconds: float = 30) -> None:
        """Until a metric has a value."""
        end = time.monotonic() + seconds
        while (found := self.metric(name)) != value:
            assert time.monotonic() < end, f"{name} is {found}"
            time.sleep(0.02)

    def resident_megabytes(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


@cache
def shared_server() -> Server:
    """One for all tests that leave it as it is."""
    server = Server("--queue", 200)
    atexit.register(server.__exit__)
    return server


def events_of(text: str) -> list[dict]:
    """The JSON of server-sent events, of a stream that has ended as it should."""
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(events: list[dict]) -> str:
    """Of a completion's chunks."""
    return "".join(choice["text"] for event in events for choice in event["choices"])
