"""Whole tasks of lm-evaluation-harness on documents of this machine, without a network.

What a task asks is compared with what the harness's own, untouched task asks, where the call that would load
its dataset gives it the same documents. Log-likelihoods are the bundled model's: right answers are chance.
"""

import json
import math
import socket
import sys

import pytest
from harness_documents import MATH, PUBLISHED, Published, documents, mmlu
from published_documents import BOOLQ, write_gsm8k, write_lines
from tiny_model import demo_model

from river_ext.errors import RiverError
from river_ext.evaluation.measure import Item, Setting
from river_ext.evaluation.measure import evaluate as measured
from river_ext.evaluation.tasks import TASKS, fitted

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

import datasets  # noqa: E402
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from river_ext.evaluation import harness  # noqa: E402
from river_ext.evaluation.harness import RiverLM, _estimates, evaluate  # noqa: E402
from river_ext.evaluation.harness_tasks import task_manager, tasks_of  # noqa: E402

FULL, EARLY = Setting("full", {"mode": "full"}), Setting("early", {"mode": "river", "threshold": -2.0})


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection is opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """What the harness asks of the model: kind, document, arguments."""
    requests = []

    def recorded(ask):
        def wrapped(self, instances, *args, **kwargs):
            requests.extend((one.request_type, one.doc, one.args) for one in instances)
            return ask(self, instances, *args, **kwargs)

        return wrapped

    for kind in ("loglikelihood", "generate_until"):
        monkeypatch.setattr(RiverLM, kind, recorded(getattr(RiverLM, kind)))
    return requests


def dataset_of(one: Published) -> datasets.DatasetDict:
    """As the published one is, class labels included."""
    rows = datasets.Dataset.from_list(one.documents)
    for column, names in one.labels.items():
        rows = rows.cast_column(column, datasets.ClassLabel(names=names))
    return datasets.DatasetDict({one.scored: rows, one.examples: rows.select(range(2))})


def write(data, one: Published):
    write_lines(data / one.task / f"{one.scored}.jsonl", one.documents)
    return data


@pytest.mark.parametrize("setting, score_by", [(FULL, "prefill"), (EARLY, "prefill"), (EARLY, "steps")])
@pytest.mark.parametrize("task", [name for name in PUBLISHED if name != "minerva_math_algebra"])
def test_the_harness_s_own_requests(task, setting, score_by, asked, tmp_path, monkeypatch):
    one, model = PUBLISHED[task], demo_model()
    (row,) = evaluate(model, task, [setting], data=write(tmp_path, one), score_by=score_by)
    ours = asked.copy()
    asked.clear()

    def load_dataset(path, name=None):
        assert (path, name) == one.dataset
        return dataset_of(one)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    lm = RiverLM(model=model, score_by=score_by, **setting.options)
    theirs = simple_evaluate(lm, tasks=[task], task_manager=task_manager(), log_samples=False)
    assert ours == asked and len({str(document) for _, document, _ in ours}) == len(one.documents)
    assert row.accuracy == _estimates(task, theirs) and row.accuracy["acc"].total == len(one.documents)
    assert sum(row.tokens_by_depth) == row.new_tokens == len(lm.depths)
    assert row.mean_exit_depth == pytest.approx(sum(lm.depths) / len(lm.depths))
    assert (row.mean_exit_depth < 16) == (score_by == "steps")


def test_the_harness_s_own_requests_of_math(asked, tmp_path, monkeypatch):
    pytest.importorskip("math_verify", reason="the harness's math extra is not installed")
    one, model = PUBLISHED["minerva_math_algebra"], demo_model()
    options = {"limit": 5, "max_gen_toks": 8}
    (row,) = evaluate(model, one.task, [FULL], data=write(tmp_path, one), **options)
    ours = asked.copy()
    asked.clear()
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, name: {one.dataset: dataset_of(one)}[path, name]
    )
    lm = RiverLM(model=model, mode="full")
    theirs = simple_evaluate(
        lm, tasks=[one.task], task_manager=task_manager(), limit=5, gen_kwargs={"max_gen_toks": 8},
        log_samples=False,
    )  # fmt: skip
    assert ours == asked and len(ours) == 5
    assert row.accuracy == _estimates(one.task, theirs) and row.new_tokens == len(lm.depths)
    for _, document, (context, kwargs) in ours:
        assert context.count("Problem:") == 5 and context.endswith(f"{document['problem']}\n\nSolution:")
        assert kwargs["until"] == ["Problem:"] and kwargs["max_gen_toks"] == 8


def test_boolq_by_hand(tmp_path):
    write_lines(tmp_path / "boolq" / "validation.jsonl", BOOLQ)
    full, early = evaluate(demo_model(), "boolq", [FULL, EARLY], data=tmp_path, limit=3, score_by="steps")
    assert full.accuracy.keys() == {"acc"}
    lm, right = RiverLM(model=demo_model(), mode="full"), 0
    for document in BOOLQ[:3]:
        context = f"{document['passage']}\nQuestion: {document['question']}?\nAnswer:"
        pairs = [Instance("loglikelihood", {}, (context, answer), 0) for answer in (" no", " yes")]
        no, yes = lm.loglikelihood(pairs, disable_tqdm=True)
        right += (yes[0] > no[0]) == bool(document["label"])
    p, estimate = right / 3, full.accuracy["acc"]
    assert estimate.total == 3 and estimate.value == pytest.approx(p)
    assert estimate.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 2))  # of a sample: n - 1
    assert full.mean_exit_depth == 16 and early.mean_exit_depth < 16
    assert full.tokens_per_second is None and full.as_dict()["accuracy"]["acc"]["total"] == 3


def test_gsm8k_is_the_same_by_river_and_by_the_harness(tmp_path):
    data, model, task = write_gsm8k(tmp_path), demo_model(), TASKS["gsm8k"]
    (theirs,) = evaluate(model, "gsm8k", [FULL], data=data, limit=3, max_gen_toks=12)
    items = [Item(fitted(model, item.prompt, 12), item.checks) for item in task.items(data, 3, False)]
    (ours,) = measured(
        model, [[item] for item in items], [FULL], divergence=False, max_new_tokens=12, stop=task.stop
    )
    names = {f"exact_match {name}": share.value for name, share in ours.accuracy.items()}
    assert {name: estimate.value for name, estimate in theirs.accuracy.items()} == names
    assert theirs.new_tokens == ours.new_tokens


def test_the_harness_s_command(tmp_path, monkeypatch):
    """On a machine without a GPU, too: the command names one where its user has not."""
    one = PUBLISHED["boolq"]
    (row,) = evaluate(demo_model(), "boolq", [EARLY], data=write(tmp_path, one), score_by="steps")
    task = {
        "include": str(task_manager().task_index["boolq"].yaml_path),
        "task": "boolq_here",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {one.scored: str(tmp_path / "boolq" / f"{one.scored}.jsonl")}},
        "training_split": None,
    }
    (tmp_path / "boolq_here.yaml").write_text(json.dumps(task))
    arguments = {
        "--model": "river",
        "--tasks": tmp_path / "boolq_here.yaml",
        "--model_args": "mode=river,threshold=-2.0,score_by=steps",
        "--output_path": tmp_path / "results.json",
    }
    monkeypatch.setattr(sys, "argv", ["", "run", *(str(word) for pair in arguments.items() for word in pair)])
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # set by the command, and here taken back
    harness.main()
    (found,) = tmp_path.glob("results_*.json")
    assert _estimates("boolq_here", json.loads(found.read_text())) == row.accuracy


# --- groups and tags ---


def test_a_group_is_scored_as_one(tmp_path, monkeypatch):
    """The seven subjects of MATH. Some answers are right, and not all of these as asked for."""
    pytest.importorskip("math_verify", reason="the harness's math extra is not installed")
    subjects = [task for task, _ in tasks_of(task_manager(), "minerva_math")]
    math_documents = PUBLISHED["minerva_math_algebra"].documents
    for subject, document in zip(subjects, math_documents, strict=False):
        write_lines(tmp_path / subject / "test.jsonl", [document])
    texts = {
        MATH[0][0]: "Final Answer: The final answer is $2$. I hope it is correct.",
        MATH[1][0]: "$0.5$",  # right, but not as the examples say it
    }

    def answer(self, contexts, kwargs):
        self.depths.append(16)
        return [next((text for problem, text in texts.items() if problem in one), "") for one in contexts]

    monkeypatch.setattr(RiverLM, "_generate", answer)
    (row,) = evaluate(demo_model(), "minerva_math", [FULL], data=tmp_path)
    found = {name: (estimate.value, estimate.total) for name, estimate in row.accuracy.items()}
    assert len(subjects) == 7 and found == {
        "exact_match": (pytest.approx(1 / 7), 7),
        "math_verify": (pytest.approx(2 / 7), 7),
    }


def test_groups_in_groups(tmp_path):
    """mmlu has 4 groups with 57 subjects, all of which need documents before any is read."""
    index, names = dict(task_manager().task_index), [task for task, _ in tasks_of(task_manager(), "mmlu")]
    assert len(names) == len(set(names)) == 57 and "mmlu_anatomy" in names
    for name in names[:-1]:
        write_lines(tmp_path / name / "test.jsonl", documents(mmlu, [("Which?", "a|b|c|d", 0)]))
    with pytest.raises(RiverError, match=f"no documents of {names[-1]}; accepted: .*{names[-1]}/test.jsonl"):
        evaluate(demo_model(), "mmlu", [FULL], data=tmp_path)
    assert index == task_manager().task_index


def test_a_tag_s_tasks(tmp_path, asked):
    for name in ("arc_easy", "arc_challenge"):
        write(tmp_path, PUBLISHED[name])
    index = dict(task_manager().task_index)
    (row,) = evaluate(demo_model(), "ai2_arc", [FULL], data=tmp_path)
    totals = {name: estimate.total for name, estimate in row.accuracy.items()}
    assert totals == {
        "arc_challenge acc": 12, "arc_challenge acc_norm": 12, "arc_easy acc": 4, "arc_easy acc_norm": 4,
    }  # fmt: skip
    assert index == task_manager().task_index


# --- what is missing ---


@pytest.mark.parametrize(
    "task, complaint",
    [
        ("boolq", r"no documents of boolq; accepted: a folder with boolq/validation\.jsonl$"),
        ("gsm8k_cot_zeroshot", r"a folder with gsm8k_cot_zeroshot/test\.jsonl$"),
        ("minerva_math", r"a folder with minerva_math_algebra/test\.jsonl$"),
        ("gsm8k", r"a folder with gsm8k/test\.jsonl, gsm8k/train\.jsonl$"),  # it draws examples
        (
            "openllm",
            r"a folder with arc_challenge/test\.jsonl, arc_challenge/train\.jsonl, ",
        ),  # a group's shots
        (
            "t0_eval",
            "'None' with documents; accepted: a task of lm-evaluation-harness",
        ),  # tasks without a name
        ("nonsense", "'nonsense' with documents; accepted: a task of lm-evaluation-harness"),
        ("squadv2", "'squadv2' with documents; accepted: .* in YAML"),
    ],
)
def test_documents_that_are_missing(task, complaint, tmp_path):
    with pytest.raises(RiverError, match=complaint):
        evaluate(demo_model(), task, [FULL], data=tmp_path)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", r"validation\.jsonl: no documents in it"),
        ('{"question": "is it"}\n{', "line 2 is not valid JSON"),
        ("[1]", "line 1 is no object; accepted: objects"),
        ('{"question": "is it"}', "task 'boolq': lm-evaluation-harness says: .*'passage' is undefined"),
        ('{"passage": "a", "question": "b", "label": 7}', "lm-evaluation-harness says: .* out of range"),
    ],
)
def test_documents_that_are_odd(text, complaint, tmp_path):
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "validation.jsonl").write_text(text)
    with pytest.raises(RiverError, match=complaint):
        evaluate(demo_model(), "boolq", [FULL], data=tmp_path)


def test_what_the_harness_says_is_passed_on():
    with pytest.raises(RiverError, match="'nonsense'.*not a registered task"):
        evaluate(demo_model(), "nonsense", [FULL])
