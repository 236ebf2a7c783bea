"""What the server refuses: by name, with what is accepted, in OpenAI's form; and it goes on."""

import json
import socket
import time
from contextlib import ExitStack, suppress

import openai
import pytest
from serving import LONG, Server, shared_server

from river_ext.serve.guard import MAX_BODIES, MAX_BODY


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


@pytest.fixture(autouse=True)
def goes_on(server):
    yield
    assert server.http.get("/health").status_code == 200
    assert server.process.poll() is None and server.errors() == ""


def error_of(reply, status: int = 400) -> dict:
    """The error of an answer, whose form is OpenAI's."""
    assert reply.status_code == status, reply.text
    (error,) = reply.json().values()
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


COMPLETION = [
    ({"n": 2}, "n=2 is not supported; accepted: 1", "n"),
    ({"best_of": 3}, "best_of=3 is not supported", "best_of"),
    ({"n": True}, "n=True is not supported", "n"),
    ({"echo": True}, "echo=True", "echo"),
    ({"presence_penalty": 0.5}, "presence_penalty=0.5 is not supported; accepted: 0", "presence_penalty"),
    ({"frequency_penalty": -1}, "frequency_penalty=-1", "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias={'5': 1}", "logit_bias"),
    ({"suffix": "x"}, "suffix='x'", "suffix"),
    ({"temprature": 1}, "no field 'temprature'; accepted: model, temperature", "temprature"),
    ({"\ud800": 1}, "no field '?ud800'; accepted:".replace("?", "\\"), "?"),
    ({"y" * 10_000: 1}, "no field 'yyyyy", "y" * 60),
    ({"temperature": "hot"}, "temperature='hot': input should be a valid number", "temperature"),
    ({"temperature": True}, "temperature=True", "temperature"),
    ({"temperature": -1}, "temperature=-1.0; accepted: a number from 0", "temperature"),
    ({"temperature": 1e999}, "temperature=inf", "temperature"),
    ({"top_p": 0}, "top_p=0.0; accepted", "top_p"),
    ({"top_k": 1.5}, "top_k=1.5", "top_k"),
    ({"top_k": -1}, "top_k=-1; accepted", "top_k"),
    ({"min_p": 2}, "min_p=2.0; accepted", "min_p"),
    ({"max_tokens": 0}, "max_tokens=0: input should be greater than or equal to 1", "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens=1000000000000000000000000000000; accepted: 512", "prompt"),
    ({"max_tokens": "9"}, "max_tokens='9'", "max_tokens"),
    ({"seed": 2**63}, "seed=9223372036854775808; accepted", "seed"),
    ({"seed": "x"}, "seed='x'", "seed"),
    ({"stop": 5}, "stop=5", "stop"),
    ({"stop": ["a", 5]}, "stop.1=5", "stop.1"),
    ({"stop": [""]}, "stop=['']; accepted", "stop"),
    ({"stop": "x" * 70_000}, "stop has 70000 characters", "stop"),
    ({"logprobs": 21}, "logprobs=21", "logprobs"),
    ({"logprobs": True}, "logprobs=True", "logprobs"),
    ({"stream": "yes"}, "stream='yes'", "stream"),
    ({"stream_options": {"usage": True}}, "no field 'usage'; accepted: include_", "stream_options.usage"),
    ({"user": 5}, "user=5", "user"),
    ({"mode": "full_w4"}, "mode='full_w4'; accepted: lossless, river, full", "mode"),
    ({"threshold": 0.5}, "threshold with mode='lossless'", "threshold"),
    ({"threshold": [0.5, 1], "mode": "river"}, "threshold=[0.5, 1], a list of 2; accepted", "threshold"),
    ({"threshold": "x"}, "threshold: 'x'; accepted: a number, or a list of one for", "threshold"),
    ({"threshold": [1, True]}, "threshold: [1, True]; accepted", "threshold"),
    ({"min_layers": 2, "mode": "full"}, "min_layers with mode='full'", "min_layers"),
    ({"min_layers": 17, "mode": "river"}, "min_layers=17; accepted: an integer from 1 to 16", "min_layers"),
    ({"draft_tokens": 8}, "draft_tokens=8; accepted: an integer from 1 to 7", "draft_tokens"),
    ({"draft_tokens": 2, "mode": "full"}, "draft_tokens=2 needs mode='lossless'", "draft_tokens"),
    ({"prompt": ""}, "the prompt is empty", "prompt"),
    ({"prompt": []}, "the prompt is empty", "prompt"),
    ({"prompt": 5}, "prompt: accepted: text, or a list of token ids", "prompt"),
    ({"prompt": None}, "prompt is missing", "prompt"),
    ({"prompt": ["a", "b"]}, "prompt: 2 prompts; accepted: one a request", "prompt"),
    ({"prompt": [1, 10**6]}, "prompt holds 1000000; accepted: token ids from 0 to", "prompt"),
    ({"prompt": [1.5]}, "prompt: accepted", "prompt"),
    ({"prompt": {"input_ids": [1]}}, "prompt: accepted", "prompt"),
    ({"prompt": [{"role": "user", "content": "x"}]}, "prompt: accepted", "prompt"),
    ({"prompt": "a\ud800"}, "lone surrogate", "prompt"),
    ({"prompt": "x " * 600}, "accepted: 512 in all", "prompt"),
    ({"prompt": "x" * 100_000}, "a text of 100000 characters; accepted", "prompt"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message, param", COMPLETION, ids=lambda value: str(value)[:40])
def test_bodies_of_completions(server, changes, message, param):
    error = error_of(server.post(**{"prompt": "x", "max_tokens": 2} | changes))
    assert message in error["message"] and len(error["message"]) < 400, error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


USER = {"role": "user", "content": "x"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
CHAT = [
    ({"tools": [{"type": "function"}]}, "tools=[{'type': 'function'}] is not supported"),
    ({"tool_choice": "required"}, "tool_choice='required' is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format={'type': 'json_object'} is not"),
    ({"modalities": ["audio"]}, "modalities=['audio'] is not"),
    ({"messages": []}, "the prompt is empty"),
    ({"messages": None}, "messages is missing"),
    ({"messages": "hi"}, "messages: accepted: a list of objects with role and content"),
    ({"messages": [USER, "hi"]}, "messages: accepted"),
    ({"messages": [{"content": "x"}]}, "message 0 has the role None; accepted: system, developer, user"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "message 0 has the role 'tool'"),
    ({"messages": [USER, {"role": "user"}]}, "message 1 has no 'content'"),
    ({"messages": [{"role": "user", "content": 5}]}, "the content of message 0 is a int"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "message 0 has a part of type 'image_url'"),
    ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "message 0 has tool_calls"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
    ({"top_logprobs": 2}, "top_logprobs=2 needs logprobs=true"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs=21"),
    ({"logprobs": 2}, "logprobs=2: input should be a valid boolean"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens=3 and max_completion_tokens=4"),
    ({"prompt": "x"}, "no field 'prompt'; accepted: model"),
]


@pytest.mark.parametrize("changes, message", CHAT, ids=lambda value: str(value)[:40])
def test_bodies_of_chats(server, changes, message):
    error = error_of(server.post("chat/completions", **{"messages": [USER]} | changes))
    assert message in error["message"] and len(error["message"]) < 400, error["message"]
    assert error["param"] == next(iter(changes))


@pytest.mark.parametrize("stream", [False, True])
def test_the_client_raises(server, stream):
    with pytest.raises(openai.BadRequestError, match="n=2 is not supported"):
        server.openai.completions.create(model=server.name, prompt="x", n=2, stream=stream)
    with pytest.raises(openai.NotFoundError, match="model='gpt-x'; accepted: 'demo-chat'"):
        server.openai.completions.create(model="gpt-x", prompt="x", stream=stream)


JSON_HEADER = {"Content-Type": "application/json"}
BODIES = [
    (b"", {}, "JSON"),
    (b"", JSON_HEADER, "JSON"),
    (b"{", JSON_HEADER, "the body is no JSON"),
    (b'{"prompt": "x"} x', JSON_HEADER, "the body is no JSON"),
    (b"[1]", JSON_HEADER, "accepted: a JSON object"),
    (b"null", JSON_HEADER, "JSON"),
    (b"5", JSON_HEADER, "accepted: a JSON object"),
    (b"\xff\xfe\x00", JSON_HEADER, "body"),
    (b"[" * 100_000, JSON_HEADER, "body"),
    (b'{"max_tokens": ' + b"9" * 5000 + b"}", JSON_HEADER, "body"),
    (b'{"prompt": "x"}', {"Content-Type": "text/plain"}, "Content-Type: application/json"),
    (b"prompt=x", {"Content-Type": "application/x-www-form-urlencoded"}, "Content-Type: application/json"),
]


@pytest.mark.parametrize("body, headers, message", BODIES, ids=lambda value: str(value)[:40])
def test_bodies_that_are_no_json_object(server, body, headers, message):
    reply = server.http.post("/v1/completions", content=body, headers=headers)
    assert message in error_of(reply)["message"]


def test_bodies_that_are_too_large(server):
    """With their length in the header, and in chunks without one."""
    large = b" " * (MAX_BODY + 1)

    def in_chunks():
        for start in range(0, len(large), 1 << 16):
            yield large[start : start + (1 << 16)]

    for content in large, in_chunks():
        try:
            reply = server.http.post("/v1/completions", content=content, headers=JSON_HEADER)
        except OSError:  # it may have closed before all was written
            continue
        except Exception as error:
            assert "httpx" in type(error).__module__
            continue
        assert "accepted: 8 MiB" in error_of(reply, 413)["message"]
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999999999\r\n\r\n"
    assert b" 413 " in raw(server, head)


def test_a_list_of_what_is_wrong_takes_no_memory(server):
    before = server.resident_megabytes()
    assert error_of(server.post(prompt="x", stop=[5] * 300_000))["param"] == "stop.0"
    assert server.resident_megabytes() < before + 60


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/v1/completions", 405), ("POST", "/health", 405), ("GET", "/v1/embeddings", 404),
    ("GET", "/v1/models/none", 404), ("GET", "/..%2f..%2fetc/passwd", 404),
    ("OPTIONS", "/v1/completions", 405),
])  # fmt: skip
def test_paths_and_methods(server, method, path, status):
    error_of(server.http.request(method, path), status)


# --- headers, as no client sends them -------------------------------------------------------------------


def raw(server: Server, data: bytes) -> bytes:
    """What the server answers to bytes, until it closes."""
    with socket.create_connection(server.address, timeout=20) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    return answer


BODY = json.dumps(LONG | {"max_tokens": 2}).encode()


def request_with(*headers: bytes) -> bytes:
    first = b"POST /v1/completions HTTP/1.1", b"Content-Type: application/json", b"Connection: close"
    return b"\r\n".join([*first, *headers, b"", BODY])


LENGTH, HOST = b"Content-Length: %d" % len(BODY), b"Host: 127.0.0.1"


@pytest.mark.parametrize("headers, status", [
    ((HOST, LENGTH), 200),
    ((b"host: LocalHost:99", LENGTH), 200),
    ((HOST, LENGTH, b"Content-Length: 5"), 400),
    ((HOST, b"Content-Length: -5"), 400),
    ((HOST, b"Content-Length: 1e3"), 400),
    ((HOST, b"Transfer-Encoding: gzip"), 400),
    ((HOST, LENGTH, b"X: a\x00b"), 400),
    ((HOST, LENGTH, b"Transfer-Encoding: chunked"), 400),
    ((HOST, LENGTH, b"X: a", b" folded"), 200),
    ((HOST, HOST, LENGTH), 400),
    ((LENGTH,), 400),
    ((b"Host: evil.example", LENGTH), 403),
    ((b"Host: 127.0.0.1.evil.example:80", LENGTH), 403),
    ((b"Host: [::1]:80", LENGTH), 200),
    ((b"Host: [::1]", LENGTH), 200),
])  # fmt: skip
def test_headers(server, headers, status):
    answer = raw(server, request_with(*headers))
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]


def test_other_loopback_addresses_have_names_too():
    with Server("--host", "127.0.0.2") as other:
        for host, status in (b"127.0.0.2", 200), (b"localhost", 200), (b"evil.example", 403):
            answer = raw(other, request_with(b"Host: " + host, LENGTH))
            assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]


def test_heads_that_do_not_come():
    """Not at all, or byte by byte; also where a request came before."""
    with Server(idle=0.6) as slow:
        head = request_with(HOST, LENGTH).replace(b"Connection: close\r\n", b"", 1)
        for before in b"", head:
            for bytes_of_head in 0, 1000:
                with socket.create_connection(slow.address, timeout=20) as connection:
                    connection.sendall(before)
                    if before:
                        answer = b""
                        while not answer.endswith(b"}}"):
                            answer += connection.recv(1 << 16)
                    start = time.monotonic()
                    with suppress(ConnectionError):
                        for _ in range(bytes_of_head):
                            connection.sendall(b"G")
                            time.sleep(0.02)
                        assert connection.recv(1 << 16) == b""
                    assert 0.4 < time.monotonic() - start < 6


def test_bodies_have_a_limit_together(server):
    """Of what is read or answered; small ones get through, and large ones do once the others are gone."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % MAX_BODY
    before, full, answer = server.resident_megabytes(), server.outcomes("full"), b""
    with ExitStack() as stack:
        for _ in range(MAX_BODIES // MAX_BODY):
            connection = stack.enter_context(socket.create_connection(server.address, timeout=20))
            connection.sendall(head + b" " * (MAX_BODY - 1))
        end = time.monotonic() + 20
        while not answer and time.monotonic() < end:
            with socket.create_connection(server.address, timeout=0.5) as another, suppress(TimeoutError):
                another.sendall(head)
                while part := another.recv(1 << 16):
                    answer += part
        (error,) = json.loads(answer.partition(b"\r\n\r\n")[2]).values()
        assert answer.startswith(b"HTTP/1.1 429 ") and b"\r\nretry-after: 1\r\n" in answer
        assert error["code"] == "bodies_full" and "accepted: 64 MiB in all" in error["message"]
        assert server.outcomes("full") == full + 1 and server.post(**LONG).status_code == 200
        assert server.resident_megabytes() < before + 2.5 * (MAX_BODIES >> 20)
    large = LONG | {"max_tokens": 2, "user": "x" * (MAX_BODY // 2)}
    while (status := server.post(**large).status_code) != 200 and time.monotonic() < end + 20:
        time.sleep(0.02)
    assert status == 200


def test_headers_without_an_end(server):
    """Of which no more is kept than a packet."""
    with socket.create_connection(server.address, timeout=20) as connection:
        try:
            for _ in range(100):
                connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000)
            answer = connection.recv(1 << 16)
        except ConnectionError:  # it has closed already
            answer = b"HTTP/1.1 400 "
    assert answer.startswith(b"HTTP/1.1 400 ")


def test_what_is_no_http(server):
    assert raw(server, b"\x16\x03\x01\x02\x00\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    two = request_with(HOST, LENGTH).replace(b"Connection: close\r\n", b"", 1)
    answers = raw(server, two + request_with(HOST, LENGTH))  # in one packet
    assert answers.count(b"HTTP/1.1 200 ") == 2
