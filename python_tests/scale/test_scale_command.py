"""`serve run` as users start it, with a cluster of its own."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import clusters  # noqa: F401 (skips where Ray is missing)
import httpx
import pytest
from clusters import wait_until
from serving import QUESTION, chat_demo
from tiny_model import demo_model

PORT = 8000  # of Ray Serve, where no file says otherwise


def test_serve_run(tmp_path):
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind(("127.0.0.1", PORT))
        except OSError:
            pytest.skip(f"port {PORT}, which serve run takes, is in use")
    command = [Path(sys.executable).parent / "serve", "run", "river_ext.scale:app"]
    arguments = [f"model={chat_demo()}", "replicas=1", "threads=1", "max_len=512"]
    own = {"RAY_ADDRESS": "local"}
    log = tmp_path / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            [*command, *arguments], env=os.environ | own, stdout=out, stderr=out, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{PORT}"
        wait_until(lambda: process.poll() is not None or answers(url))
        assert process.poll() is None, log.read_text()
        asked = {"prompt": QUESTION, "max_tokens": 8, "temperature": 0, "mode": "full"}
        answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()
        text = demo_model().generate(QUESTION, max_new_tokens=8, mode="full").text
        assert answer["choices"][0]["text"] == text
        process.send_signal(signal.SIGINT)
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False
