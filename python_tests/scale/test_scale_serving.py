"""Replicas behind one address, on a local Ray cluster: what they answer is what one process says."""

import asyncio
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import clusters
import httpx
import openai
import pytest
from clusters import kill_one, start_cluster, wait_until
from ray import serve
from ray.exceptions import TaskCancelledError
from serving import LONG, QUESTION, chat_demo
from starlette.testclient import TestClient
from tiny_model import demo_model

import river_ext
from river_ext import RiverError, scale
from river_ext.scale import serving

REPLICA = "ServeReplica:default:river"
STREAMS = 12
QUESTIONS = [f"Question: {number}" for number in range(24)]


@pytest.fixture(scope="module")
def url():
    """Of two replicas."""
    start_cluster()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"port": port}, logging_config={"log_level": "ERROR"})
    serve.run(scale.app({"model": str(chat_demo()), "replicas": "2", "threads": "1", "max_len": "512"}))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def texts(url: str, prompts, new_tokens: int, meanwhile=lambda: None) -> list[str]:
    """Of requests that are all sent at once, by OpenAI's client, which asks again after an error."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5)
    fixed = {"model": "demo-chat", "temperature": 3, "extra_body": {"mode": "river", "threshold": 0.9}}

    def one(seed: int, prompt: str) -> str:
        asked = {"prompt": prompt, "seed": seed, "max_tokens": new_tokens}
        return client.completions.create(**fixed, **asked).choices[0].text

    with ThreadPoolExecutor(len(prompts)) as threads:
        found = [threads.submit(one, seed, prompt) for seed, prompt in enumerate(prompts)]
        meanwhile()
        return [text.result() for text in found]


def expected(prompts, new_tokens: int) -> list[str]:
    options = {"mode": "river", "threshold": 0.9, "temperature": 3.0, "max_new_tokens": new_tokens}
    return [demo_model().generate(prompt, seed=seed, **options).text for seed, prompt in enumerate(prompts)]


def metrics(url: str, name: str, asked: int = 40) -> dict[str, float]:
    """A metric of each replica, if so many answers come from all of them."""
    found = {}
    for _ in range(asked):
        for line in httpx.get(f"{url}/metrics").text.splitlines():
            if line.startswith(name):
                found[line.partition('replica="')[2].partition('"')[0]] = float(line.rpartition(" ")[2])
    return found


def busy(url: str) -> list[str]:
    return [replica for replica, running in metrics(url, "river_requests_running", 6).items() if running]


def test_answers_of_two_replicas_are_those_of_one_process(url):
    assert texts(url, QUESTIONS, 24) == expected(QUESTIONS, 24)
    worked = metrics(url, "river_new_tokens_total")
    assert len(worked) == 2 and all(worked.values())


def test_the_api_is_that_of_the_server(url):
    with httpx.Client(base_url=url) as client:
        assert client.get("/health").json() == {"status": "ok", "model": "demo-chat"}
        assert client.get("/").text.startswith("<!doctype html>")
        (model,) = client.get("/v1/models").json()["data"]
        assert (model["id"], model["max_model_len"]) == ("demo-chat", 512)
        error = client.post("/v1/completions", json={"prompt": "def", "n": 2})
        assert (error.status_code, error.json()["error"]["param"]) == (400, "n")
        assert client.get("/health", headers={"Host": "elsewhere.example"}).status_code == 403
        chat = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "stream": True}
        lines = client.post("/v1/chat/completions", json=chat).text.strip().split("\n\n")
        *chunks, done = lines
        said = "".join(json.loads(c[6:])["choices"][0]["delta"].get("content", "") for c in chunks)
        asked = [{"role": "user", "content": QUESTION}]
        assert (done, len(chunks) > 3) == ("data: [DONE]", True)
        assert said == river_ext.load(chat_demo(), device="cpu").generate(asked, mode="full").text


def test_a_replica_is_killed_in_mid_run(url):
    """Clients that ask again get all answers; its streams break off; another one takes its place."""
    long = dict(LONG, max_tokens=400, stream=True)
    cut = []

    def stream() -> None:
        try:
            with httpx.stream("POST", f"{url}/v1/completions", json=long, timeout=60) as reply:
                cut.append("[DONE]" in reply.read().decode())
        except httpx.RemoteProtocolError:
            cut.append(False)

    def kill() -> None:
        with ThreadPoolExecutor(STREAMS) as threads:
            for _ in range(STREAMS):
                threads.submit(stream)
            wait_until(lambda: len(busy(url)) == 2)
            kill_one(REPLICA)

    prompts = ["def"] * 8
    assert texts(url, prompts, 300, meanwhile=kill) == expected(prompts, 300)
    assert len(cut) == STREAMS and not all(cut) and any(cut)
    wait_until(lambda: replicas() == {"RUNNING": 2})
    assert texts(url, QUESTIONS[:4], 8) == expected(QUESTIONS[:4], 8)


def replicas() -> dict:
    return serve.status().applications["default"].deployments["river"].replica_states


# --- without a cluster ----------------------------------------------------------------------------------


def deployment(**arguments):
    return scale.app(arguments)._bound_deployment


def test_a_replica_whose_engine_has_failed_says_so():
    """And so Ray replaces it."""
    check_health = deployment().func_or_class.check_health
    worker = SimpleNamespace(failure=None)
    replica = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(worker=worker)))
    check_health(replica)
    worker.failure = ValueError("a planted failure")
    with pytest.raises(RuntimeError, match="a planted failure"):
        check_health(replica)


def test_the_deployment_is_what_is_asked_for(monkeypatch):
    fixed = deployment(replicas=3, threads=2, slots=4, queue=5, timeout=9)
    config = fixed._deployment_config
    assert (fixed.num_replicas, config.autoscaling_config) == (3, None)
    assert (config.max_ongoing_requests, config.max_queued_requests) == (8, 5)
    assert config.graceful_shutdown_timeout_s == 9
    assert fixed.ray_actor_options == {"num_cpus": 2, "num_gpus": 0}
    growing = deployment(replicas=1, max_replicas=4, device="cuda", slots=4)
    scaling = growing._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 4)
    assert growing.ray_actor_options == {"num_cpus": 1, "num_gpus": 1}
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(9))
    assert deployment(replicas=2).ray_actor_options["num_cpus"] == 4
    assert deployment(replicas=1, max_replicas=3).ray_actor_options["num_cpus"] == 3


HOSTS = [(None, 403), ("testserver", 200), ("a.example, TestServer", 200), ("*", 200)]


@pytest.mark.parametrize("hosts, status", HOSTS)
def test_hosts_and_key(monkeypatch, hosts, status):
    """Of an app in this process, where the client calls it by the name testserver."""
    monkeypatch.setattr(
        serve, "get_replica_context", lambda: SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    )
    asked = serving.Arguments(max_len=64, **{"hosts": hosts} if hosts else {})
    replica = serving.checked_replica(None, replicas=1, threads=1, max_len=64)
    app = serving.replica_app(replica, asked, "secret")
    with TestClient(app) as client:
        assert client.get("/health").status_code == status
        if status == 200:
            assert client.get("/metrics").status_code == 401
            text = client.get("/metrics", headers={"Authorization": "Bearer secret"}).text
            assert 'river_slots{replica="r1"} 8.0' in text.splitlines()


def test_a_client_of_whom_ray_says_by_an_exception_that_he_has_gone(monkeypatch):
    """He has gone, as any other: there is no mistake in the server."""
    monkeypatch.setattr(
        serve, "get_replica_context", lambda: SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    )
    replica = serving.checked_replica(None, replicas=1, threads=1)
    app = serving.replica_app(replica, serving.Arguments(hosts="*"), None)
    body = json.dumps(LONG | {"max_tokens": 400, "stream": True}).encode()
    headers = [(b"host", b"a"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": headers,
    }
    waiting, sent = [{"type": "http.request", "body": body}], []

    async def receive():
        if waiting:
            return waiting.pop()
        while not sent:
            await asyncio.sleep(0.01)
        raise TaskCancelledError

    async def send(message):
        sent.append(message)

    with TestClient(app) as client:
        client.portal.call(app, scope, receive, send)
        text = client.get("/metrics").text
    assert 'river_requests_total{outcome="disconnected",replica="r1"} 1.0' in text
    assert sent[-1]["more_body"]


@pytest.mark.parametrize(
    "arguments, why",
    [
        ({"replicas": "x"}, "replicas='x': input should be a valid integer"),
        ({"replicas": 0}, "replicas=0: input should be greater than or equal to 1"),
        ({"replica": 2}, "no argument 'replica'; accepted: model, river"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas=2; accepted: replicas, 3 here, or more"),
        ({"model": "/nowhere"}, "/nowhere: no such directory"),
        ({"river": "/nowhere"}, "/nowhere: no river.json in it"),
        ({"mode": "full_w4"}, "mode='full_w4': input should be 'lossless', 'river' or 'full'"),
        ({"threshold": "nan"}, "threshold=nan; accepted: a number, not NaN"),
        ({"timeout": "0"}, "timeout='0': input should be greater than 0"),
        ({"slots": 9}, "slots=9: input should be less than or equal to 8"),
        ({"max_len": 99999}, "max_len=99999; accepted: an integer from 1 to 512"),
        ({"dtype": "int3"}, "dtype 'int3' is not supported"),
    ],
)
def test_refused_before_replicas_start(arguments, why):
    with pytest.raises(RiverError) as refused:
        scale.app(arguments)
    assert str(refused.value).find(why) in (0, len("load: "))
    assert refused.value.format_message() == str(refused.value)  # what `serve run` prints


def test_a_model_without_a_tokenizer(tiny_checkpoint):
    with pytest.raises(RiverError, match="has no tokenizer.json; accepted: a model with a tokenizer"):
        scale.app({"model": str(tiny_checkpoint())})


def test_a_key_that_is_none(monkeypatch):
    monkeypatch.setenv("RIVER_API_KEY", " x")
    with pytest.raises(RiverError, match="RIVER_API_KEY is no key; accepted"):
        scale.app({})


assert clusters.ray  # or all of this file is skipped, by one line
