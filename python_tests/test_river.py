"""A river on disk: built, saved, loaded, replaced, refused."""

import json
import sys
from dataclasses import fields, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from river_ext import ops, river, w4
from river_ext.checkpoint import load_checkpoint
from river_ext.errors import RiverError


@pytest.fixture
def checkpoint(tiny_checkpoint):
    return load_checkpoint(tiny_checkpoint())


@pytest.fixture
def built(checkpoint):
    return river.build_river(checkpoint.config, checkpoint.weights)


@pytest.fixture
def saved(tmp_path, checkpoint, built):
    path = tmp_path / "a river"
    river.save_river(path, built, checkpoint.config, checkpoint.fingerprint)
    return path


def assert_equal(one, other):
    assert len(one) == len(other)
    assert (one.group_size, one.quantiser) == (other.group_size, other.quantiser)
    for a, b in zip(one, other, strict=True):
        for field in fields(a):
            assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("group_size", [64, 128])
def test_saved_and_rebuilt_rivers_are_equal(tiny_checkpoint, tmp_path, group_size):
    directory = tiny_checkpoint(
        hidden_size=192, intermediate_size=200, num_attention_heads=3, num_key_value_heads=1
    )
    checkpoint = load_checkpoint(directory)
    built = river.build_river(checkpoint.config, checkpoint.weights, group_size)
    again = load_checkpoint(directory)
    assert_equal(built, river.build_river(again.config, again.weights, group_size))
    path = tmp_path / "deep" / "er" / "river"
    river.save_river(path, built, checkpoint.config, checkpoint.fingerprint)
    assert_equal(built, river.load_river(path, again.config, again.fingerprint))
    first = contents(path)
    river.save_river(path, built, checkpoint.config, checkpoint.fingerprint)
    assert contents(path) == first


def test_exit_layers_stand_for_their_blocks(checkpoint, built):
    shape = w4.BlockShape.of(checkpoint.config)
    for block, exit in zip(checkpoint.weights.layers, built, strict=True):
        gate, up = w4.split_gate_up(exit.gate_up_proj, shape, ops.dequantize_w4)
        o = ops.dequantize_w4(exit.o_proj, *shape.projections()["o_proj"], torch.float32)
        down = ops.dequantize_w4(exit.down_proj, *shape.projections()["down_proj"], torch.float32)
        dense = [*w4.split_qkv(exit.qkv_proj, shape, ops.dequantize_w4), o, gate, up, down]
        for name, weight in zip(shape.projections(), dense, strict=True):
            exact = getattr(block, name)
            error = (weight[: len(exact)] - exact).norm() / exact.norm()
            assert error < 0.1, name


def test_facts(saved, checkpoint):
    facts = json.loads((saved / "river.json").read_text())
    assert facts == river.read_facts(saved)
    assert facts["format_version"] == 1 and facts["quantiser"] == "hqq" and facts["group_size"] == 64
    assert facts["fingerprint"] == checkpoint.fingerprint
    assert facts["num_hidden_layers"] == 3 and facts["block"]["intermediate_size"] == 112
    with safe_open(saved / "river.safetensors", framework="pt") as file:
        assert len(file.keys()) == 3 * 4


def test_a_loaded_river_can_replace_its_own_files(saved, checkpoint, built):
    loaded = river.load_river(saved, checkpoint.config, checkpoint.fingerprint)
    river.save_river(saved, loaded, checkpoint.config, checkpoint.fingerprint)
    assert_equal(loaded, built)
    assert_equal(river.load_river(saved, checkpoint.config, checkpoint.fingerprint), built)
    assert [entry.name for entry in saved.parent.iterdir() if "river" in entry.name] == [saved.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("step", ["tensors", "facts", "rename"])
@pytest.mark.parametrize("exists", [False, True], ids=["new", "replaced"])
def test_nothing_half_written(monkeypatch, saved, checkpoint, built, error, step, exists):
    path = saved if exists else saved.with_name("new")
    before = contents(saved)
    entries = sorted(saved.parent.iterdir())

    def fail(*args, **options):
        raise error

    if step == "tensors":

        def half(tensors, file):
            file.write_bytes(b"half")
            fail()

        monkeypatch.setattr(river, "save_file", half)
    elif step == "facts":
        monkeypatch.setattr(river.json, "dumps", fail)
    else:
        rename = river.Path.rename
        monkeypatch.setattr(
            river.Path,
            "rename",
            lambda self, to: fail() if self.name == "new" and to == path else rename(self, to),
        )
    expected = KeyboardInterrupt if error is KeyboardInterrupt else RiverError
    with pytest.raises(expected) as caught:
        river.save_river(path, built, checkpoint.config, checkpoint.fingerprint)
    if expected is RiverError:
        assert str(path) in str(caught.value) and "No space left" in str(caught.value)
    assert sorted(saved.parent.iterdir()) == entries
    assert contents(saved) == before


def test_other_content_is_not_replaced(tmp_path, saved, checkpoint, built):
    file, folder, link = tmp_path / "file", tmp_path / "folder", tmp_path / "link"
    file.write_text("mine")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    link.symlink_to(saved)
    for path in (file, folder, link):
        with pytest.raises(RiverError, match="exists and is not a saved river"):
            river.save_river(path, built, checkpoint.config, checkpoint.fingerprint)
    assert file.read_text() == (folder / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    river.save_river(tmp_path / "empty", built, checkpoint.config, checkpoint.fingerprint)
    assert contents(tmp_path / "empty") == contents(saved)


def refusal(path, checkpoint):
    with pytest.raises(RiverError) as error:
        river.load_river(path, checkpoint.config, checkpoint.fingerprint)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_river_of_another_checkpoint_is_refused(saved, tiny_checkpoint):
    other = load_checkpoint(tiny_checkpoint("other", seed=1))
    mine = json.loads((saved / "river.json").read_text())["fingerprint"]
    message = refusal(saved, other)
    assert mine in message and other.fingerprint in message and str(saved / "river.json") in message


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("format_version", 2, "accepted: 1"),
        ("format_version", None, "accepted: 1"),
        ("format", "something else", "accepted: 'river_ext W4'"),
        ("group_size", 32, "accepted: 64, 128"),
        ("group_size", [64], "accepted: 64, 128"),
        ("quantiser", 1, "a string"),
        ("fingerprint", None, "a string"),
    ],
)
def test_unknown_facts_are_refused(saved, checkpoint, key, value, accepted):
    facts = json.loads((saved / "river.json").read_text())
    facts[key] = value
    (saved / "river.json").write_text(json.dumps(facts))
    message = refusal(saved, checkpoint)
    assert f"{key} is {value!r}" in message and accepted in message
    del facts[key]
    (saved / "river.json").write_text(json.dumps(facts))
    assert f"{key} is missing" in refusal(saved, checkpoint)


def test_missing_and_broken_files_are_refused(tmp_path, saved, checkpoint):
    assert "no river.json in it" in refusal(tmp_path / "nowhere", checkpoint)
    tensors = saved / "river.safetensors"
    data = tensors.read_bytes()
    for broken in (data[:-1], data[: len(data) // 2], data[:100], b"", b"\xff" * 64):
        tensors.write_bytes(broken)
        assert "river.safetensors: not a complete safetensors file" in refusal(saved, checkpoint)
    tensors.unlink()
    assert "river.safetensors" in refusal(saved, checkpoint)
    (saved / "river.json").write_text("{")
    assert "river.json: not valid JSON" in refusal(saved, checkpoint)


def test_mismatched_tensors_are_refused_by_name(saved, checkpoint):
    file = saved / "river.safetensors"
    tensors = load_file(file)
    name = "layers.1.o_proj"
    changes = {
        "is missing": {k: v for k, v in tensors.items() if k != name},
        "is uint8 [3, 1, 576]": tensors | {name: tensors[name][:3].clone()},
        "is int8 [4, 1, 576]": tensors | {name: tensors[name].to(torch.int8)},
    }
    for message, changed in changes.items():
        save_file(changed, file)
        found = refusal(saved, checkpoint)
        assert name in found and message in found
        assert "uint8 [4, 1, 576]" in found
    save_file(tensors | {"layers.3.o_proj": tensors[name].clone()}, file)
    assert "layers.3.o_proj has no place" in refusal(saved, checkpoint)


def test_weights_that_cannot_be_quantised_are_named(checkpoint):
    layers = list(checkpoint.weights.layers)
    up_proj = layers[2].up_proj.clone()
    up_proj[5, 7] = torch.nan
    layers[2] = replace(layers[2], up_proj=up_proj)
    with pytest.raises(RiverError, match="layers.2.up_proj holds NaN or Inf in row 5"):
        river.build_river(checkpoint.config, replace(checkpoint.weights, layers=layers))


def test_the_progress_bar_is_for_terminals(monkeypatch, capsys, checkpoint):
    river.build_river(checkpoint.config, checkpoint.weights)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("river_ext.progress.BAR_AFTER", -1.0)
    river.build_river(checkpoint.config, checkpoint.weights, progress=False)
    assert capsys.readouterr() == ("", "")
    river.build_river(checkpoint.config, checkpoint.weights)
    out, err = capsys.readouterr()
    assert out == "" and "quantising" in err
