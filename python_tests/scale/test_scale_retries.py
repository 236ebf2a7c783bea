"""Lines and requests at which replicas die: they are tried a few times, and cost the others nothing."""

import json
import os
import signal
import socket

import httpx
import pytest
from clusters import start_cluster
from ray import serve
from tiny_model import demo_model

from river_ext import RiverError, scale
from river_ext.scale import answering, offline, serving

OPTIONS = {"mode": "full", "max_new_tokens": 6}


@pytest.fixture
def deaths(tmp_path, monkeypatch):
    """Plants faults, by prompt; the number of replicas that they have ended."""
    log = tmp_path / "deaths"
    log.touch()

    class Faulty(answering.Answering):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            submit = self.engine.submit

            def faulty(prompt, **options):
                if prompt in ("kill", "raise") or (prompt == "once" and "once" not in log.read_text()):
                    with log.open("a") as file:
                        file.write(prompt + "\n")
                    if prompt == "raise":
                        raise RuntimeError("a planted\nfailure")
                    os.kill(os.getpid(), signal.SIGKILL)
                return submit(prompt, **options)

            self.engine.submit = faulty

    monkeypatch.setattr(offline, "Answering", Faulty)
    return lambda: log.read_text().split()


def test_a_line_that_ends_its_replicas_costs_the_others_nothing(tmp_path, deaths, monkeypatch):
    start_cluster()
    monkeypatch.setattr(offline, "ROWS", 5)
    prompts = ["def", "once", "Question:", "kill", "a", "b", "c", "d", "raise", "e", "f"]
    (tmp_path / "prompts").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    files = tmp_path / "prompts", tmp_path / "answers"
    summary = scale.generate_file(*files, replicas=2, threads=1, **OPTIONS)
    assert summary == (len(prompts), 0, [4, 9])
    assert sorted(deaths()) == ["kill", "kill", "once", "raise", "raise", "raise"]
    answers = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == prompts
    for answer in answers:
        if "error" not in answer:
            assert answer["output"]["tokens"] == demo_model().generate(answer["prompt"], **OPTIONS).tokens
    said = "each of 3 tries of this line has ended its replica, 2 of them with no other line "
    assert answers[3]["error"] == said + "(its process was killed, for want of memory perhaps)"
    assert answers[8]["error"] == said + "(RuntimeError: a planted failure)"
    done = scale.generate_file(*files, resume=True, threads=1, **OPTIONS)
    assert done == (len(prompts), len(prompts), [4, 9]) and len(deaths()) == 6


def test_replicas_that_die_as_they_load(tmp_path, monkeypatch):
    start_cluster()

    class Faulty(answering.Answering):
        def __init__(self, replica, options, tries):
            super().__init__(Deadly(), options, tries)

    class Deadly:
        def load(self):
            with (tmp_path / "loads").open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(offline, "Answering", Faulty)
    (tmp_path / "prompts").write_text('{"prompt": "def"}')
    with pytest.raises(RiverError, match="a replica failed: replicas have died 3 times while they loaded"):
        scale.generate_file(tmp_path / "prompts", tmp_path / "answers", threads=1)
    assert (tmp_path / "loads").read_text() == "x" * answering.LOADS


def test_a_request_that_ends_its_replica_is_tried_once(tmp_path, monkeypatch):
    """Ray Serve gives it to no other one; who sent it gets an error, and the next request an answer."""
    log, load = tmp_path / "deaths", serving.replica_app

    def faulty(*given):
        app = load(*given)
        engine = app.state.worker.engine
        add = engine.add

        def deadly(sequence, *more):
            if sequence.request.prompt == [7, 7, 7]:
                with log.open("a") as file:
                    file.write("x")
                os.kill(os.getpid(), signal.SIGKILL)
            return add(sequence, *more)

        engine.add = deadly
        return app

    monkeypatch.setattr(serving, "replica_app", faulty)
    start_cluster()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"port": port}, logging_config={"log_level": "ERROR"})
    try:
        serve.run(scale.app({"replicas": "2", "threads": "1", "max_len": "64"}))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=60) as client:
            asked = {"prompt": [7, 7, 7], "max_tokens": 4}
            assert client.post("/completions", json=asked).status_code == 500
            assert log.read_text() == "x"
            assert client.post("/completions", json=asked | {"prompt": "def"}).status_code == 200
            assert log.read_text() == "x"
    finally:
        serve.shutdown()
