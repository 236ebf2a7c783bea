"""Checkpoint directories: what is read, what stays mapped, and one line for whatever does not fit."""

import dataclasses
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from river_ext.errors import RiverError
from river_ext.loading.checkpoint import load_checkpoint, tensor_shapes
from river_ext.loading.config import read_config


def tensors_of(weights) -> dict[str, torch.Tensor]:
    named = {"embed_tokens": weights.embed_tokens, "norm": weights.norm, "lm_head": weights.lm_head}
    for index, layer in enumerate(weights.layers):
        named |= {f"{index}.{name}": tensor for name, tensor in vars(layer).items() if tensor is not None}
    return named


def edit_tensors(directory, edit) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors"
    )


def shard(directory, shards: int = 3) -> None:
    """Deals the tensors of model.safetensors out to shards with an index, in an order of no meaning."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % shards:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
    write_index(directory, weight_map)


def write_index(directory, weight_map) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def read_index(directory) -> dict[str, str]:
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]


def refusal(directory, *words: str, **options) -> None:
    with pytest.raises(RiverError) as caught:
        load_checkpoint(directory, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_weights_are_those_of_the_file(tiny_checkpoint):
    directory = tiny_checkpoint(attention_bias=True)
    checkpoint = load_checkpoint(directory)
    stored = load_file(directory / "model.safetensors")
    layer = checkpoint.weights.layers[1]
    for field, name in {
        "input_layernorm": "input_layernorm.weight",
        "q_proj": "self_attn.q_proj.weight",
        "k_proj": "self_attn.k_proj.weight",
        "v_proj": "self_attn.v_proj.weight",
        "o_proj": "self_attn.o_proj.weight",
        "q_bias": "self_attn.q_proj.bias",
        "k_bias": "self_attn.k_proj.bias",
        "v_bias": "self_attn.v_proj.bias",
        "o_bias": "self_attn.o_proj.bias",
        "post_attention_layernorm": "post_attention_layernorm.weight",
        "gate_proj": "mlp.gate_proj.weight",
        "up_proj": "mlp.up_proj.weight",
        "down_proj": "mlp.down_proj.weight",
    }.items():
        assert torch.equal(getattr(layer, field), stored.pop(f"model.layers.1.{name}")), field
    assert layer.q_norm is None and layer.k_norm is None
    assert torch.equal(checkpoint.weights.embed_tokens, stored["model.embed_tokens.weight"])
    assert torch.equal(checkpoint.weights.norm, stored["model.norm.weight"])
    assert torch.equal(checkpoint.weights.lm_head, stored["lm_head.weight"])
    assert checkpoint.directory == directory and checkpoint.config == read_config(directory)
    assert len(checkpoint.weights.layers) == 3


@pytest.mark.parametrize(
    "changes, present",
    [
        ({}, set()),
        ({"attention_bias": True}, {"q_bias", "k_bias", "v_bias", "o_bias"}),
        ({"model_type": "qwen2"}, {"q_bias", "k_bias", "v_bias"}),
        ({"model_type": "qwen3"}, {"q_norm", "k_norm"}),
        ({"model_type": "mistral", "sliding_window": 8}, set()),
    ],
)
def test_optional_tensors_of_a_family(tiny_checkpoint, changes, present):
    layer = load_checkpoint(tiny_checkpoint(**changes)).weights.layers[0]
    optional = {field.name for field in dataclasses.fields(layer) if field.default is None}
    assert {name for name in optional if getattr(layer, name) is not None} == present


def test_shards_equal_the_single_file(tiny_checkpoint):
    directory = tiny_checkpoint()
    single = load_checkpoint(directory)
    shard(directory)
    sharded = load_checkpoint(directory)
    expected, found = tensors_of(single.weights), tensors_of(sharded.weights)
    assert expected.keys() == found.keys() and all(
        torch.equal(expected[name], found[name]) for name in expected
    )
    assert sharded.fingerprint == single.fingerprint


def test_tied_head_is_the_embedding(tiny_checkpoint):
    directory = tiny_checkpoint(tie_word_embeddings=True)
    checkpoint = load_checkpoint(directory)
    assert checkpoint.weights.lm_head is checkpoint.weights.embed_tokens
    assert "lm_head.weight" not in tensor_shapes(checkpoint.config)
    # some tied checkpoints store the head as well, and old ones the rotary frequencies
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0}))
    edit_tensors(
        directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    again = load_checkpoint(directory)
    assert again.weights.lm_head is again.weights.embed_tokens
    assert again.fingerprint == checkpoint.fingerprint


def test_a_head_that_differs_from_the_embedding_is_used(tiny_checkpoint):
    """tie_word_embeddings or not: it has been tuned, or an adapter was merged into it."""
    directory = tiny_checkpoint(tie_word_embeddings=True)
    tied = load_checkpoint(directory)
    head = tied.weights.embed_tokens.flip(0).contiguous()
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": head}))
    own = load_checkpoint(directory)
    assert torch.equal(own.weights.lm_head, head) and own.weights.lm_head is not own.weights.embed_tokens
    assert not own.config.tie_word_embeddings and own.fingerprint != tied.fingerprint
    again = load_checkpoint(tiny_checkpoint("untied"))
    assert "lm_head.weight" in tensor_shapes(again.config)
    for bad in (head[1:], head.double()):
        edit_tensors(directory, lambda t, bad=bad: t.update({"lm_head.weight": bad.contiguous()}))
        refusal(directory, "lm_head.weight")


def test_dtypes(tiny_checkpoint):
    directory = tiny_checkpoint(torch_dtype="bfloat16")
    stored = load_checkpoint(directory)
    assert {t.dtype for t in tensors_of(stored.weights).values()} == {torch.bfloat16}
    for dtype in ("float32", torch.float16, "torch.bfloat16"):
        checkpoint = load_checkpoint(directory, dtype=dtype)
        wanted = getattr(torch, str(dtype).removeprefix("torch."))
        assert checkpoint.config.dtype == wanted
        assert {t.dtype for t in tensors_of(checkpoint.weights).values()} == {wanted}
        assert checkpoint.fingerprint == stored.fingerprint
    for dtype in ("float64", "int4", torch.int8, 3, None):
        refusal(directory, "bfloat16, float16, float32", dtype=dtype)


def test_dtype_auto(tiny_checkpoint):
    """config.json's dtype, or else the stored one, for every tensor."""
    directory = tiny_checkpoint(torch_dtype="bfloat16")
    edit_tensors(directory, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}))
    values = json.loads((directory / "config.json").read_text())
    for dtype, expected in (("float16", torch.float16), (None, torch.bfloat16)):
        (directory / "config.json").write_text(json.dumps(values | {"torch_dtype": dtype}))
        checkpoint = load_checkpoint(directory)
        assert checkpoint.config.dtype == expected
        assert {t.dtype for t in tensors_of(checkpoint.weights).values()} == {expected}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "dtype float32 on cuda; accepted there: dtype='bfloat16' or 'float16'"),
        ({"torch_dtype": "bfloat16", "head_dim": 20}, "head_dim 20 on cuda; accepted there: multiples of 8"),
        ({"torch_dtype": "float16", "intermediate_size": 76}, "intermediate_size 76 on cuda"),
    ],
)
def test_what_a_gpu_cannot_run_is_refused_before_it_goes_there(
    tiny_checkpoint, monkeypatch, changes, message
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RiverError, match=message):
        load_checkpoint(tiny_checkpoint(**changes), device="cuda")


def test_device(tiny_checkpoint):
    directory = tiny_checkpoint()
    assert load_checkpoint(directory, device=torch.device("cpu")).weights.norm.device.type == "cpu"
    for device in ("abacus", "meta", "cuda:99", -1, None):
        refusal(directory, "device", str(device), "accepted: cpu", device=device)


MEASURE_MEMORY = """
import sys
import torch
from river_ext.loading.checkpoint import load_checkpoint

def megabytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

load_checkpoint(sys.argv[1])  # what the libraries allocate at their first use
before = megabytes()
checkpoint = load_checkpoint(sys.argv[2], dtype=sys.argv[3])
for layer in checkpoint.weights.layers:
    layer.q_proj.sum(), layer.down_proj.sum()
print(megabytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_weights_stay_in_the_mapped_file(tiny_checkpoint):
    """60 MB of weights add (almost) no memory of the process's own; converted ones add a copy, no more."""
    small = tiny_checkpoint("small", torch_dtype="bfloat16")
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "tie_word_embeddings": True,
    }
    big = tiny_checkpoint("big", torch_dtype="bfloat16", **sizes)
    megabytes = (big / "model.safetensors").stat().st_size / 2**20

    def grown(dtype):
        command = [sys.executable, "-c", MEASURE_MEMORY, str(small), str(big), dtype]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert megabytes > 50
    assert grown("bfloat16") < 10
    assert megabytes < grown("float32") < 2 * megabytes + 10


@pytest.mark.parametrize("padding", range(1, 5))
def test_misaligned_files(tiny_checkpoint, padding):
    """A header may have any length; weights are aligned to their elements all the same."""
    directory, expected = tiny_checkpoint("moved"), load_checkpoint(tiny_checkpoint())
    data = (directory / "model.safetensors").read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")] + b" " * padding
    moved = len(header).to_bytes(8, "little") + header + data[8 + len(header) - padding :]
    (directory / "model.safetensors").write_bytes(moved)
    checkpoint = load_checkpoint(directory)
    assert checkpoint.fingerprint == expected.fingerprint
    for name, tensor in tensors_of(checkpoint.weights).items():
        assert tensor.data_ptr() % 4 == 0, name
        assert torch.equal(tensor, tensors_of(expected.weights)[name]), name


def test_writing_to_a_weight_leaves_the_file_alone(tiny_checkpoint):
    directory = tiny_checkpoint()
    before = (directory / "model.safetensors").read_bytes()
    load_checkpoint(directory).weights.norm.zero_()
    assert (directory / "model.safetensors").read_bytes() == before


def test_fingerprint(tiny_checkpoint):
    directory = tiny_checkpoint()
    fingerprint = load_checkpoint(directory).fingerprint
    assert len(fingerprint) == 64 and fingerprint == load_checkpoint(directory).fingerprint
    assert load_checkpoint(tiny_checkpoint("same")).fingerprint == fingerprint
    assert load_checkpoint(tiny_checkpoint("other", seed=1)).fingerprint != fingerprint
    assert load_checkpoint(tiny_checkpoint("other", torch_dtype="bfloat16")).fingerprint != fingerprint


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_fingerprint_sees_start_middle_and_end(tiny_checkpoint, place):
    directory = tiny_checkpoint(intermediate_size=256)  # 64 KB per matrix of the MLP
    fingerprint = load_checkpoint(directory).fingerprint

    def change(tensors):
        flat = tensors["model.layers.2.mlp.up_proj.weight"].view(-1)
        flat[{"start": 0, "middle": flat.numel() // 2, "end": -1}[place]] += 1

    edit_tensors(directory, change)
    assert load_checkpoint(directory).fingerprint != fingerprint


def test_tokenizer(tiny_checkpoint):
    directory = tiny_checkpoint()
    assert load_checkpoint(directory).tokenizer is None
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(directory / "tokenizer.json"))
    assert load_checkpoint(directory).tokenizer.encode("b").ids == [1]
    for text in ("{", "{}", "[]", ""):
        (directory / "tokenizer.json").write_text(text)
        refusal(directory, "tokenizer.json: not a tokenizer")


# Bad checkpoints


def test_no_weights(tiny_checkpoint):
    directory = tiny_checkpoint()
    file = directory / "model.safetensors"
    file.rename(directory / "consolidated.safetensors")
    refusal(directory, "model.safetensors: missing", "consolidated.safetensors is not read")
    (directory / "consolidated.safetensors").unlink()
    refusal(directory, "model.safetensors: missing", "model.safetensors.index.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt"])
def test_pickles_are_not_read(tiny_checkpoint, name):
    directory = tiny_checkpoint()
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
    refusal(directory, name, "pickle", "convert it to safetensors")


@pytest.mark.parametrize("size", [0, 5, 8, 100, 2000, -1, -5000])
def test_truncated(tiny_checkpoint, size):
    directory = tiny_checkpoint()
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:size])
    refusal(directory, "model.safetensors: not a complete safetensors file")


def test_a_pickle_named_safetensors(tiny_checkpoint):
    directory = tiny_checkpoint()
    torch.save({"x": torch.ones(1)}, directory / "model.safetensors")
    refusal(directory, "model.safetensors: not a complete safetensors file")


def test_tensors_that_do_not_fit_the_config(tiny_checkpoint):
    name = "model.layers.1.mlp.up_proj.weight"
    cases = [
        (lambda t: t.pop(name), (name, "missing", "[112, 64]")),
        (lambda t: t.update({name: t[name].T}), (name, "[64, 112]", "[112, 64]")),
        (lambda t: t.update({name: t[name].double()}), (name, "F64", "BF16, F16, F32")),
        (lambda t: t.update({name: t[name].to(torch.int8)}), (name, "I8")),
        (lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}), (name, "F8_E4M3")),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t[name] + 0}),
            ("layers.3.mlp", "no place"),
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
            ("q_proj.bias", "no place"),
        ),
        (lambda t: t.update({"a\nb\x1b[31m": torch.ones(64)}), ("a b?[31m", "no place")),
        (lambda t: t.pop("lm_head.weight"), ("lm_head.weight", "missing")),
    ]
    surplus = {
        "norms of Qwen3": "model.layers.1.self_attn.q_norm.weight",
        "norms of Gemma": "model.layers.1.pre_feedforward_layernorm.weight",
        "a bias of the MLP": "model.layers.1.mlp.down_proj.bias",
        "a bias of the head": "lm_head.bias",
        "an expert": "model.layers.1.mlp.experts.0.up_proj.weight",
        "scales of int8": "model.layers.1.mlp.down_proj.weight_scale",
        "an adapter": "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight",
        "no rotary frequencies": "model.layers.1.self_attn.inv_freq.weight",
    }
    for extra in surplus.values():
        cases.append((lambda t, extra=extra: t.update({extra: torch.ones(64)}), (extra, "no place")))
    more = [f"model.layers.{index}.mlp.up_proj.weight" for index in (3, 4, 5)]
    cases += [
        (lambda t: t.update({other: torch.ones(1) for other in more}),
         (more[0], "and 2 more", more[2], "no place")),
        (lambda t: [t.pop(f"model.layers.{index}.mlp.up_proj.weight") for index in (1, 2)],
         (name, "missing", "and 1 more", "layers.2")),
    ]  # fmt: skip
    for number, (edit, words) in enumerate(cases):
        directory = tiny_checkpoint(str(number))
        edit_tensors(directory, edit)
        refusal(directory, str(directory / "model.safetensors"), *words)


def test_tensors_that_a_model_computes_itself_are_ignored(tiny_checkpoint):
    directory = tiny_checkpoint()
    fingerprint = load_checkpoint(directory).fingerprint
    names = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "attn.masked_bias")
    edit_tensors(
        directory, lambda t: t.update({f"model.layers.0.self_attn.{name}": torch.ones(8) for name in names})
    )
    edit_tensors(directory, lambda t: t.update({"model.rotary_emb.inv_freq": torch.ones(8)}))
    assert load_checkpoint(directory).fingerprint == fingerprint


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
)
@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a directory", "a link to nothing", "a device"])
def test_only_regular_files_are_opened(tiny_checkpoint, monkeypatch, name, kind):
    """Anything else may wait for ever."""
    path = tiny_checkpoint() / name
    path.unlink(missing_ok=True)
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        monkeypatch.chdir(path.parent)  # the path may be too long for a socket
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    elif kind == "a directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "a device" else "nowhere")
    refusal(path.parent, str(path), kind, "accepted: a regular file")


def test_links_to_regular_files_are_followed(tiny_checkpoint):
    directory = tiny_checkpoint()
    for name in ("config.json", "model.safetensors"):
        (directory / name).rename(directory / f"blob of {name}")
        (directory / name).symlink_to(f"blob of {name}")
    assert load_checkpoint(directory).fingerprint == load_checkpoint(tiny_checkpoint("plain")).fingerprint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_that_are_not_finite(tiny_checkpoint, dtype, value):
    name = "model.layers.2.self_attn.k_proj.weight"
    directory = tiny_checkpoint(torch_dtype=dtype)
    edit_tensors(directory, lambda t: t[name].view(-1)[777:778].fill_(value))
    refusal(directory, "model.safetensors", name, "NaN or Inf")
    assert not load_checkpoint(directory, check_finite=False).weights.layers[2].k_proj.isfinite().all()


def test_weights_beyond_the_wanted_dtype(tiny_checkpoint):
    directory = tiny_checkpoint()
    edit_tensors(directory, lambda t: t["model.norm.weight"][3:4].fill_(1e6))
    refusal(directory, "model.norm.weight", "NaN or Inf", "float16", dtype="float16")
    load_checkpoint(directory)


def test_index_that_does_not_fit_the_shards(tiny_checkpoint):
    directory = tiny_checkpoint()
    shard(directory)
    good = read_index(directory)
    norm, other = "model.norm.weight", next(f for f in good.values() if f != good["model.norm.weight"])

    write_index(directory, good | {norm: other})
    refusal(directory, other, norm, "missing")
    write_index(directory, good | {"model.extra": other})
    refusal(directory, other, "model.extra", "missing")
    write_index(directory, good | {norm: "model-9.safetensors"})
    refusal(directory, "model-9.safetensors: missing")
    for weight_map in (None, {}, [], "x"):
        write_index(directory, weight_map)
        refusal(directory, "model.safetensors.index.json", "weight_map")
    (directory / "model.safetensors.index.json").write_text("[]")
    refusal(directory, "model.safetensors.index.json", "object")

    write_index(directory, good)
    save_file(load_file(directory / good[norm]) | {"model.norm.weight": torch.ones(64)}, directory / other)
    refusal(directory, "also in")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors", "/outside.safetensors", "sub/../../outside.safetensors", "..", ".", "",
        "sub/model.safetensors", "..\\outside.safetensors", "a\0.safetensors", 7, None, ["x"], "model.bin",
    ],
)  # fmt: skip
def test_shard_names_stay_in_the_directory(tiny_checkpoint, name):
    directory = tiny_checkpoint()
    shard(directory)
    save_file({"model.norm.weight": torch.ones(64)}, directory.parent / "outside.safetensors")
    write_index(directory, read_index(directory) | {"model.norm.weight": name})
    refusal(directory, "model.safetensors.index.json", "model.norm.weight", "*.safetensors")


def test_truncated_shard(tiny_checkpoint):
    directory = tiny_checkpoint()
    shard(directory)
    path = directory / "model-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refusal(directory, str(path), "not a complete safetensors file")
