"""Many at once, clients that go, stop to read or come too many, and how a server ends."""

import argparse
import asyncio
import json
import random
import signal
import socket
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import openai
import pytest
from serving import LONG, Server, events_of, shared_server, text_of
from tiny_model import demo_model

from bench.cpu import serve as serve_bench
from river_ext.serve.server import MOST_AHEAD

STREAMS, NEW_TOKENS, REQUESTS = 60, 32, 300  # bench/cpu/serve.py has more


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


def text_options(number: int) -> dict:
    """Of a request like no other, in one of three modes."""
    mode = ("lossless", "river", "full")[number % 3]
    options = {"mode": mode, "prompt": f"def {number}", "temperature": 3, "seed": number}
    return options | ({"threshold": 0.9} if mode == "river" else {})


def read_to_end(connection: socket.socket) -> bytes:
    answer = b""
    while part := connection.recv(1 << 16):
        answer += part
    return answer


def text_in(answer: bytes) -> str:
    """Of a stream's whole answer, with its head and the lengths of its chunks of HTTP."""
    _, _, body = answer.partition(b"\r\n\r\n")
    data = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        data, body = data + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return text_of(events_of(data.decode()))


def reset(connection: socket.socket) -> None:
    """Ends a connection as a process does that is killed with unread data."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_many_streams_of_which_some_are_cut_off(server):
    """The others get what they get alone, and all slots are free afterwards."""
    choose = random.Random(0)
    cut = set(choose.sample(range(STREAMS), STREAMS // 3))
    parts = {number: choose.randrange(0, 4) for number in cut}
    before = {outcome: server.outcomes(outcome) for outcome in ("length", "stop", "disconnected")}

    def run(number):
        asked = text_options(number) | {"max_tokens": NEW_TOKENS, "stream": True}
        if number not in cut:
            with server.connect(**asked) as connection:
                return text_in(read_to_end(connection))
        connection = server.connect(**asked | {"max_tokens": 400})
        for _ in range(parts[number]):
            connection.recv(100)
        reset(connection)

    with ThreadPoolExecutor(STREAMS) as pool:
        texts = list(pool.map(run, range(STREAMS)))
    whole = [number for number in range(STREAMS) if number not in cut]
    for number in whole:
        expected = demo_model().generate(**text_options(number) | {"max_new_tokens": NEW_TOKENS})
        assert texts[number] == expected.text, number
    server.wait_for("river_requests_running", 0)
    counts = {outcome: server.outcomes(outcome) - count for outcome, count in before.items()}
    assert sum(counts.values()) == STREAMS and len(cut) // 2 < counts["disconnected"] <= len(cut)


def test_slow_readers_hold_nobody_up(server):
    asked = LONG | {"max_tokens": 400, "stream": True, "logprobs": 20}  # more bytes than sockets hold
    slow = [server.connect(receive_buffer=4096, **asked) for _ in range(9)]  # one more than slots
    assert server.post(**LONG, max_tokens=24).status_code == 200
    answers = [read_to_end(connection) for connection in slow]
    for connection in slow:
        connection.close()
    expected = demo_model().generate(**LONG | {"max_new_tokens": 400}).text
    assert {text_in(answer) for answer in answers} == {expected}


def test_the_benchmark_of_faults_counts(server):
    """Of all that it asks for, nothing is lost, wrong or left."""
    args = argparse.Namespace(streams=15, new_tokens=8)
    client = lambda: httpx.AsyncClient(base_url=server.url, timeout=60)  # noqa: E731
    counts = asyncio.run(serve_bench.faults(args, demo_model(), server.process, client))
    assert counts | {"noticed": 0} == {
        "streams": 15, "cut_off": 5, "whole": 10, "lost": 0, "wrong": 0, "noticed": 0, "left": 0
    }  # fmt: skip


def test_memory_stays_flat(server):
    def run(number):
        return server.post(**text_options(number), max_tokens=2, stream=number % 2 == 0).status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(run, range(REQUESTS // 3))) == {200}
        warm = server.resident_megabytes()
        assert set(pool.map(run, range(REQUESTS))) == {200}
    assert server.resident_megabytes() < warm + 8


# --- a server with little room, whose steps take long ---------------------------------------------------

STEP, SECONDS, KEY = 0.04, 2.0, "a key"


@pytest.fixture(scope="module")
def narrow():
    """One slot, one place to wait, two seconds for a request: 50 steps at most."""
    with Server("--slots", 1, "--queue", 1, "--timeout", SECONDS, sleeps=STEP, key=KEY) as server:
        yield server


def test_too_many_are_told_to_come_later(narrow):
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(narrow.post, **LONG, max_tokens=15) for _ in range(2)]
        narrow.wait_for("river_requests_waiting", 1)
        with pytest.raises(openai.RateLimitError, match="2 requests are running or waiting") as error:
            narrow.openai.completions.create(model="demo-chat", prompt="x")
        assert error.value.response.headers["retry-after"] == "1"
        assert [done.result().status_code for done in running] == [200, 200]
    assert narrow.outcomes("full") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_who_goes_frees_the_slot(narrow, stream):
    gone, tokens = narrow.outcomes("disconnected"), narrow.metric("river_new_tokens_total")
    connection = narrow.connect(**LONG, max_tokens=400, stream=stream)
    narrow.wait_for("river_requests_running", 1)
    time.sleep(5 * STEP)
    reset(connection)
    narrow.wait_for("river_requests_running", 0, seconds=SECONDS / 2)
    assert narrow.outcomes("disconnected") == gone + 1
    assert narrow.post(**LONG, max_tokens=2).status_code == 200
    assert narrow.metric("river_new_tokens_total") - tokens < 40


@pytest.mark.parametrize("ahead", [100, 2 * MOST_AHEAD])
def test_a_client_who_goes_frees_the_slot_though_it_has_sent_more(narrow, ahead):
    """The beginning of its next request; or more than is kept, upon which it has to go."""
    connection = narrow.connect(**LONG, max_tokens=400, connection="keep-alive")
    narrow.wait_for("river_requests_running", 1)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {ahead}\r\n\r\n"
    connection.sendall(head.encode() + b" " * (ahead - 1))
    time.sleep(2 * STEP)
    if ahead < MOST_AHEAD:
        assert narrow.metric("river_requests_running") == 1
        connection.close()
    narrow.wait_for("river_requests_running", 0, seconds=SECONDS / 2)
    connection.close()


def test_what_follows_the_last_request_of_a_connection_is_not_heard(narrow):
    with narrow.connect(**LONG, max_tokens=12, stream=True) as connection:
        answer = connection.recv(1)
        connection.sendall(b"\r\nGET / HTTP/1.1\r\n\r\n")
        answer += read_to_end(connection)
    assert text_in(answer) == demo_model().generate(**LONG | {"max_new_tokens": 12}).text
    assert narrow.errors() == ""


def test_a_request_that_takes_too_long(narrow):
    reply = narrow.post(**LONG, max_tokens=400)
    assert (
        reply.status_code == 504 and "more than 2 s, the server's limit" in reply.json()["error"]["message"]
    )
    stream = narrow.openai.completions.create(
        model="demo-chat", prompt="def", temperature=3, seed=4, max_tokens=400, stream=True,
        extra_body={"mode": "full"},
    )  # fmt: skip
    texts = []
    with pytest.raises(openai.APIError, match="more than 2 s"):
        for chunk in stream:
            texts.append(chunk.choices[0].text)
    assert demo_model().generate(**LONG | {"max_new_tokens": 60}).text.startswith("".join(texts)) and texts
    assert narrow.outcomes("timeout") == 2
    narrow.wait_for("river_requests_running", 0)


@pytest.mark.parametrize("headers", [
    {}, {"Authorization": "Bearer a kez"}, {"Authorization": f"Basic {KEY}"},
    {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer"},
    {"Authorization": b"Bearer \xff\xe9"},
    [("Authorization", "Bearer no"), ("Authorization", f"Bearer {KEY}")],
])  # fmt: skip
def test_keys(narrow, headers):
    for method, path in (
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/x"),
    ):
        reply = httpx.request(method, narrow.url + path, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{narrow.url}/health", headers=headers).status_code == 200
    assert httpx.get(narrow.url, headers=headers).status_code == 200
    assert narrow.http.get("/v1/models").status_code == 200


# --- the end --------------------------------------------------------------------------------------------


def test_sigterm_lets_requests_end_and_a_second_one_does_not():
    with Server("--slots", 1, sleeps=STEP) as server:
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(server.post, **LONG, max_tokens=20, stream=True) for _ in range(2)]
            server.wait_for("river_requests_waiting", 1)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(httpx.ConnectError):
                httpx.get(server.url)
            expected = demo_model().generate(**LONG | {"max_new_tokens": 20}).text
            assert [text_of(events_of(done.result().text)) for done in running] == [expected] * 2
        assert server.process.wait(20) == 0
        assert server.errors() == ""
    with Server(sleeps=STEP) as server:
        connection = server.connect(**LONG, max_tokens=400, stream=True)
        server.wait_for("river_requests_running", 1)
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        assert server.process.wait(5) == 130
        assert server.errors() == "\nriver: interrupted\n"
        answer = b""
        with suppress(ConnectionError):
            answer = read_to_end(connection)
        assert b"[DONE]" not in answer


def test_a_client_who_reads_nothing_does_not_keep_the_server_from_its_end():
    asked = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 20, **LONG}
    del asked["prompt"]
    content = json.dumps(asked).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n"
    with Server("--timeout", 2) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(server.address)
        request = head.encode() + b"Content-Type: application/json\r\n\r\n" + content
        connection.sendall(20 * request)  # whose answers are more than sockets hold
        answered = -1
        while (now := server.outcomes("stop")) > answered:
            answered = now
            time.sleep(1.5)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


def test_an_engine_that_fails_ends_all_requests_with_an_error():
    with Server("--slots", 1, sleeps=STEP, fails=25) as server:
        asked = LONG | {"max_tokens": 400}
        with ThreadPoolExecutor(4) as pool:
            streamed = pool.submit(server.post, **asked, stream=True)
            server.wait_for("river_requests_running", 1)
            waiting = [pool.submit(server.post, **asked, stream=stream) for stream in (False, True)]
            event = streamed.result().text.rstrip().split("\n\n")[-1]
        assert "the engine has failed (RuntimeError: a planted failure)" in event and "[DONE]" not in event
        for done in waiting:
            reply = done.result()
            assert (reply.status_code, reply.json()["error"]["type"]) == (503, "server_error")
        health = server.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        with pytest.raises(openai.InternalServerError, match="the engine has failed"):
            server.openai.completions.create(model="demo-chat", prompt="x")
        assert server.metric("river_engine_failed") == 1 and server.outcomes("error") == 4
        assert "RuntimeError: a planted failure" in server.errors()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0


# --- the command ----------------------------------------------------------------------------------------

COMMANDS = [
    (["--mode", "full_w4"], "--mode 'full_w4'; accepted: lossless, river, full"),
    (["--slots", "9"], "--slots=9; accepted: an integer from 1 to 8"),
    (["--queue", "-1"], "--queue=-1; accepted"),
    (["--port", "70000"], "--port=70000; accepted: an integer from 0 to 65535"),
    (["--timeout", "0"], "--timeout 0; accepted: seconds above 0"),
    (["--max-len", "513"], "--max-len=513; accepted: an integer from 1 to 512"),
    (["--threshold", "nan"], "threshold=nan"),
    (["--threshold", "calibrated"], "threshold='calibrated' needs a model that was loaded with calibrated="),
    (["--calibrated", "nowhere"], "nowhere: cannot be read"),
    (["--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 0: cannot be bound ("),
    (["--prot", "80"], "unrecognized arguments: --prot; did you mean --port?"),
]


@pytest.mark.parametrize("options, message", COMMANDS, ids=lambda value: str(value)[:30])
def test_the_command_refuses(refused, options, message):
    assert refused("serve", "--demo", "--port", "0", *options).startswith(message)


def test_a_port_that_is_taken(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused("serve", "--demo", "--port", port).endswith("cannot be bound (Address already in use)")


@pytest.mark.parametrize("key", ["", " x", "\u00e9", "a\nb"])
def test_keys_that_are_none(refused, monkeypatch, key):
    monkeypatch.setenv("RIVER_API_KEY", key)
    assert refused("serve", "--demo").startswith("RIVER_API_KEY is no key; accepted: printable ASCII")


def test_what_is_missing_is_named(refused, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("river_ext.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert refused("serve", "--demo") == (
        "river serve needs the module uvicorn; accepted: after pip install 'river_ext[serve]'"
    )
