"""Published tasks on documents of this machine: known verdicts, and the same as lm-evaluation-harness has."""

import gzip
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from published_documents import GSM8K, HUMANEVAL, write_gsm8k, write_lines
from tiny_model import demo_model

from river_ext.errors import RiverError
from river_ext.evaluation.documents import read_documents
from river_ext.evaluation.measure import Item, evaluate, settings_of
from river_ext.evaluation.tasks import MAX_GEN_TOKS, TASKS, continued, fitted

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"  # the real documents, where they are

COMPLETIONS = [  # text, solution, strict-match, flexible-extract
    (" 3 + 4 = 7\n#### 7", "#### 7", True, True),
    (" She has 7 coins.", "#### 7", False, True),
    (" #### 7.", "#### 7", True, True),
    (" #### $7", "#### 7", False, True),
    (" ####7", "#### 7", False, True),
    (" #### 120000", "#### 120,000", True, True),
    (" #### 120,000.", "#### 120000", True, True),
    (" #### -5", "#### -5", True, True),
    (" #### 5", "#### -5", False, False),
    (" #### 7 or #### 8", "#### 7", True, False),
    (" It is 7 ...", "#### 7", False, False),
    (" #### 7.0", "#### 7", False, False),
    (" #### .50", "#### .50", True, True),
    (" #### ", "#### 7", False, False),
    (" seven", "#### 7", False, False),
    (" ７", "#### 7", False, False),
    ("", "#### 7", False, False),
]


def checks_of(solution: str, tmp_path: Path) -> dict:
    data = write_gsm8k(tmp_path)
    write_lines(data / "gsm8k" / "test.jsonl", [{"question": "?", "answer": solution}])
    (item,) = TASKS["gsm8k"].items(data, None, False)
    return item.checks


@pytest.mark.parametrize("text, solution, strict, flexible", COMPLETIONS)
def test_gsm8k_verdicts(text, solution, strict, flexible, tmp_path):
    checks = checks_of(solution, tmp_path)
    assert {name: check(text) for name, check in checks.items()} == {
        "strict-match": strict,
        "flexible-extract": flexible,
    }


@pytest.mark.parametrize(
    "completion, right",
    [
        (HUMANEVAL["canonical_solution"], True),
        ("    return b + a", True),
        ("    return a - b\n", False),
        ("", False),
        ("    return (a +", False),
        ("    raise SystemExit(0)\n", False),
        ("    import os\n    os._exit(0)\n", False),
        ("    return a + b\n\nif True:\n  return\n", False),
        ("    return 5 if a == 2 else 0\n", True),
    ],
)
def test_humaneval_verdicts(completion, right, tmp_path):
    write_lines(tmp_path / "HumanEval.jsonl", [HUMANEVAL])
    (item,) = TASKS["humaneval"].items(tmp_path, None, False)
    assert item.prompt == HUMANEVAL["prompt"]
    assert item.checks["pass@1"](completion) == right


def test_humaneval_has_no_chat(tmp_path):
    with pytest.raises(RiverError, match="without one"):
        TASKS["humaneval"].items(tmp_path, None, True)


def test_a_chat_prompt_is_the_text_in_turns(tmp_path):
    data = write_gsm8k(tmp_path)
    texts, chats = TASKS["gsm8k"].items(data, 2, False), TASKS["gsm8k"].items(data, 2, True)
    assert len(texts) == 2
    for text, chat in zip(texts, chats, strict=True):
        assert [message["role"] for message in chat.prompt] == ["user", "assistant"] * 5 + ["user"]
        turns = [message["content"] for message in chat.prompt]
        pairs = zip(turns[:-1:2], turns[1::2], strict=True)
        assert text.prompt == "".join(f"{q} {a}\n\n" for q, a in pairs) + turns[-1]


def test_long_prompts_lose_their_beginning():
    model = demo_model()
    tokens = fitted(model, 400 * "one two ", 100)
    assert len(tokens) == model.config.max_length - 100
    assert tokens == model.text.encode(400 * "one two ")[-len(tokens) :]
    assert fitted(model, "one two", 100) == model.text.encode("one two")
    with pytest.raises(RiverError, match="fewer new tokens"):
        fitted(model, "one", model.config.max_length)


def test_a_prompt_may_leave_room_for_one_token():
    model = demo_model()
    item = Item(fitted(model, 400 * "one two ", 1))
    (row,) = evaluate(model, [[item]], settings_of(model, [])[:1], divergence=False, max_new_tokens=1)
    assert row.new_tokens == 1


# --- the harness ---


@pytest.fixture(scope="module")
def harness_gsm8k(tmp_path_factory):
    """The harness's task on the small documents, built as its evaluator does, and their folder."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from river_ext.evaluation.harness_tasks import task_manager, with_documents

    data, manager = write_gsm8k(tmp_path_factory.mktemp("data")), task_manager()
    with with_documents(manager, "gsm8k", data):
        (task,) = manager.load(["gsm8k"])["tasks"].values()
    task.set_fewshot_seed(1234)
    return task, data


@pytest.mark.parametrize("chat", [False, True])
def test_gsm8k_asks_as_the_harness_does(harness_gsm8k, chat):
    task, data = harness_gsm8k
    task.set_fewshot_seed(1234)
    options = dict(apply_chat_template=True, fewshot_as_multiturn=True, chat_template=messages_as_json)
    task.build_all_requests(**options if chat else {})
    items = TASKS["gsm8k"].items(data, None, chat)
    prompts = [json.dumps(item.prompt) if chat else item.prompt for item in items]
    assert prompts == [instance.args[0] for instance in task.instances]
    assert len(prompts) == len(GSM8K) == len(set(prompts))
    for instance in task.instances:
        kwargs = instance.args[1]
        assert kwargs["until"] == list(TASKS["gsm8k"].stop) and not kwargs["do_sample"]
        assert "max_gen_toks" not in kwargs and TASKS["gsm8k"].max_gen_toks == MAX_GEN_TOKS


def messages_as_json(messages, add_generation_prompt):
    assert add_generation_prompt
    return json.dumps(messages)


def test_gsm8k_scores_as_the_harness_does(harness_gsm8k, tmp_path):
    task, data = harness_gsm8k
    texts = [text for text, *_ in COMPLETIONS]
    for text in texts:
        task.build_all_requests()
        items = TASKS["gsm8k"].items(data, None, False)
        for instance in task.instances:
            instance.resps = [text]
        task.apply_filters()
        for instance, item in zip(task.instances, items, strict=True):
            for name, check in item.checks.items():
                result = task.process_results(instance.doc, [instance.filtered_resps[name]])
                assert check(text) == bool(result["exact_match"]), (text, instance.doc, name)


def test_limits_are_the_harness_s():
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    import yaml  # which the harness needs
    from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS, DEFAULT_OTHER_SEED
    from lm_eval.utils import apply_template

    from river_ext.evaluation import tasks

    assert (DEFAULT_MAX_GEN_TOKS, DEFAULT_OTHER_SEED) == (tasks.MAX_GEN_TOKS, tasks.SHOTS_SEED)
    text = (Path(lm_eval.__file__).parent / "tasks/humaneval/humaneval.yaml").read_text()
    theirs = yaml.safe_load(re.sub(r"!function \S+", "null", text))
    task = TASKS["humaneval"]
    assert theirs["generation_kwargs"]["until"] == list(task.stop)
    assert theirs["generation_kwargs"]["max_gen_toks"] == task.max_gen_toks
    assert theirs["num_fewshot"] == task.shots == 0
    assert apply_template(theirs["doc_to_target"], HUMANEVAL) == f"{HUMANEVAL['test']}\ncheck(add)"
    assert apply_template(theirs["doc_to_text"], HUMANEVAL) == HUMANEVAL["prompt"]


def test_questions_of_humaneval_are_the_harness_s(tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    import yaml  # which the harness needs
    from lm_eval.utils import apply_template

    text = (Path(lm_eval.__file__).parent / "tasks/humaneval/humaneval_instruct.yaml").read_text()
    theirs = yaml.safe_load(re.sub(r"!function \S+", "null", text))
    assert theirs["include"] == "humaneval.yaml" and "generation_kwargs" not in theirs
    asked, begun = (apply_template(theirs[name], HUMANEVAL) for name in ("doc_to_text", "gen_prefix"))
    write_lines(tmp_path / "humaneval" / "HumanEval.jsonl", [HUMANEVAL])
    (plain,), (chat,) = (TASKS["humaneval_instruct"].items(tmp_path, None, chat) for chat in (False, True))
    assert plain.prompt == asked + begun and asked.endswith("\n")
    assert chat.prompt == [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": begun},
    ]


@pytest.mark.parametrize(
    "completion, right",
    [
        ("    return a + b\n```\nThis adds them.", True),
        ("    return a + b", True),
        ("    return a - b\n```\nreturn a + b", False),
    ],
)
def test_an_answer_ends_with_its_block_of_code(completion, right, tmp_path):
    write_lines(tmp_path / "humaneval" / "HumanEval.jsonl", [HUMANEVAL])
    (item,) = TASKS["humaneval_instruct"].items(tmp_path, None, True)
    assert item.is_right(completion) == right


@pytest.mark.parametrize("content", ["a", " b\n\n", "\nc "])
@pytest.mark.parametrize("trims", [False, True])
def test_a_message_that_the_model_goes_on_with(content, trims):
    """The template's spaces, as transformers has it, and nothing behind the message."""

    def chat_text(messages, add_generation_prompt):
        contents = [one["content"].strip() if trims else one["content"] for one in messages]
        return "".join(f"<s>{text}</s>\n" for text in contents) + "<s>" * add_generation_prompt

    messages = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": content}]
    expected = f"<s>a b c</s>\n<s>{content.strip() if trims else content}"
    assert continued(SimpleNamespace(chat_text=chat_text), messages) == expected


# --- documents ---


def test_only_files_are_read(tmp_path):
    """A FIFO would wait for ever."""
    os.mkfifo(tmp_path / "test.jsonl.gz")
    with pytest.raises(RiverError, match="is a FIFO; accepted: a regular file"):
        read_documents(tmp_path, "gsm8k", "test", ("question",))


def test_documents_are_found(tmp_path):
    line = json.dumps({"a": "1"})
    (tmp_path / "test.jsonl").write_text(f"{line}\n\n{line}\n")
    assert read_documents(tmp_path, "task", "test", ("a",)) == [{"a": "1"}] * 2
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "test.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    assert read_documents(tmp_path, "task", "test", ("a",)) == [{"a": "1"}]


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("other.jsonl", b"{}", "has no documents of task; accepted: a folder with task/test.jsonl"),
        ("test.jsonl", b"", "no documents in it"),
        ("test.jsonl", b'{"a": "1"}\nx', "line 2 is not valid JSON"),
        ("test.jsonl", b'{"b": "1"}', "line 1 has no text 'a'"),
        ("test.jsonl", b"[1]", "line 1 is no object; accepted: objects with a"),
        ("test.jsonl", b'{"a": "\xff"}', "UTF-8"),
        ("test.jsonl.gz", b"no gzip", "is no valid gzip file"),
        ("test.jsonl.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], "is no valid gzip file"),
        ("test.jsonl.gz", gzip.compress(b"\xff", mtime=0), "UTF-8"),
    ],
)
def test_documents_are_refused(name, content, complaint, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RiverError, match=re.escape(complaint)):
        read_documents(tmp_path, "task", "test", ("a",))


def test_the_real_documents():
    if not DATA.exists():
        pytest.skip("the published documents are not beside the checkout")
    items = TASKS["gsm8k"].items(DATA, None, False)
    assert len(items) == 1319
    solution = json.loads((DATA / "gsm8k" / "test.jsonl").read_text().split("\n")[0])["answer"]
    assert items[0].is_right(solution) and not items[1].is_right(solution)
    assert len(TASKS["humaneval"].items(DATA, None, False)) == 164
