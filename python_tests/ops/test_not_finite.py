"""Logits that are NaN or infinite end a request with an error that says why, and no other request."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import random_model, random_prompt

import river_cli as cli
from river_ext.errors import RiverError
from river_ext.evaluation.measure import Item, Setting, evaluate
from river_ext.model import DEMO

CONTROLS = ["host", "device"]
DRAWS = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 9}, {"return_logits": True}]
LAYERS, LENGTH = 4, 10
PROMPTS = [random_prompt(n, n) for n in (5, 3, 7)]


def new_model(**options):
    """One that a test may change: random_model keeps its own for all tests."""
    return random_model.__wrapped__(**options)


def overflowing(layer, dtype=torch.float16):
    """A model whose values leave float16 in one layer, although all of its weights are finite there."""
    model = new_model(dtype=dtype)
    weight = model.weights.layers[layer].down_proj
    weight *= 6e4 / weight.abs().max()
    return model


def without(model, *tokens):
    """The embeddings of these tokens are not finite."""
    model.weights.embed_tokens[list(tokens)] = math.inf
    return model


COMBINATIONS = [
    pytest.param({"exit_control": control, **draw}, id=f"{control} {draw}")
    for control in CONTROLS
    for draw in DRAWS
]


@pytest.mark.parametrize("options", COMBINATIONS)
def test_a_prompt_alone_raises(options):
    options = {"max_new_tokens": LENGTH, "threshold": math.inf, **options}
    assert len(overflowing(2, torch.bfloat16).generate(PROMPTS[0], **options).tokens) == LENGTH
    message = (
        "no token at position 5: its logits are NaN or infinite in float16, and so are the hidden states "
        "from layer 2 on; load the model with dtype='bfloat16', or 'float32' on the CPU"
    )
    with pytest.raises(RiverError) as error:
        overflowing(2).generate(PROMPTS[0], **options)
    assert str(error.value) == message


@pytest.mark.parametrize("options", COMBINATIONS)
@pytest.mark.parametrize(
    "depth",
    [
        {"mode": "full"},
        {"threshold": -2.0, "min_layers": 2},
        {"threshold": -2.0, "min_layers": 2, "batch_policy": "min"},
        {"threshold": [-2.0, math.inf, 0.6]},
    ],
    ids=str,
)
def test_a_request_that_fails_on_its_way_leaves_the_others_as_they_are(options, depth):
    """A token of the first request leads nowhere; what came before it, and the other two, stay."""
    options = {"max_new_tokens": LENGTH, **depth, **options}
    expected = new_model().generate(PROMPTS, **options)
    tokens = expected[0].tokens
    others = sum((out.tokens for out in expected[1:]), sum(PROMPTS, []))
    last = next(n for n in range(2, LENGTH - 1) if tokens[n] not in others + tokens[:n])
    position = len(PROMPTS[0]) + last + 1
    model = without(new_model(), tokens[last])
    for prompts in (PROMPTS, PROMPTS[:1]):
        failed, *rest = model.generate(prompts, **first(options, len(prompts)))
        assert failed.finish_reason == "error" and failed.tokens == tokens[: last + 1]
        assert len(failed.exit_depths) == len(failed.similarities) == last + 1
        assert failed.error.startswith(
            f"no token at position {position}: its logits are NaN or infinite in float32"
        )
        assert "from layer 0 on" in failed.error and "checkpoint's weights" in failed.error
        for output, wanted in zip(rest, expected[1:], strict=False):
            assert (output.tokens, output.similarities, output.finish_reason) == (
                wanted.tokens, wanted.similarities, "length",
            )  # fmt: skip
            assert output.error is None and output.checked() is output
    with pytest.raises(RiverError, match=f"no token at position {position}:"):
        model.generate(PROMPTS[0], **first(options, 1))


def first(options, count):
    """Options of the first prompts; a list has one value for each."""
    return {name: value[:count] if isinstance(value, list) else value for name, value in options.items()}


@pytest.mark.parametrize("control", CONTROLS)
def test_prompts_that_fail_at_once(control):
    prompts = [[70, *PROMPTS[0]], PROMPTS[1], [*PROMPTS[2], 70]]
    options = {"max_new_tokens": LENGTH, "exit_control": control}
    assert 70 not in PROMPTS[1]
    wanted = new_model().generate(prompts[1], **options)
    assert 70 not in wanted.tokens
    first, second, third = without(new_model(), 70).generate(prompts, **options)
    assert second.tokens == wanted.tokens and second.error is None
    for output, prompt in ((first, prompts[0]), (third, prompts[2])):
        assert output.tokens == [] and output.text == "" and output.logits is None
        assert output.finish_reason == "error" and f"position {len(prompt)}:" in output.error
    with pytest.raises(RiverError):
        third.checked()
    all_failed = without(new_model(), 70).generate([[70], [70, 3]], **options)
    assert [output.finish_reason for output in all_failed] == ["error", "error"]


@pytest.mark.parametrize("mode", ["river", "full", "full_w4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_mode_and_dtype(mode, dtype):
    model = without(new_model(dtype=dtype), 70)
    with pytest.raises(RiverError, match=f"position 3: .* in {str(dtype)[6:]}") as error:
        model.generate([70, 1, 2], mode=mode, threshold=-2.0, max_new_tokens=4)
    assert ("layer 0" in str(error.value)) == (mode != "full_w4"), "the river alone measures nothing"
    assert len(model.generate([69, 1, 2], mode=mode, max_new_tokens=1).tokens) == 1


@pytest.mark.parametrize("control", CONTROLS)
def test_a_stream_raises_behind_what_was_certain(control):
    options = {"max_new_tokens": LENGTH, "mode": "full", "exit_control": control}
    expected = new_model().generate(PROMPTS[0], **options).tokens
    model = without(new_model(), expected[6])
    stream = model.stream(PROMPTS[0], **options)
    seen = []
    with pytest.raises(RiverError, match="no token at position 12"):
        for piece in stream:
            seen.append(piece.token)
    assert seen == expected[:7] == stream.output.tokens
    assert stream.output.finish_reason == "error" and "position 12" in stream.output.error
    assert list(stream) == [], "it has ended"
    assert len(model._engines.idle) == 1, "and given its engine back"


def test_score_and_evaluate_raise():
    model = without(new_model(), 70)
    assert len(model.score([1, 2, 3, 4, 70], prompt_length=2).logits) == 3
    for tokens, position in (([70, 1, 2, 3], 2), ([1, 2, 3, 70, 5, 6], 4)):
        with pytest.raises(RiverError, match=f"no token at position {position}: .* in float32"):
            model.score(tokens, prompt_length=2)
    with pytest.raises(RiverError, match="no token at position 2"):
        evaluate(
            model,
            [[Item([1, 2]), Item([3, 70])]],
            [Setting("full", {"mode": "full"})],
            divergence=False,
            max_new_tokens=3,
        )


def test_commands_end_with_the_error(tmp_path, capsys):
    """What can be said is said first: the texts, or the document."""
    tensors = load_file(DEMO / "model.safetensors")
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    down *= 6e4 / down.abs().max().float()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(DEMO / name, tmp_path)
    for arguments in (["def f"], ["def f", "x"], ["def f", "x", "--json"], ["def f", "--compare"]):
        code = cli.main(["generate", "--model", str(tmp_path), "--dtype", "float16", *arguments])
        captured = capsys.readouterr()
        assert code == 2
        assert (
            captured.err.startswith("river: error: no token at position ") and captured.err.count("\n") == 1
        )
        if "--json" in arguments:
            outputs = json.loads(captured.out)["outputs"]
            assert [output["finish_reason"] for output in outputs] == ["error", "error"]
            assert all("float16" in output["error"] for output in outputs)
