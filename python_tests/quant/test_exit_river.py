"""A river on disk: built, saved, loaded, replaced, refused."""

import json
import os
import signal
import sys
import threading
from dataclasses import fields, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from river_ext import ops
from river_ext.errors import RiverError
from river_ext.loading.checkpoint import load_checkpoint
from river_ext.quant import exit_river as river
from river_ext.quant import river_store, w4


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
    assert torch.equal(one.lm_head, other.lm_head)
    assert (one.group_size, one.quantiser) == (other.group_size, other.quantiser)
    for a, b in zip(one, other, strict=True):
        for field in fields(a):
            assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


def tensors_of(path):
    return path / f"river-{json.loads((path / 'river.json').read_text())['sha256'][:16]}.safetensors"


def rewrite(path, tensors, **changes):
    """A saved river with other tensors, and facts that fit them but for the changes."""
    facts = json.loads((path / "river.json").read_text()) | {"sha256": river.sha256_of(tensors)} | changes
    tensors_of(path).unlink(missing_ok=True)
    (path / "river.json").write_text(json.dumps(facts))
    save_file(tensors, tensors_of(path))


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
        gate, up = w4.split_gate_up(exit.gate_up_proj, shape)
        o = ops.dequantize_w4(exit.o_proj, *shape.projections()["o_proj"], torch.float32)
        down = ops.dequantize_w4(exit.down_proj, *shape.projections()["down_proj"], torch.float32)
        dense = [*w4.split_qkv(exit.qkv_proj, shape), o, gate, up, down]
        for name, weight in zip(shape.projections(), dense, strict=True):
            exact = getattr(block, name)
            error = (weight[: len(exact)] - exact).norm() / exact.norm()
            assert error < 0.1, name


@pytest.mark.parametrize("vocab_size", [96, 97, 111, 112])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_stands_for_the_models(tiny_checkpoint, vocab_size, tied):
    checkpoint = load_checkpoint(tiny_checkpoint(vocab_size=vocab_size, tie_word_embeddings=tied))
    built = river.build_river(checkpoint.config, checkpoint.weights)
    exact = checkpoint.weights.lm_head.float()
    assert built.lm_head.shape == (-(-vocab_size // 16), 1, 576)
    dense = ops.dequantize_w4(built.lm_head, *exact.shape, torch.float32)
    assert (dense - exact).norm() / exact.norm() < 0.1


def test_a_river_that_was_saved_without_a_head(saved, tmp_path, checkpoint, built):
    tensors = load_file(tensors_of(saved))
    assert torch.equal(tensors.pop("lm_head"), built.lm_head)
    rewrite(saved, tensors)
    loaded = river.load_river(saved, checkpoint.config, checkpoint.fingerprint)
    assert loaded.lm_head is None
    river.save_river(tmp_path / "again", loaded, checkpoint.config, checkpoint.fingerprint)
    assert river.read_facts(tmp_path / "again") == river.read_facts(saved)
    loaded.lm_head = built.lm_head
    assert_equal(loaded, built)


def test_facts(saved, checkpoint):
    facts = json.loads((saved / "river.json").read_text())
    assert facts == river.read_facts(saved)
    assert facts["format_version"] == 2 and facts["quantiser"] == "hqq" and facts["group_size"] == 64
    assert facts["fingerprint"] == checkpoint.fingerprint
    assert facts["num_hidden_layers"] == 3 and facts["block"]["intermediate_size"] == 112
    with safe_open(tensors_of(saved), framework="pt") as file:
        assert len(file.keys()) == 3 * 4 + 1


def test_a_loaded_river_can_replace_its_own_files(saved, checkpoint, built):
    loaded = river.load_river(saved, checkpoint.config, checkpoint.fingerprint)
    river.save_river(saved, loaded, checkpoint.config, checkpoint.fingerprint)
    assert_equal(loaded, built)
    assert_equal(river.load_river(saved, checkpoint.config, checkpoint.fingerprint), built)
    assert [entry.name for entry in saved.parent.iterdir() if "river" in entry.name] == [saved.name]


# every call of write_river that changes what is on the disk, in its order
STEPS = [
    "mkdir",
    "json",
    "save_file",
    "chmod",
    "fsync 1",
    "fsync 2",
    "replace 1",
    "fsync 3",
    "replace 2",
    "fsync 4",
]
SWITCH = STEPS.index("replace 2")


def fail_at(monkeypatch, step: str, before: bool, fail) -> None:
    """fail() is called at a step of write_river, before it does anything or just after."""
    name, _, number = step.partition(" ")
    owner, name = {
        "mkdir": (river_store.Path, "mkdir"), "json": (river_store.Path, "write_text"),
        "save_file": (river_store, "save_file"), "chmod": (river_store.os, "chmod"),
        "fsync": (river_store.os, "fsync"), "replace": (river_store.os, "replace"),
    }[name]  # fmt: skip
    real, calls = getattr(owner, name), []

    def failing(*args, **options):
        if name == "mkdir" and args[0].name != river_store.SCRATCH:
            return real(*args, **options)
        calls.append(args)
        fails = len(calls) == int(number or 1)
        if fails and before:
            fail()
        result = real(*args, **options)
        if fails:
            fail()
        return result

    monkeypatch.setattr(owner, name, failing)


@pytest.fixture
def other(checkpoint):
    """Another river of the same checkpoint."""
    return river.build_river(checkpoint.config, checkpoint.weights, group_size=128)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "replaced"])
def test_nothing_half_written(monkeypatch, saved, checkpoint, built, other, error, step, exists, before):
    path = saved if exists else saved.with_name("new")
    content, entries = contents(saved), sorted(saved.parent.iterdir())

    def fail():
        raise error

    with monkeypatch.context() as patch:
        fail_at(patch, step, before, fail)
        with pytest.raises(
            KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RiverError
        ) as caught:
            river.save_river(path, other, checkpoint.config, checkpoint.fingerprint)
    if caught.type is RiverError:
        assert str(path) in str(caught.value) and "No space left" in str(caught.value)
    if STEPS.index(step) < SWITCH or step == "replace 2" and before:
        assert sorted(saved.parent.iterdir()) == entries
        assert contents(saved) == content
    else:  # it had taken place
        assert_equal(river.load_river(path, checkpoint.config, checkpoint.fingerprint), other)
        assert len(contents(path)) == 2


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("exists", [False, True], ids=["new", "replaced"])
def test_a_writer_that_is_killed(tiny_checkpoint, saved, checkpoint, built, other, step, exists):
    """At every point: the old river or the new one is there, whole, and the next writer cleans up."""
    path = saved if exists else saved.with_name("new")
    process = os.fork()
    if not process:  # no other threads: the child may go on with Python, and is killed at the step
        try:
            fail_at(pytest.MonkeyPatch(), step, False, lambda: os.kill(os.getpid(), signal.SIGKILL))
            river.save_river(path, other, checkpoint.config, checkpoint.fingerprint)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    if STEPS.index(step) >= SWITCH:
        assert_equal(river.load_river(path, checkpoint.config, checkpoint.fingerprint), other)
    elif exists:
        assert_equal(river.load_river(path, checkpoint.config, checkpoint.fingerprint), built)
    else:
        assert "no river.json" in refusal(path, checkpoint)
    river.save_river(path, built, checkpoint.config, checkpoint.fingerprint)
    assert_equal(river.load_river(path, checkpoint.config, checkpoint.fingerprint), built)
    assert sorted(contents(path)) == sorted(["river.json", tensors_of(path).name])


def test_writers_wait_for_each_other_and_readers_for_nobody(tmp_path, checkpoint, built, other):
    """Two rivers take turns at one path; whatever is read there is one of them."""
    path, ends = tmp_path / "river", []
    digests = {river.sha256_of(river._tensors(one)) for one in (built, other)}

    def write(one):
        for _ in range(20):
            river.save_river(path, one, checkpoint.config, checkpoint.fingerprint)
        ends.append(one)

    writers = [threading.Thread(target=write, args=(one,)) for one in (built, other, built)]
    river.save_river(path, built, checkpoint.config, checkpoint.fingerprint)
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        loaded = river.load_river(path, checkpoint.config, checkpoint.fingerprint)
        assert river.sha256_of(river._tensors(loaded)) in digests
        reads += 1
    assert len(ends) == 3 and reads > 3
    assert sorted(contents(path)) == sorted(["river.json", tensors_of(path).name])


def test_a_reader_whose_tensors_were_just_replaced(saved, monkeypatch, checkpoint, other):
    """It takes the river that is there now."""
    real, calls = river._stored_tensors, []

    def replaced_first(*args):
        calls.append(args)
        if len(calls) == 1:
            river.save_river(saved, other, checkpoint.config, checkpoint.fingerprint)
        return real(*args)

    monkeypatch.setattr(river, "_stored_tensors", replaced_first)
    assert_equal(river.load_river(saved, checkpoint.config, checkpoint.fingerprint), other)
    assert len(calls) == 2


def test_a_lock_that_went_with_its_holder_is_no_lock(tmp_path, monkeypatch):
    """Between opening and locking it, its holder ended and the next writer may have made a new one."""
    path, real, calls = tmp_path / "river", river_store.fcntl.flock, []

    def flock(descriptor, kind):
        calls.append(kind)
        if len(calls) == 1:
            (path / ".lock").unlink()
        return real(descriptor, kind)

    monkeypatch.setattr(river_store.fcntl, "flock", flock)
    with river_store._locked(path):
        assert (path / ".lock").exists() and len(calls) == 2
    assert not path.exists()


def test_a_writer_does_not_wait_for_ever(tmp_path, monkeypatch, checkpoint, built):
    monkeypatch.setattr(river_store, "WAIT_SECONDS", 0.1)
    refused = pytest.raises(RiverError, match="river: another process has been writing")
    with river_store._locked(tmp_path / "river"), refused:
        river.save_river(tmp_path / "river", built, checkpoint.config, checkpoint.fingerprint)
    assert list(tmp_path.glob("river*")) == []
    river.save_river(tmp_path / "river", built, checkpoint.config, checkpoint.fingerprint)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_both_files_have_the_mode_that_the_umask_allows(tmp_path, checkpoint, built, umask):
    before = os.umask(umask)
    try:
        river.save_river(tmp_path / "river", built, checkpoint.config, checkpoint.fingerprint)
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "river").iterdir()}
    assert modes == {0o666 & ~umask}


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


BAD_FACTS = [
    ("format_version", 1, "accepted: 2; convert the checkpoint again"),
    ("format_version", 3, "accepted: 2"),
    ("format_version", 2.0, "accepted: 2"),
    ("format_version", None, "accepted: 2"),
    ("format", "something else", 'accepted: "river_ext W4"'),
    ("group_size", 32, "accepted: 64, 128"),
    ("group_size", [64], "an integer"),
    ("group_size", 64.0, "an integer"),
    ("group_size", True, "an integer"),
    ("quantiser", 1, "accepted: hqq"),
    ("quantiser", "magic", "accepted: hqq"),
    ("fingerprint", None, "64 hexadecimal digits"),
    ("fingerprint", "ab", "64 hexadecimal digits"),
    ("sha256", "../" * 16, "64 hexadecimal digits"),
    ("sha256", 7, "64 hexadecimal digits"),
    ("num_hidden_layers", 4, "accepted: 3"),
    ("num_hidden_layers", 3.0, "an integer"),
    ("num_hidden_layers", True, "an integer"),
    ("block", None, "an object with hidden_size"),
    ("block", {}, "an object with hidden_size"),
]


@pytest.mark.parametrize(("key", "value", "accepted"), BAD_FACTS)
def test_facts_that_make_no_sense_are_refused(saved, checkpoint, key, value, accepted):
    facts = json.loads((saved / "river.json").read_text())
    facts[key] = value
    (saved / "river.json").write_text(json.dumps(facts))
    message = refusal(saved, checkpoint)
    assert f"{key} is {json.dumps(value)}"[:40] in message and accepted in message
    del facts[key]
    (saved / "river.json").write_text(json.dumps(facts))
    assert f"{key} is missing" in refusal(saved, checkpoint)


def test_a_path_is_needed(monkeypatch, tmp_path, checkpoint, built):
    monkeypatch.chdir(tmp_path)
    for path in ("", None, 7, "a\0b", "\ud800"):
        with pytest.raises(RiverError, match="river .*accepted: the path of a directory"):
            river.save_river(path, built, checkpoint.config, checkpoint.fingerprint)
        with pytest.raises(RiverError, match="river .*accepted: the path of a directory"):
            river.load_river(path, checkpoint.config, checkpoint.fingerprint)
    assert not list(tmp_path.glob("river*"))


def test_every_fact_is_read(saved, checkpoint):
    facts = json.loads((saved / "river.json").read_text())
    for name, size in facts["block"].items():
        for value in (size + 2, float(size), True, None, -1):
            block = facts["block"] | {name: value}
            (saved / "river.json").write_text(json.dumps(facts | {"block": block}))
            assert f"block.{name} is {json.dumps(value)}" in refusal(saved, checkpoint)
    (saved / "river.json").write_text(json.dumps(facts | {"note": 1}))
    assert "note is 1" in refusal(saved, checkpoint)


def test_every_byte_of_the_tensors_counts(saved, checkpoint):
    file = tensors_of(saved)
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(start, len(data), (60,), generator=generator).tolist()
    for place in (start, len(data) - 1, *places):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert "not what was saved" in refusal(saved, checkpoint), place
    file.write_bytes(data)
    river.load_river(saved, checkpoint.config, checkpoint.fingerprint)
    tensors = load_file(file)
    tensors["layers.0.o_proj"], tensors["layers.1.o_proj"] = (
        tensors["layers.1.o_proj"],
        tensors["layers.0.o_proj"],
    )
    save_file(tensors, file)
    assert "not what was saved" in refusal(saved, checkpoint)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", ["scale", "zero"])
@pytest.mark.parametrize("name", ["layers.1.down_proj", "lm_head"])
def test_scales_and_zeros_are_finite(saved, tmp_path, checkpoint, built, name, place, value):
    owner, field = (built, name) if name == "lm_head" else (built[1], "down_proj")
    spoiled = getattr(owner, field).clone()
    at = 512 + 4 * 7 + 2 * (place == "zero")
    spoiled[1, 0, at : at + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
    tensors = load_file(tensors_of(saved))
    rewrite(saved, tensors | {name: spoiled})
    message = refusal(saved, checkpoint)
    assert f"{name} has a scale or a zero that is not finite" in message
    setattr(owner, field, spoiled)
    with pytest.raises(RiverError, match=f"{name} has a scale or a zero that is not finite"):
        river.save_river(tmp_path / "spoiled", built, checkpoint.config, checkpoint.fingerprint)
    assert not (tmp_path / "spoiled").exists()


@pytest.mark.parametrize("file", ["facts", "tensors"])
@pytest.mark.parametrize("kind", ["a FIFO", "a directory", "a link to nothing", "a device"])
def test_only_regular_files_are_read(saved, checkpoint, built, file, kind):
    path = saved / "river.json" if file == "facts" else tensors_of(saved)
    path.unlink()
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "a device" else "nowhere")
    message = refusal(saved, checkpoint)
    assert f"{path}: " in message and kind in message and "accepted: a regular file" in message
    try:  # a writer does not hang either
        river.save_river(saved, built, checkpoint.config, checkpoint.fingerprint)
        assert_equal(river.load_river(saved, checkpoint.config, checkpoint.fingerprint), built)
    except RiverError as error:
        assert kind == "a directory" and "cannot be written" in str(error)


def test_missing_and_broken_files_are_refused(tmp_path, saved, checkpoint):
    assert "no river.json in it" in refusal(tmp_path / "nowhere", checkpoint)
    tensors = tensors_of(saved)
    data = tensors.read_bytes()
    for broken in (data[:-1], data[: len(data) // 2], data[:100], b"", b"\xff" * 64):
        tensors.write_bytes(broken)
        assert f"{tensors.name}: not a complete safetensors file" in refusal(saved, checkpoint)
    tensors.unlink()
    assert f"{tensors.name}: missing; river.json names it" in refusal(saved, checkpoint)
    (saved / "river.json").write_text("{")
    assert "river.json: not valid JSON" in refusal(saved, checkpoint)


def test_mismatched_tensors_are_refused_by_name(saved, checkpoint):
    tensors = load_file(tensors_of(saved))
    name = "layers.1.o_proj"
    changes = {
        "is missing": {k: v for k, v in tensors.items() if k != name},
        "is uint8 [3, 1, 576]": tensors | {name: tensors[name][:3].clone()},
        "is int8 [4, 1, 576]": tensors | {name: tensors[name].to(torch.int8)},
    }
    for message, changed in changes.items():
        rewrite(saved, changed)
        found = refusal(saved, checkpoint)
        assert name in found and message in found
        assert "uint8 [4, 1, 576]" in found
    wanted = f"uint8 {list(tensors['lm_head'].shape)}"
    for message, head in {
        "is uint8 [1, 1, 576]": tensors["lm_head"][:1].clone(),
        "is int8": tensors["lm_head"].to(torch.int8),
        "is uint8 [0, 1, 576]": tensors["lm_head"][:0].clone(),
    }.items():
        rewrite(saved, tensors | {"lm_head": head})
        found = refusal(saved, checkpoint)
        assert f"tensor lm_head {message}" in found and wanted in found
    rewrite(saved, tensors | {"layers.3.o_proj": tensors[name].clone()})
    assert "layers.3.o_proj has no place" in refusal(saved, checkpoint)


def test_weights_that_cannot_be_quantised_are_named(checkpoint):
    layers = list(checkpoint.weights.layers)
    up_proj = layers[2].up_proj.clone()
    up_proj[5, 7] = torch.nan
    layers[2] = replace(layers[2], up_proj=up_proj)
    with pytest.raises(RiverError, match="layers.2.up_proj holds NaN or Inf in row 5"):
        river.build_river(checkpoint.config, replace(checkpoint.weights, layers=layers))
    lm_head = checkpoint.weights.lm_head.clone()
    lm_head[3, 1] = torch.inf
    with pytest.raises(RiverError, match="lm_head holds NaN or Inf in row 3"):
        river.build_river(checkpoint.config, replace(checkpoint.weights, lm_head=lm_head))


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
