"""The model of lm-evaluation-harness: what it answers."""

from types import SimpleNamespace

import pytest
import torch
from tiny_model import demo_model

import river_ext
from river_ext.errors import RiverError
from river_ext.loading.calibrated import Calibrated, write_calibrated
from river_ext.model import choose_device
from river_ext.quant.exit_river import river_sha256

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.config.evaluate_config import EvaluatorConfig  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from river_ext.evaluation import harness  # noqa: E402
from river_ext.evaluation.harness import RiverLM  # noqa: E402

PAIRS = [
    ("Question: Ana has 3 coins and buys 4 more. How many coins does Ana have?\nAnswer:", " 7"),
    (
        "Question: Ana has 3 coins and buys 4 more. How many coins does Ana have?\nAnswer:",
        " She has 7 coins.",
    ),
    ("def add(a, b): ", "return a + b"),  # the space goes to the continuation
    ("", "def add"),
]
EARLY = {"mode": "river", "threshold": -2.0}


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def loglikelihoods(lm, pairs=PAIRS) -> list[tuple[float, bool]]:
    return lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)


@pytest.fixture(scope="module")
def exact():
    """The demo in fp32, by river and by the harness's own model of transformers."""
    transformers = pytest.importorskip("transformers")
    model = river_ext.load(dtype="float32", device="cpu")
    hf = transformers.AutoModelForCausalLM.from_pretrained(model.directory, dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(model.directory / "tokenizer.json"))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(min(model.config.eos_token_ids))
    if model.config.bos_token_id is not None:
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(model.config.bos_token_id)
    max_length = model.config.max_length - 1  # of what is fed: theirs does not count the last token
    return model, HFLM(pretrained=hf, tokenizer=tokenizer, device="cpu", batch_size=1, max_length=max_length)


def test_it_is_registered():
    assert get_model("river") is RiverLM


@pytest.mark.parametrize("score_by", ["prefill", "steps"])
def test_full_depth_scores_as_transformers_does(exact, score_by):
    model, theirs = exact
    lm = RiverLM(model=model, mode="full", score_by=score_by)
    assert (lm.eot_token_id, lm.prefix_token_id) == (theirs.eot_token_id, theirs.prefix_token_id)
    for (ours, greedy), (other, other_greedy) in zip(loglikelihoods(lm), loglikelihoods(theirs), strict=True):
        assert ours == pytest.approx(other, abs=1e-3)
        assert greedy == other_greedy
    texts = requests("loglikelihood_rolling", [("def add(a, b):\n    return a + b\n",), ("word " * 700,)])
    ours, theirs = lm.loglikelihood_rolling(texts, True), theirs.loglikelihood_rolling(texts, True)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_full_depth_generates_as_transformers_does(exact):
    model, theirs = exact
    lm = RiverLM(model=model, mode="full", batch_size=2)
    asked = [
        (PAIRS[0][0], {"until": ["Question:", "\n\n"], "max_gen_toks": 24}),
        (PAIRS[2][0].rstrip(), {"until": ["Question:", "\n\n"], "max_gen_toks": 24}),
        (PAIRS[0][0], {"until": ["coins"], "max_gen_toks": 24}),
        (PAIRS[0][0], {"until": [], "max_gen_toks": 3}),
    ]
    ours = lm.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert ours == theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert "coins" not in ours[2] and any(ours)
    assert len(lm.speeds) == 3, "two prompts with the same rules go together"


def test_exits_are_in_the_steps_alone():
    """From the prefill, log-likelihoods of an early exit are those of full depth, bit for bit."""
    model, one_token = demo_model(), ("def add(a, b):", "\n")
    assert len(model.text.encode("".join(one_token))) == len(model.text.encode(one_token[0])) + 1
    pairs = [*PAIRS, one_token]
    full = loglikelihoods(RiverLM(model=model, mode="full"), pairs)
    lms = {by: RiverLM(model=model, score_by=by, **EARLY) for by in ("prefill", "steps")}
    answers = {by: loglikelihoods(lm, pairs) for by, lm in lms.items()}
    assert answers["prefill"] == full
    assert set(lms["prefill"].depths) == {16}
    assert all(one != other for one, other in zip(answers["steps"], full, strict=True))
    assert lms["steps"].depths.count(16) == 1  # there is nothing before the first token of a text
    assert set(lms["steps"].depths) == {1, 16} and len(lms["steps"].depths) == len(lms["prefill"].depths)


@pytest.mark.parametrize("options", [{"mode": "full"}, {"mode": "full_w4"}, EARLY | {"prefill": "depth:3"}])
@pytest.mark.parametrize("by", ["prefill", "steps"])
def test_scores_are_the_model_s_own(by, options):
    model = demo_model()
    tokens = model.text.encode(PAIRS[1][0] + PAIRS[1][1])
    known = len(model.text.encode(PAIRS[1][0]))
    score = model.score(tokens, prompt_length=known, by=by, **options)
    assert len(score.logits) == len(score.exit_depths) == len(tokens) - known
    for row, length in enumerate(range(known, len(tokens))):
        if by == "prefill":  # each row as if the prompt ended there
            alone = model.generate(tokens[:length], max_new_tokens=1, return_logits=True, **options)
            assert torch.equal(score.logits[row], alone.logits[0])
            assert score.exit_depths[row] == alone.exit_depths[0]
    by_steps = model.score(tokens, prompt_length=known, by="steps", **options)
    if by == "prefill" and options["mode"] != "river":
        assert torch.equal(score.logits, by_steps.logits)


def test_chat_messages_go_on_with_the_last_one(monkeypatch):
    lm = RiverLM(model=demo_model())

    def chat_text(messages, add_generation_prompt=True):
        text = "".join(f"<{message['role']}>{message['content']}</>" for message in messages)
        return text + ("<assistant>" if add_generation_prompt else "")

    monkeypatch.setattr(lm.model.text, "chat_text", chat_text)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert lm.apply_chat_template(messages[:1]) == "<user>a</><assistant>"
    assert lm.apply_chat_template(messages, add_generation_prompt=False) == "<user>a</><assistant>b"


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"score_by": "guess"}, "score_by='guess'"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"batch_size": 9}, "batch_size=9"),
        ({"max_gen_toks": 0}, "max_gen_toks=0"),
        ({"mode": "fast"}, "mode='fast'"),
    ],
)
def test_refusals(options, complaint):
    with pytest.raises(RiverError, match=complaint):
        RiverLM(model=demo_model(), **options)
    with pytest.raises(TypeError, match="threshold"):
        RiverLM(model=demo_model(), treshold=0.5)


def test_a_calibrated_threshold(tmp_path):
    path = tmp_path / "calibrated.json"
    with pytest.raises(RiverError, match=r"calibrated\.json: cannot be read"):
        RiverLM(calibrated=str(path), threshold="calibrated")
    model = demo_model()
    rule = (-2.0,) * model.config.num_hidden_layers
    write_calibrated(
        path,
        Calibrated(
            threshold=rule,
            min_layers=1,
            river_head="model",
            draft_tokens="auto",
            fingerprint=model.fingerprint,
            river_sha256=river_sha256(model.river),
            dtype=model.network.dtype,
        ),
        measured={},
    )
    lm = RiverLM(calibrated=str(path), threshold="calibrated", score_by="steps")
    loglikelihoods(lm, [("a b", " c")])
    assert set(lm.depths) == {1}


@pytest.mark.parametrize("arguments", [{"mode": "full", "batch_size": 2}, "mode=full,batch_size=2"])
def test_the_harness_s_command_names_no_device(arguments):
    """`model_args` go before the command's own options, and its default is no wish for a GPU."""
    make = RiverLM.create_from_arg_string if isinstance(arguments, str) else RiverLM.create_from_arg_obj
    lm = make(arguments, {"batch_size": 1, "max_batch_size": None, "device": EvaluatorConfig().device})
    assert lm.model.network.device == choose_device("auto")
    assert (lm.batch_size, lm.options) == (2, {"mode": "full"})
    with pytest.raises(RiverError, match="device 'cuda:99' cannot be used"):
        make(arguments, {"device": "cuda:99"})
    with pytest.raises(RiverError, match="device 'cuda:99' cannot be used"):
        make({"device": "cuda:99"} if isinstance(arguments, dict) else "device=cuda:99", {"device": "cpu"})


@pytest.mark.parametrize("error", [RiverError("a\nreason"), ValueError("a reason")])
def test_the_command_says_what_is_wrong_in_one_line(error, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(harness, "cli_evaluate", fail)
    with pytest.raises(SystemExit) as left:
        harness.main()
    assert left.value.code == 2 and capsys.readouterr().err == "river: error: a reason\n"


def test_a_tag_s_tasks_are_named():
    results = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.25},
            "b": {"alias": "b", "acc,none": 1.0, "acc_stderr,none": "N/A"},
        },
        "n-samples": {name: SimpleNamespace(effective=2).__dict__ for name in ("a", "b")},
    }
    estimates = harness._estimates("tag", results)
    assert {name: (one.value, one.standard_error) for name, one in estimates.items()} == {
        "a acc": (0.5, 0.25),
        "b acc": (1.0, None),
    }
    assert str(estimates["a acc"]) == "50.0 ± 25.0 %" and str(estimates["b acc"]) == "100.0 %"
