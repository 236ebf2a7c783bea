"""GGUF files: as checkpoints, and refused where they are broken."""

import json
import math
import os
import random
import struct
import sys
import time

import pytest
import torch
from gguf_files import KINDS, gguf_bytes, model_parts, string, value

import river_ext
from river_ext.errors import RiverError
from river_ext.loading.checkpoint import load_checkpoint
from river_ext.loading.gguf_checkpoint import GgufModel, convert_gguf
from river_ext.loading.gguf_file import GgufFile
from river_ext.loading.stored import stored_tensors

pytest.importorskip("gguf")

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
FAMILIES = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}


@pytest.fixture
def file(tmp_path):
    """Factory: writes a file of these parts."""

    def write(metadata, tensors, **options):
        path = tmp_path / "model.gguf"
        path.write_bytes(gguf_bytes(metadata, tensors, **options))
        return path

    return write


@pytest.fixture
def parts(tiny_checkpoint):
    metadata, tensors, _ = model_parts(tiny_checkpoint(**SHAPE))
    return metadata, tensors


def converted(path, tmp_path, **options):
    convert_gguf(path, tmp_path / "made", progress=False, **options)
    return tmp_path / "made"


def tensors_of(directory):
    return {name: tensor.read() for name, tensor in stored_tensors(directory).items()}


def refusal(path, tmp_path, name="refused"):
    with pytest.raises(RiverError) as error:
        convert_gguf(path, tmp_path / name, progress=False)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert [found for found in os.listdir(tmp_path) if name in found] == []
    return str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_comes_back(tiny_checkpoint, file, tmp_path, family):
    model = tiny_checkpoint(**SHAPE | FAMILIES[family])
    metadata, tensors, _ = model_parts(model)
    made = converted(file(metadata, tensors), tmp_path, dtype="float32")
    original, found = load_checkpoint(model), load_checkpoint(made)
    assert found.fingerprint == original.fingerprint
    ids = {"bos_token_id": None, "eos_token_ids": ()}
    assert {**vars(original.config), **ids, "rms_norm_eps": 0} == {**vars(found.config), "rms_norm_eps": 0}
    assert found.config.rms_norm_eps == pytest.approx(original.config.rms_norm_eps, 1e-6)
    one, other = (river_ext.load(path, device="cpu") for path in (model, made))
    prompt = [5, 6, 7]
    options = {"max_new_tokens": 8, "mode": "full", "stop_tokens": ()}
    assert one.generate(prompt, **options).tokens == other.generate(prompt, **options).tokens


@pytest.mark.parametrize("kind", KINDS)
def test_types_of_tensors(tiny_checkpoint, file, tmp_path, kind):
    """Dequantised in fp32, as the plain formulas of gguf_files.py do it, and rounded once."""
    metadata, tensors, values = model_parts(tiny_checkpoint(**SHAPE), kinds=lambda name: kind)
    path = file(metadata, tensors)
    model = GgufModel(path)
    for name, expected in values.items():
        assert torch.equal(model.read(name), expected), name
    for dtype in (torch.bfloat16, torch.float16):
        made = converted(path, tmp_path / str(dtype), dtype=dtype)
        for name, tensor in tensors_of(made).items():
            assert torch.equal(tensor, values[name].to(dtype)), name
        assert load_checkpoint(made).config.dtype == dtype


def test_many_rows_are_read_in_parts(tiny_checkpoint, file, monkeypatch):
    metadata, tensors, values = model_parts(tiny_checkpoint(**SHAPE), kinds=lambda name: "Q4_1")
    monkeypatch.setattr("river_ext.loading.gguf_file.BYTES_AT_A_TIME", 1000)
    model = GgufModel(file(metadata, tensors))
    assert all(torch.equal(model.read(name), expected) for name, expected in values.items())


def test_a_large_model_is_written_in_shards(parts, file, tmp_path, monkeypatch):
    path = file(*parts)
    whole = tensors_of(converted(path, tmp_path / "one"))
    monkeypatch.setattr("river_ext.loading.gguf_checkpoint.SHARD_BYTES", 50_000)
    made = converted(path, tmp_path / "many")
    files = sorted(file.name for file in made.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((made / name).stat().st_size < 60_000 for name in files)
    found = tensors_of(made)
    assert found.keys() == whole.keys() and all(torch.equal(found[n], whole[n]) for n in whole)


def test_biases_of_llama(tiny_checkpoint, file, tmp_path):
    model = tiny_checkpoint(**SHAPE, attention_bias=True)
    metadata, tensors, _ = model_parts(model)
    made = converted(file(metadata, tensors), tmp_path, dtype="float32")
    assert load_checkpoint(made).fingerprint == load_checkpoint(model).fingerprint


def test_linear_rope_scaling(parts, file, tmp_path):
    metadata, tensors = parts
    metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    config = load_checkpoint(converted(file(metadata, tensors), tmp_path)).config
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_rope_scaling_of_llama_3(parts, file, tmp_path):
    """llama.cpp stores what the frequencies are divided by, made by the formula of transformers."""
    metadata, tensors = parts
    metadata["llama.rope.freq_base"] = 500000.0
    factors = []
    for pair in range(8):
        wavelength = 2 * math.pi * 500000.0 ** (2 * pair / 16)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        factors.append(1 if smooth > 1 else 32 if smooth < 0 else 1 / ((1 - smooth) / 32 + smooth))
    assert {1, 32} < set(factors)
    tensors["rope_freqs.weight"] = ((8,), KINDS["F32"], struct.pack("<8f", *factors))
    config = load_checkpoint(converted(file(metadata, tensors), tmp_path)).config
    assert config.rope_scaling == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors[3] += 1
    tensors["rope_freqs.weight"] = ((8,), KINDS["F32"], struct.pack("<8f", *factors))
    assert "accepted are Llama 3's factors" in refusal(file(metadata, tensors), tmp_path, "other")


def test_ends_of_texts(parts, file, tmp_path):
    metadata, tensors = parts
    metadata |= {f"tokenizer.ggml.{name}_token_id": i for name, i in {"bos": 3, "eos": 4, "eot": 5}.items()}
    config = load_checkpoint(converted(file(metadata, tensors), tmp_path)).config
    assert (config.bos_token_id, config.eos_token_ids) == (3, (4, 5))


def test_the_tokenizer(tiny_checkpoint, file, tmp_path):
    pytest.importorskip("transformers")
    from tokenizers.pre_tokenizers import ByteLevel

    metadata, tensors, _ = model_parts(tiny_checkpoint(**SHAPE, vocab_size=260))
    tokens = [*sorted(ByteLevel.alphabet()), "ab", "<end>"]
    metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 257 + [3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}",
    }
    path = file(metadata, tensors)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "NoSuchOne"}')  # none of its
    made = converted(path, tmp_path)
    text = river_ext.load(made, device="cpu").text
    assert text.tokenizer.encode("abba<end>").tokens == ["ab", "b", "a", "<end>"]
    assert text.tokenizer.encode("ab").ids == [256]
    assert text.chat([{"role": "user", "content": "ab"}]) == [256, 257]


def test_a_package_that_is_missing(parts, file, tmp_path, monkeypatch):
    metadata, tensors = parts
    path = file(metadata | {"tokenizer.ggml.model": "gpt2"}, tensors)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "converting its tokenizer takes the package transformers" in refusal(path, tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "reading it takes the package gguf; install it, or river_ext[gguf]" in refusal(path, tmp_path)


def test_a_tokenizer_that_transformers_does_not_take(parts, file, tmp_path):
    pytest.importorskip("transformers")
    metadata, tensors = parts
    path = file(metadata | {"tokenizer.ggml.model": "none such"}, tensors)
    assert "transformers cannot convert its tokenizer" in refusal(path, tmp_path)


# --- what is refused ---


def test_places_that_are_taken(parts, file, tmp_path):
    path, taken = file(*parts), tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    (tmp_path / "a file").write_text("mine")
    (tmp_path / "a link").symlink_to(taken)
    for place in (taken, tmp_path / "a file", tmp_path / "a link", taken / "notes.txt" / "below"):
        with pytest.raises(RiverError, match="exists; accepted: a new or an empty|cannot be written"):
            convert_gguf(path, place)
    assert (taken / "notes.txt").read_text() == "mine" and len(os.listdir(tmp_path)) == 5
    (tmp_path / "empty").mkdir()
    convert_gguf(path, tmp_path / "empty")
    assert load_checkpoint(tmp_path / "empty")


CHANGED = [
    ("general.architecture", "mamba", "general.architecture is \"mamba\"; accepted: llama, mistral, qwen2"),
    ("general.architecture", 7, "general.architecture is 7"),
    ("llama.embedding_length", 65, "hidden_size is 65; accepted: a multiple of 64"),
    ("llama.embedding_length", [64, 64], "llama.embedding_length is [64, 64]; accepted: an integer"),
    ("llama.block_count", 0, "llama.block_count is 0"),
    ("llama.block_count", 3, "tensor blk.2.attn_norm.weight [64] is missing"),
    ("llama.block_count", 1, "tensor blk.1.attn_k.weight has no place in a llama model"),
    ("llama.attention.head_count", 3, "num_key_value_heads"),
    ("llama.attention.head_count_kv", [2, 2], "llama.attention.head_count_kv is [2, 2]"),
    ("llama.attention.key_length", 32, "blk.0.attn_q.weight has shape [64, 64]; the file's values ask"),
    ("llama.rope.dimension_count", 8, "llama.rope.dimension_count is 8; accepted: 16"),
    ("llama.attention.layer_norm_rms_epsilon", float("nan"), "layer_norm_rms_epsilon is NaN"),
    ("llama.rope.scaling.type", "yarn", 'llama.rope.scaling.type is "yarn"; accepted: none, linear'),
    ("llama.expert_count", 8, "llama.expert_count is 8; accepted: no such key"),
    ("llama.attention.scale", 0.5, "llama.attention.scale is 0.5"),
    ("tokenizer.ggml.bos_token_id", "1", 'tokenizer.ggml.bos_token_id is "1"; accepted: an integer'),
    ("tokenizer.ggml.eos_token_id", [1, 2], "tokenizer.ggml.eos_token_id is [1, 2]; accepted: an integer"),
    ("tokenizer.ggml.eot_token_id", 1.5, "tokenizer.ggml.eot_token_id is 1.5; accepted: an integer"),
    ("general.alignment", 3, "general.alignment is 3; accepted: a power of two"),
    ("general.alignment", "32", "general.alignment is 32"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "item", "message"), CHANGED)
def test_values_that_make_no_sense(parts, file, tmp_path, key, item, message):
    metadata, tensors = parts
    assert message in refusal(file(metadata | {key: item}, tensors), tmp_path)


@pytest.mark.parametrize("key", ["general.architecture", "llama.block_count", "llama.context_length"])
def test_values_that_are_missing(parts, file, tmp_path, key):
    metadata, tensors = parts
    del metadata[key]
    assert f"{key} is missing" in refusal(file(metadata, tensors), tmp_path)


def test_tensors_that_do_not_fit(parts, file, tmp_path):
    metadata, tensors = parts
    norm = "blk.1.ffn_norm.weight"

    def refused(**changes):
        new = {name: what for name, what in {**tensors, **changes}.items() if what is not None}
        return refusal(file(metadata, new), tmp_path)

    nan = struct.pack("<f", math.nan) + tensors[norm][2][4:]
    assert f"tensor {norm} holds NaN" in refused(**{norm: ((64,), KINDS["F32"], nan)})
    assert f"tensor {norm} [64] is missing" in refused(**{norm: None})
    assert "token_embd.weight is missing" in refused(**{"token_embd.weight": None})
    assert "has no place" in refused(more=((4,), KINDS["F32"], bytes(16)))
    assert f"tensor {norm} is of type 99" in refused(**{norm: ((64,), 99, bytes(256))})
    assert "Q4_0 has blocks of 32" in refused(**{norm: ((63,), KINDS["Q4_0"], bytes(256))})
    assert "has shape [0]" in refused(**{norm: ((0,), KINDS["F32"], b"")})
    assert "a tensor of 5 dimensions" in refused(**{norm: ((1,) * 5, KINDS["F32"], bytes(4))})
    assert "passes the end" in refused(**{norm: ((1 << 62,), KINDS["F32"], bytes(256))})
    assert "passes the end" in refused(**{norm: ((1 << 31, 1 << 31, 1 << 31), KINDS["F32"], bytes(256))})
    q8_1 = ((2, 32), 9, bytes(80))  # only of intermediate results: nothing dequantises it
    assert "is stored as Q8_1, which the package gguf does not dequantise" in refused(
        **{"rope_freqs.weight": q8_1}
    )


def test_headers_that_lie(tmp_path):
    """No length is believed: what does not fit the file is refused before anything of that size is made."""
    path = tmp_path / "model.gguf"

    def refused(data: bytes) -> str:
        path.write_bytes(data)
        start = time.perf_counter()
        message = refusal(path, tmp_path)
        assert time.perf_counter() - start < 5
        return message

    def head(tensors=0, values=1, version=3):
        return b"GGUF" + struct.pack("<IQQ", version, tensors, values)

    huge = (1 << 64) - 1
    assert "cannot be mapped" in refused(b"")
    assert "does not begin with GGUF" in refused(b"GGML" + bytes(60))
    assert "version 1" in refused(head(version=1)) and "version 50331648" in refused(head(version=3 << 24))
    assert f"{huge} tensors" in refused(head(tensors=huge))
    assert "passes the end" in refused(head(values=huge))
    assert "passes the end" in refused(head() + struct.pack("<Q", huge))
    assert "no UTF-8" in refused(head() + struct.pack("<Q", 2) + b"\xff\xff" + bytes(8))
    assert "type 13" in refused(head() + string("key") + struct.pack("<I", 13) + bytes(8))
    array = head() + string("key") + struct.pack("<I", 9)
    assert f"an array of {huge} items" in refused(array + struct.pack("<IQ", 0, huge))
    assert "passes the end" in refused(array + struct.pack("<IQ", 0, 1 << 20))
    assert "passes the end" in refused(array + struct.pack("<IQ", 8, 1 << 20))
    assert "type 9" in refused(array + struct.pack("<IQIQ", 9, 1, 0, 1))  # an array of arrays
    twice = string("key") + struct.pack("<I", 7) + b"\1"
    assert "key is there twice" in refused(head(values=2) + 2 * twice)


def test_files_that_end_early_or_are_none(parts, tmp_path):
    data, path = gguf_bytes(*parts), tmp_path / "model.gguf"
    for size in (3, 4, 23, 100, len(data) // 2, len(data) - 40):
        path.write_bytes(data[:size])
        assert "not a complete GGUF file" in refusal(path, tmp_path)
    path.unlink()
    assert refusal(path, tmp_path) == f"{path}: cannot be read (No such file or directory)"
    os.mkfifo(path)
    assert "is a FIFO" in refusal(path, tmp_path)


def test_changed_bytes_are_refused_or_harmless(parts, tmp_path):
    data, path = gguf_bytes(*parts), tmp_path / "model.gguf"
    header, random_ = len(data) - sum(len(stored) for _, _, stored in parts[1].values()), random.Random(7)
    refused = 0
    for _ in range(200):
        changed = bytearray(data)
        for _ in range(random_.choice((1, 1, 2, 8))):
            place = random_.randrange(header)
            changed[place] = random_.choice((0, 1, 0x7F, 0x80, 0xFF, random_.randrange(256)))
        path.write_bytes(changed)
        try:
            model = GgufModel(path)
            model.read("model.norm.weight")
        except RiverError:
            refused += 1
    assert refused > 100


def test_metadata_of_every_type(tmp_path):
    path = tmp_path / "x.gguf"
    metadata = {"a": 7, "b": 0.5, "c": True, "d": "text", "e": ["x", "y"], "f": [1, 2], "g": [0.5]}
    path.write_bytes(gguf_bytes(metadata, {}, version=2))
    assert GgufFile.open(path).metadata == metadata
    assert value(7)[0] == 4


# --- on the command line ---


def test_converting(parts, file, tmp_path, river, river_json, refused):
    path = file(*parts)
    code, out, _ = river("convert", path, "-o", tmp_path / "one")
    assert code == 0 and "llama, 2 layers in bfloat16" in out and "21 F32" in out
    assert "no tokenizer was in the file" in out
    document = river_json("convert", "--model", path, "-o", tmp_path / "two", "--dtype", "float32")
    assert document["tensors"] == {"F32": 21} and document["dtype"] == "float32"
    assert json.loads((tmp_path / "two" / "config.json").read_text())["dtype"] == "float32"
    assert "exists" in refused("convert", path, "-o", tmp_path / "two")
    for option in ("--calibrate", "--river-from", "--group-size"):
        assert f"{option} with a GGUF file" in refused("convert", path, "-o", tmp_path / "x", option, "64")
    for option in (["--force"], ["--device", "cpu"]):
        assert f"{option[0]} with a GGUF file" in refused("convert", path, "-o", tmp_path / "x", *option)
    assert "dtype 'int8'" in refused("convert", path, "-o", tmp_path / "x", "--dtype", "int8")
    assert f"river convert {path} --output DIR" in refused("info", path)
    with pytest.raises(RiverError, match="make a checkpoint of it first"):
        river_ext.load(path)
