"""Rivers from GGUF files of the same model."""

import hashlib

import pytest
import torch
from gguf_files import gguf_bytes, model_parts
from packed_checkpoints import projection_names

import river_ext
from river_ext.errors import RiverError
from river_ext.loading.checkpoint import load_checkpoint
from river_ext.loading.gguf_checkpoint import convert_gguf
from river_ext.loading.weights import BlockShape
from river_ext.quant import hqq
from river_ext.quant.imported.build import import_river
from river_ext.quant.quality import dense_projections

pytest.importorskip("gguf")

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


@pytest.fixture
def model(tiny_checkpoint):
    return tiny_checkpoint("model", **SHAPE)


def write(path, model, kind, plain=()):
    """Writes the model's layers in a type, but for names that hold a part of `plain`; returns all values."""

    def kind_of(name):
        return "F16" if not name.startswith("blk.") or any(part in name for part in plain) else kind

    metadata, tensors, values = model_parts(model, kind_of)
    path.write_bytes(gguf_bytes(metadata, tensors))
    return values


def imported(path, model):
    checkpoint = load_checkpoint(model)
    return import_river(path, checkpoint.config, checkpoint.weights, progress=False)


def dense(river, model):
    """By the names of a checkpoint."""
    shape = BlockShape.of(load_checkpoint(model).config)
    layers = [dense_projections(exit_layer, shape) for exit_layer in river]
    return {f"{prefix}weight": layers[i][name] for i, name, prefix in projection_names(len(layers))}


def of_hqq(weight):
    q, scale, zero = (part.float() for part in hqq.quantize(weight))
    return (q - zero.repeat_interleave(64, 1)) * scale.repeat_interleave(64, 1)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_quantised_again(tiny_checkpoint, tmp_path, kind, model_type):
    """By HQQ, from what the type's formula gives; rows of q and k are in the checkpoint's order again."""
    model, path = tiny_checkpoint("model", **SHAPE, model_type=model_type), tmp_path / "model.gguf"
    values = write(path, model, kind)
    river = imported(path, model)
    errors = squares = 0.0
    for name, weight in dense(river, model).items():
        assert torch.equal(weight, of_hqq(values[name])), name
        errors += float((weight - values[name]).square().sum())
        squares += float(values[name].square().sum())
    facts = river.imported
    assert facts["source"] == f"GGUF {kind}"
    assert facts["files"] == {"model.gguf": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert (facts["kept"], facts["requantised"], facts["from_backbone"]) == (0, 14, 0)
    assert facts["relative_squared_error"] == pytest.approx(errors / squares, 1e-4) and errors > 0


def test_what_is_not_quantised_comes_from_the_backbone(model, tmp_path):
    write(tmp_path / "model.gguf", model, "Q4_0", plain=("ffn_down",))
    river = imported(tmp_path / "model.gguf", model)
    assert (river.imported["requantised"], river.imported["from_backbone"]) == (12, 2)
    own = load_checkpoint(model).weights.layers[1].down_proj
    assert torch.equal(dense(river, model)["model.layers.1.mlp.down_proj.weight"], of_hqq(own))
    write(tmp_path / "plain.gguf", model, "F16")
    with pytest.raises(RiverError, match="no projection of a layer is quantised"):
        imported(tmp_path / "plain.gguf", model)


def test_another_model_is_refused(model, tiny_checkpoint, tmp_path):
    path = tmp_path / "model.gguf"
    write(path, tiny_checkpoint("other", **SHAPE, seed=1), "Q4_0")
    with pytest.raises(RiverError, match="of another model: .* layers.0.q_proj"):
        imported(path, model)
    write(path, tiny_checkpoint("wide", **SHAPE | {"intermediate_size": 192}), "Q4_0")
    with pytest.raises(RiverError, match="intermediate_size is 192; accepted: 128"):
        imported(path, model)


def test_a_file_is_checkpoint_and_river_at_once(model, tmp_path):
    path, made = tmp_path / "model.gguf", tmp_path / "made"
    write(path, model, "Q8_0")
    convert_gguf(path, made, dtype="float32")
    loaded = river_ext.load(made, device="cpu", river=path)
    prompt, options = [9, 8, 7], {"max_new_tokens": 16, "stop_tokens": ()}
    full = loaded.generate(prompt, mode="full", **options).tokens
    assert full == river_ext.load(made, device="cpu").generate(prompt, mode="full", **options).tokens
    assert full == loaded.generate(prompt, mode="lossless", **options).tokens
    loaded.save_river(tmp_path / "river")
    again = river_ext.load(made, device="cpu", river=tmp_path / "river")
    assert again.river.imported == loaded.river.imported
