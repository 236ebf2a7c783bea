"""Files of prompts through replicas on a local Ray cluster: the answers are those of one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
from threading import Thread

import pytest
from clusters import descendants, kill_one, ray, start_cluster, wait_until
from commands import ROOT
from serving import chat_demo
from tiny_model import demo_model

import river_ext
from river_ext import RiverError, scale
from river_ext.scale import offline

COUNT = 96
REPLICA = "MapWorker(MapBatches(Answering))"
OPTIONS = {"mode": "river", "threshold": 0.9, "temperature": 2.0, "max_new_tokens": 24}


def row(number: int) -> dict:
    return {"id": str(number), "prompt": f"Question: {number}", "options": {"seed": number}}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(COUNT)))
    return path


@pytest.fixture(scope="module")
def expected() -> list[dict]:
    """What one process says, each prompt alone."""
    outputs = [
        demo_model().generate(row(number)["prompt"], **OPTIONS, seed=number) for number in range(COUNT)
    ]
    names = ("text", "tokens", "exit_depths", "finish_reason")
    return [{name: getattr(output, name) for name in names} for output in outputs]


def check(path, expected: list[dict]) -> None:
    """Every answer once, in order, with the fields of its prompt."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line.pop("run") for line in lines}) == 1
    assert lines == [row(number) | {"output": output} for number, output in enumerate(expected)]


def run_and_kill(prompts, path, log) -> None:
    """The command, with a cluster of its own, which ends with it; when there are answers it is killed."""
    given = {**OPTIONS, "threads": 1, "replicas": 2, "prompts": prompts, "output": path}
    options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-c", "from river_ext.scale import offline; offline.ROWS = 8; "
               "import river_cli; river_cli.program()", "batch", "--demo", *options]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(log, "wb") as errors, subprocess.Popen(command, env=environment, stderr=errors) as run:
        wait_until(lambda: path.exists() and path.stat().st_size)
        replicas = descendants(REPLICA, run.pid)
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert len(replicas) == 2
    wait_until(lambda: not any(os.path.exists(f"/proc/{process}") for process in replicas))


def test_a_run_is_killed_and_gone_on_with_while_a_replica_is_killed(prompts, expected, tmp_path, monkeypatch):
    """The second run answers what is missing, and the rows of the replica go to another one."""
    path = tmp_path / "answers.jsonl"
    run_and_kill(prompts, path, tmp_path / "log")
    before = path.read_bytes()
    lines = before.splitlines(keepends=True)
    assert 0 < len(lines) < COUNT - 4 * 8 and all(json.loads(line)["output"] for line in lines)
    path.write_bytes(before + b'{"id": "')  # as a full disk would have left it
    killed = []

    def kill() -> None:
        wait_until(lambda: path.read_bytes().count(b"\n") > len(lines))
        killed.append((kill_one(REPLICA), path.read_bytes().count(b"\n")))

    thread = Thread(target=kill)
    thread.start()
    start_cluster()
    monkeypatch.setattr(offline, "ROWS", 8)
    summary = scale.generate_file(prompts, path, replicas=2, threads=1, resume=True, **OPTIONS)
    thread.join()
    assert summary == (COUNT, len(lines), [])
    ((_, written),) = killed
    assert written < COUNT - 2 * 8  # there was work left for both replicas
    assert path.read_bytes().startswith(before)
    check(path, expected)
    done = scale.generate_file(prompts, path, replicas=2, threads=1, resume=True, **OPTIONS)
    assert done == (COUNT, COUNT, [])  # at once: nothing is missing


def test_prompts_of_every_kind(tmp_path):
    """Text, ids and chats; a prompt that cannot be answered is told of in its place."""
    start_cluster()
    model = river_ext.load(chat_demo(), device="cpu")
    chat = [{"role": "user", "content": "2 + 2"}]
    rows = [
        {"prompt": "def", "options": {"mode": "lossless", "max_new_tokens": 9}},
        {"prompt": "def", "options": {"max_new_tokens": 500}},
        {"prompt": [5, 6, 7], "options": {"logprobs": 2}},
        {"prompt": ""},
        {"messages": chat, "options": {"stop": "3"}},
        {"messages": [{"role": "nobody"}]},
        {"prompt": "\ud800"},
    ]
    (tmp_path / "prompts").write_text("\n".join(map(json.dumps, rows)))
    summary = scale.generate_file(
        tmp_path / "prompts", tmp_path / "answers", chat_demo(), threads=1, max_new_tokens=5, max_len=64
    )
    answers = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    assert summary.errors == [2, 4, 6, 7]
    assert (
        not ray.data.DataContext.get_current().execution_options.preserve_order
    )  # as other datasets have it
    errors = [answer["error"] for answer in answers if "error" in answer]
    assert [error.split()[:3] for error in errors[:2]] == [["a", "prompt", "of"], ["the", "prompt", "is"]]
    for number, prompt in ((0, "def"), (2, [5, 6, 7]), (4, chat)):
        options = rows[number]["options"]
        output = model.generate(prompt, **{"max_new_tokens": 5} | options).to_dict()
        given = answers[number]["output"]
        assert given == json.loads(json.dumps({name: output[name] for name in given}))
        assert ("logprobs" in given) == ("logprobs" in options)


def test_the_command(prompts, expected, tmp_path, river):
    """Standard output has the summary alone; errors in place of outputs end it with code 2."""
    start_cluster()
    lines = prompts.read_text().splitlines()[:3]
    prompts.write_text("\n".join([*lines, json.dumps({"prompt": ""})]))
    options = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", value)]
    path = tmp_path / "answers.jsonl"
    command = ["batch", "--demo", "--prompts", prompts, "-o", path, "--threads", "1", *options]
    code, out, err = river(*command, "--json")
    assert code == 2 and err.endswith(
        f"river: error: {path}: 1 of 4 answers are errors, the first is that of line 4 of {prompts}; "
        "accepted: prompts as their answers say\n"
    )
    assert json.loads(out) == {"output": str(path), "lines": 4, "resumed": 0, "errors": [4]}
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert [answer.get("output") for answer in answers] == [*expected[:3], None]
    code, out, err = river(*command)
    assert (code, out) == (2, "") and "holds something; accepted: --resume, --force, or another file" in err
    code, out, err = river(*command, "--resume")
    assert (code, out) == (2, "") and f"{path}: 4 answers, 4 of them by an earlier run\n" in err


def test_a_cluster_without_room(prompts, tmp_path):
    start_cluster()
    has = "the machines of the cluster have 4 CPU and 0 GPU; accepted"
    with pytest.raises(RiverError, match=f"a replica takes 1 CPU and 1 GPU, {has}"):
        scale.generate_file(prompts, tmp_path / "answers", device="cuda")
    with pytest.raises(RiverError, match=f"a replica takes 5 CPU and 0 GPU, {has}"):
        scale.generate_file(prompts, tmp_path / "answers", threads=5)


def test_a_replica_has_to_fit_one_machine(monkeypatch):
    """Not the machines of a cluster together, nor one that has gone."""
    machines = [{"Alive": True, "Resources": {"CPU": 4.0}}] * 2 + [
        {"Alive": False, "Resources": {"CPU": 8.0}}
    ]
    monkeypatch.setattr(offline.ray, "nodes", lambda: machines)
    monkeypatch.setattr(offline.ray, "cluster_resources", lambda: {"CPU": 8.0}, raising=False)
    offline._check_room(offline.checked_replica(None, replicas=1, threads=4))
    with pytest.raises(RiverError, match="have 4 CPU and 0 GPU, 4 CPU and 0 GPU; accepted"):
        offline._check_room(offline.checked_replica(None, replicas=1, threads=5))


def test_a_chat_without_a_template(prompts, tmp_path):
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    with pytest.raises(RiverError, match="template"):
        scale.generate_file(prompts, tmp_path / "answers")
    assert not (tmp_path / "answers").exists()


def test_a_model_that_a_replica_cannot_load(tmp_path, prompts):
    """Where only the weights themselves can tell."""
    start_cluster()
    demo_model().save_river(tmp_path / "river")
    (tensors,) = (tmp_path / "river").glob("*.safetensors")
    tensors.unlink()
    with pytest.raises(RiverError, match="^a replica failed: .*river-.*safetensors"):
        scale.generate_file(prompts, tmp_path / "answers", river=tmp_path / "river", threads=1)
    assert not (tmp_path / "answers").read_bytes()


@pytest.mark.parametrize(
    "options, why",
    [
        ({"replicas": 0}, "replicas=0; accepted: an integer from 1"),
        ({"device": "tpu"}, "device='tpu'; accepted: 'auto', 'cpu', 'cuda'"),
        ({"dtype": "int3"}, "dtype 'int3' is not supported"),
        ({"threads": 0}, "threads=0; accepted"),
        ({"slots": 9}, "slots=9; accepted: an integer from 1 to 8"),
        ({"max_len": 99999}, "max_len=99999; accepted"),
        ({"river": "/nowhere"}, "/nowhere: no river.json in it"),
        ({"model": "/nowhere"}, "/nowhere: no such directory"),
        ({"resume": True, "force": True}, "resume and force; accepted: one of them"),
        ({"mode": "fast"}, "mode='fast'; accepted"),
        ({"return_logits": True}, "return_logits=True; accepted: logprobs"),
        ({"max_new_tokens": 0}, "max_new_tokens=0; accepted"),
        ({"stop": 3}, "stop=3; accepted"),
        ({"line": {"stop": [""]}}, r"prompts.jsonl: line 2: stop=\[''\]; accepted"),
        ({"line": {"threshold": "x"}}, "prompts.jsonl: line 2: threshold='x'; accepted"),
        ({"line": {"tempratur": 1}}, "prompts.jsonl: line 2: no argument 'tempratur'; .*temperature"),
    ],
)
def test_refused_before_any_work(prompts, tmp_path, options, why):
    if line := options.pop("line", None):
        prompts.write_text(json.dumps(row(0)) + "\n" + json.dumps(row(1) | {"options": line}) + "\n")
    with pytest.raises(RiverError, match=why):
        scale.generate_file(prompts, tmp_path / "answers", **options)
    assert not (tmp_path / "answers").exists()


def test_a_cluster_that_is_not_there(prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(offline.ray, "is_initialized", lambda: False)
    with pytest.raises(RiverError, match="address='127.0.0.1:1': .*refused; accepted: that of a running"):
        scale.generate_file(prompts, tmp_path / "answers", address="127.0.0.1:1")


def test_answers_of_other_options_are_not_gone_on_with(prompts, tmp_path):
    run = offline._run(offline.checked_replica(None, replicas=1), {"seed": 1})
    (tmp_path / "answers").write_text(json.dumps(row(0) | {"run": run, "output": {}}) + "\n")
    with pytest.raises(RiverError, match="line 1 is of another run"):
        scale.generate_file(prompts, tmp_path / "answers", resume=True, seed=2)


def test_the_name_of_a_run_is_of_all_that_answers_depend_on(tmp_path):
    shutil.copytree(chat_demo(), tmp_path / "model")
    demo_model().save_river(tmp_path / "river")

    def run(**changed) -> str:
        arguments = {"model": tmp_path / "model", "river": tmp_path / "river", "device": "cpu"} | changed
        return offline._run(offline.checked_replica(replicas=1, **arguments), {"seed": 1})

    first = run()
    shutil.copytree(tmp_path / "model", tmp_path / "same")
    shutil.copytree(tmp_path / "river", tmp_path / "same_river")
    assert run(model=tmp_path / "same", river=tmp_path / "same_river", threads=1, slots=2) == first
    runs = {first, run(device="cuda"), run(dtype="float32"), run(river=None), run(max_len=64)}
    for name, old, new in (
        ("chat_template.jinja", "", " "),
        ("tokenizer.json", '"version"', ' "version"'),
        ("config.json", '"eos_token_id": 0', '"eos_token_id": 5'),
    ):
        path = tmp_path / "model" / name
        text = path.read_text()
        path.write_text(text.replace(old, new, 1))
        runs.add(run())
        path.write_text(text)
    assert len(runs) == 8 and run() == first
