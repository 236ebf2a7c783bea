"""A calibrated river: nearer to the backbone on other texts, the same after an interruption, refusals."""

import json
import random
from dataclasses import fields, replace

import pytest
import torch

from river_ext.calibration import refine, river
from river_ext.calibration.agreement import Agreement, compare
from river_ext.calibration.river import CalibrationTexts, calibrate_river, calibration_texts
from river_ext.demo_tasks.generator import train_item
from river_ext.engine.network import Network
from river_ext.errors import RiverError
from river_ext.loading.checkpoint import load_checkpoint
from river_ext.loading.weights import BlockShape
from river_ext.model import DEMO, Model
from river_ext.quant.exit_river import build_river, load_river, read_facts, save_river
from river_ext.quant.hqq import quantize
from river_ext.quant.quality import dense_projections
from river_ext.reference import rms_norm

LAYERS = 3


def tokens(count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (count, length), generator=generator).tolist()


TEXTS = CalibrationTexts(tokens(12, 40), tokens(3, 20, seed=1))


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return load_checkpoint(tiny_checkpoint())


GRANITE = {
    "model_type": "granite", "embedding_multiplier": 2.0, "attention_multiplier": 0.4,
    "residual_multiplier": 0.8, "logits_scaling": 0.5,
}  # fmt: skip


def calibrate(checkpoint, path, texts=TEXTS, group_size=64):
    built = build_river(checkpoint.config, checkpoint.weights, group_size, progress=False)
    return calibrate_river(checkpoint, built, texts, path, progress=False)


def assert_equal(one, other):
    assert len(one) == len(other) == LAYERS
    assert one.calibration == other.calibration
    for a, b in zip(one, other, strict=True):
        for field in fields(a):
            assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


def test_the_demo_model_agrees_more_often(tmp_path):
    """On tasks of the same kinds, of which it has seen none. HQQ: 87 %."""
    checkpoint, draw = load_checkpoint(DEMO), random.Random(0)
    items = [train_item(draw) for _ in range(48)]
    texts = calibration_texts(checkpoint, [item.prompt + item.completion for item in items], "texts")
    built = build_river(checkpoint.config, checkpoint.weights, progress=False)
    calibrated = calibrate_river(checkpoint, built, texts, tmp_path / "river", progress=False)
    found = calibrated.calibration
    assert (found["texts"], len(texts.held_out)) == (42, 6)
    assert found["tokens"] == sum(map(len, texts.used))
    assert found["held_out_tokens"] == sum(map(len, texts.held_out))
    assert found["agreement_before"] < 0.9 and found["agreement"] > found["agreement_before"] + 0.02
    assert found["kl"] < 0.5 * found["kl_before"]
    for one, (agreement, kl) in (
        (built, ("agreement_before", "kl_before")),
        (calibrated, ("agreement", "kl")),
    ):
        said = compare(Network(checkpoint.config, checkpoint.weights, one), texts.held_out)
        assert (said.agreement, said.kl) == (found[agreement], found[kl])


@pytest.mark.parametrize("changes", [{}, GRANITE], ids=["llama", "granite"])
def test_agreement_by_its_definition(tiny_checkpoint, changes):
    """Every position of every text, from the logits of teacher forcing; texts of more rows than one block."""
    checkpoint = load_checkpoint(tiny_checkpoint(**changes))
    model = Model(checkpoint.config, checkpoint.weights, build_river(checkpoint.config, checkpoint.weights))
    texts = tokens(2, 150, seed=3) + tokens(1, 1, seed=4)
    same, divergence = 0, 0.0
    for text in texts:
        p, q = (  # a token more, before which the last position is seen
            model.score([*text, 3], prompt_length=1, mode=mode).logits.double().log_softmax(-1)
            for mode in ("full", "full_w4")
        )
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        divergence += float((p.exp() * (p - q)).sum())
    found, count = compare(model.network, texts), 301
    assert (found.tokens, found.agreement) == (count, same / count)
    assert found.kl == pytest.approx(divergence / count, rel=1e-4)


UNEVEN = {"intermediate_size": 100, "head_dim": 6, "num_attention_heads": 5, "num_key_value_heads": 1}


@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen2"}, {"model_type": "qwen3"}, UNEVEN, GRANITE])
def test_of_random_weights_the_outputs_are_met_better(tiny_checkpoint, tmp_path, changes):
    """Biases, q and k norms, and padded tiles included."""
    checkpoint = load_checkpoint(tiny_checkpoint(**changes))
    texts = CalibrationTexts(tokens(100, 40), tokens(8, 40, seed=1))
    found = calibrate(checkpoint, tmp_path / "river", texts).calibration
    assert found["kl"] < 0.65 * found["kl_before"]


def test_a_projection_gets_the_inputs_that_the_layer_gives_it(tiny_checkpoint, monkeypatch):
    """On both ways: layer by layer they add up to the outputs, which other code computes."""
    checkpoint = load_checkpoint(tiny_checkpoint(**GRANITE, attention_bias=True))
    config, blocks = checkpoint.config, checkpoint.weights.layers
    built = build_river(config, checkpoint.weights, progress=False)
    refinement = refine.Refinement(Network(config, checkpoint.weights, built), TEXTS.used, 64)
    real, seen = refine._ExitLayer.fit, {}

    def fit(self, names, inputs):
        seen[names] = list(inputs)
        real(self, names, seen[names])

    monkeypatch.setattr(refine._ExitLayer, "fit", fit)
    for index, block in enumerate(blocks):
        before = refinement.hidden.copy()
        exit_layer = refinement.refine(index)
        for way, dense in enumerate((vars(block), dense_projections(exit_layer, BlockShape.of(config)))):
            for text in range(len(TEXTS.used)):
                qkv, attended, gate_up, swiglu = (seen[names][text][way] for names in refine_order(seen))
                hidden, after = before[text][way], refinement.hidden[text][way]
                o = attended @ dense["o_proj"].T + block.o_bias
                middle = hidden + config.residual_multiplier * o
                gate, up = gate_up @ dense["gate_proj"].T, gate_up @ dense["up_proj"].T
                close(qkv, rms_norm(hidden, block.input_layernorm, config.rms_norm_eps))
                close(gate_up, rms_norm(middle, block.post_attention_layernorm, config.rms_norm_eps))
                close(swiglu, torch.nn.functional.silu(gate) * up)
                close(after, middle + config.residual_multiplier * (swiglu @ dense["down_proj"].T))


def refine_order(seen: dict) -> list:
    assert list(seen) == [refine.QKV, ("o_proj",), refine.GATE_UP, ("down_proj",)]
    return list(seen)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_projection_meets_the_outputs_of_the_backbone(checkpoint):
    """The weight moves to the damped least squares of these, and is quantised for the river's inputs."""
    block = checkpoint.weights.layers[0]
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(64, 64, generator=generator) * torch.logspace(0, -2, 64)[:, None]
    z = torch.randn(1000, 64, generator=generator) @ mixed
    x = z + 0.3 * z.roll(1, dims=1) + 0.1 * torch.randn(1000, 64, generator=generator)
    layer = refine._ExitLayer(block, 64, "layers.0")
    layer.fit(refine.QKV, zip(x.split(100), z.split(100), strict=True))
    a, b = x.double(), z.double()
    hessian = b.T @ b
    damped = hessian + refine.DAMPING * hessian.diagonal().mean() * torch.eye(64)
    for name in refine.QKV:
        weight = getattr(block, name).double()
        moved = weight + (weight @ (a - b).T) @ b @ torch.linalg.inv(damped)
        expected = quantize(moved.float(), hessian=hessian)
        for part, other in zip(layer.quantised[name], expected, strict=True):
            assert (part == other).float().mean() > 0.98, name
        assert torch.linalg.norm(a @ weight.T - b @ layer.dense[name].double().T) < 0.5 * torch.linalg.norm(
            (a - b) @ weight.T
        )


def test_it_is_saved_with_its_facts(checkpoint, tmp_path):
    path = tmp_path / "river"
    calibrated = calibrate(checkpoint, path, group_size=128)
    assert (calibrated.quantiser, calibrated.group_size) == ("gptq", 128)
    save_river(path, calibrated, checkpoint.config, checkpoint.fingerprint)
    assert sorted(file.suffix for file in path.iterdir()) == [".json", ".safetensors"], "nothing unfinished"
    assert_equal(load_river(path, checkpoint.config, checkpoint.fingerprint), calibrated)
    facts = read_facts(path)
    assert facts["calibration"] == calibrated.calibration
    spoiled = [
        ("tokens", 0),
        ("tokens", 1.5),
        ("agreement", 1.5),
        ("agreement", None),
        ("kl", -1),
        ("kl", "0"),
    ]
    for key, value in spoiled:
        changed = facts | {"calibration": facts["calibration"] | {key: value}}
        (path / "river.json").write_text(json.dumps(changed))
        with pytest.raises(RiverError, match=f"calibration.{key} is {json.dumps(value)}; accepted"):
            read_facts(path)
    for changes in ({"calibration": None}, {"calibration": {}}, {"quantiser": "hqq"}):
        (path / "river.json").write_text(json.dumps(facts | changes))
        with pytest.raises(RiverError, match="calibration is .*; accepted|calibration is .*no such key"):
            read_facts(path)


def interrupt_at(monkeypatch, index: int, calls: list) -> None:
    """A Ctrl-C in the middle of a layer; `calls` gets the layers that were begun."""
    real = refine._ExitLayer.fit

    def fit(self, names, *inputs):
        if names == refine.QKV:
            calls.append(self.name)
        if self.name == f"layers.{index}" and names == refine.GATE_UP:
            raise KeyboardInterrupt
        real(self, names, *inputs)

    monkeypatch.setattr(refine._ExitLayer, "fit", fit)


@pytest.mark.parametrize("index", range(LAYERS))
def test_it_goes_on_after_an_interruption(checkpoint, tmp_path, monkeypatch, index):
    """To the same bits, and without doing again what was done."""
    expected = calibrate(checkpoint, tmp_path / "at once")
    path, calls = tmp_path / "river", []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, index, calls)
        calibrate(checkpoint, path)
    assert len(calls) == index + 1
    assert not (path / "river.json").exists()
    calls.clear()
    interrupt_at(monkeypatch, LAYERS, calls)
    assert_equal(calibrate(checkpoint, path), expected)
    assert calls == [f"layers.{layer}" for layer in range(index, LAYERS)]


def test_what_was_made_from_something_else_is_not_taken(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "river"
    calibrate(checkpoint, path, CalibrationTexts(tokens(12, 40, seed=2), TEXTS.held_out))
    calibrate(checkpoint, path, group_size=128)
    calls = []
    interrupt_at(monkeypatch, LAYERS, calls)
    found = calibrate(checkpoint, path)
    assert len(calls) == LAYERS
    assert_equal(found, calibrate(checkpoint, tmp_path / "new"))


def test_what_was_made_of_another_model_is_not_taken(tiny_checkpoint, tmp_path, monkeypatch):
    """Of other weights, or of the same ones in another dtype."""
    path, calls = tmp_path / "river", []
    one, other = tiny_checkpoint("one"), tiny_checkpoint("other", seed=1)
    interrupt_at(monkeypatch, LAYERS, calls)
    for directory, dtype in ((one, "float32"), (other, "float32"), (one, "bfloat16")):
        calls.clear()
        calibrate(load_checkpoint(directory, dtype), path)
        assert len(calls) == LAYERS, (directory, dtype)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64])
def test_a_broken_layer_is_made_again(checkpoint, tmp_path, content):
    path = tmp_path / "river"
    expected = calibrate(checkpoint, path)
    (second,) = (path / ".calibration").glob("*-1.safetensors")
    second.write_bytes(content)
    assert_equal(calibrate(checkpoint, path), expected)


@pytest.mark.parametrize("exists", [False, True])
def test_activations_that_are_not_finite(checkpoint, tmp_path, monkeypatch, exists):
    """One line that names the layer, and nothing is left of the others."""
    monkeypatch.setattr(river, "compare", lambda *arguments: Agreement(1, 1.0, 0.0))
    path = tmp_path / "river"
    built = build_river(checkpoint.config, checkpoint.weights, progress=False)
    if exists:
        save_river(path, built, checkpoint.config, checkpoint.fingerprint)
    layers = list(checkpoint.weights.layers)
    layers[1] = replace(layers[1], input_layernorm=torch.full_like(layers[1].input_layernorm, 3e38))
    spoiled = replace(checkpoint, weights=replace(checkpoint.weights, layers=layers))
    with pytest.raises(
        RiverError, match="layers.1.q_proj.k_proj.v_proj: activations with NaN or Inf"
    ) as error:
        calibrate_river(spoiled, built, TEXTS, path, progress=False)
    assert "\n" not in str(error.value)
    if exists:
        assert sorted(file.suffix for file in path.iterdir()) == [".json", ".safetensors"]
    else:
        assert not path.exists()


def test_logits_that_are_not_finite(checkpoint):
    weights = replace(checkpoint.weights, norm=torch.full_like(checkpoint.weights.norm, 3e38))
    built = build_river(checkpoint.config, weights, progress=False)
    with pytest.raises(RiverError, match="logits of a text became NaN or infinite in torch.float32"):
        compare(Network(checkpoint.config, weights, built), TEXTS.held_out)


def test_a_folder_that_cannot_be_written(checkpoint, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("river_ext.calibration.unfinished.save_file", full)
    with pytest.raises(RiverError, match="river: cannot be written .*No space left"):
        calibrate(checkpoint, tmp_path / "river")


# --- texts ----------------------------------------------------------------------------------------------


def test_every_eighth_text_is_set_aside():
    checkpoint = load_checkpoint(DEMO)
    texts = [f"Text {number} " + "of many words " * 400 for number in range(600)]
    found = calibration_texts(checkpoint, texts, "file")
    assert (len(found.used), len(found.held_out)) == (river.MAX_TEXTS - 64, 64)
    longest = min(river.MAX_TOKENS, checkpoint.config.max_length)
    assert {len(tokens) for tokens in found.used} == {longest}
    text = checkpoint.tokenizer.encode(texts[15]).ids
    assert found.held_out[1] == text[:longest] and text[:longest] not in found.used


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["many words " * 500] * 7, "file: 7 texts, .* accepted: at least 8 texts, 1024 tokens"),
        (["few words"] * 20, "file: 20 texts, .* tokens in those to calibrate on; accepted"),
        ([], "file: 0 texts, 0 tokens"),
    ],
)
def test_too_little_text(texts, message):
    with pytest.raises(RiverError, match=message):
        calibration_texts(load_checkpoint(DEMO), texts, "file")


def test_a_tokenizer_is_needed(checkpoint):
    with pytest.raises(RiverError, match="no tokenizer.json, which calibration texts need"):
        calibration_texts(checkpoint, ["text"] * 8, "file")
