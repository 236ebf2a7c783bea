"""docs/models.md: its numbers are what `river info` computes, and its commands are ones."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_checkpoint
from public_configs import PUBLIC_CONFIGS

import river_ext
from river_cli.arguments import parse
from river_cli.terminal import size_text
from river_ext.loading.checkpoint import load_checkpoint
from river_ext.loading.families import FAMILIES, MULTIMODAL
from river_ext.loading.sizes import model_bytes, parameters

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text()


def rows(first: str) -> list[list[str]]:
    """The table whose heading begins so, cell by cell."""
    (table,) = re.findall(rf"^\| {re.escape(first)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_sizes_of_the_papers_models(river_json, tmp_path):
    computed = []
    for name, values in PUBLIC_CONFIGS.items():
        (tmp_path / "config.json").write_text(json.dumps(values))
        model = river_json("info", tmp_path)["model"]
        assert model == river_json("info", "--model", tmp_path / "config.json")["model"]
        assert model["fingerprint"] is None and not model["tokenizer"]
        sizes = [model["bytes"][part] for part in ("backbone", "embedding_and_head", "river", "river_head")]
        layers, millions = model["config"]["num_hidden_layers"], model["parameters"] / 1e9
        cache = 1000 * model["kv_bytes_per_token"]
        computed.append([name, str(layers), f"{millions:.3g} B", *map(size_text, [*sizes, cache])])
    assert rows("model") == computed


def test_every_family_is_there():
    named = [name for cells in rows("`model_type`") for name in re.findall(r"`(\w+)`", cells[0])]
    assert sorted(named) == sorted([*FAMILIES, *MULTIMODAL])


def test_the_commands_are_ones():
    (block,) = re.findall(r"^```\n(.*?)^```$", PAGE, re.M | re.S)
    commands = [shlex.split(line) for line in block.splitlines() if line.startswith("river ")]
    assert len(commands) == 2 * len(PUBLIC_CONFIGS)
    for _, *arguments in commands:
        parse(arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "model_type": "phi3"},
        {"model_type": "qwen3", "head_dim": 16, "intermediate_size": 100, "torch_dtype": "bfloat16"},
        {"attention_bias": True, "vocab_size": 90},
    ],
    ids=str,
)
def test_computed_sizes_are_those_of_the_tensors(tmp_path, changes):
    checkpoint = load_checkpoint(write_tiny_checkpoint(tmp_path / "model", **changes))
    config, weights = checkpoint.config, checkpoint.weights
    layers = [t for block in weights.layers for t in vars(block).values() if t is not None]
    around = {t.data_ptr(): t for t in (weights.embed_tokens, weights.norm, weights.lm_head)}.values()
    sizes = model_bytes(config)
    assert sizes["backbone"] == sum(t.nbytes for t in layers)
    assert sizes["embedding_and_head"] == sum(t.nbytes for t in around)
    assert parameters(config) == sum(t.numel() for t in [*layers, *around])


def test_no_weights_and_no_dtype(river, refused, tmp_path):
    values = dict(PUBLIC_CONFIGS["Llama 3.2 1B"], torch_dtype=None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    out = river("info", tmp_path)[1]
    assert "fingerprint      none: the weights are not there" in out and "bfloat16: backbone 1.95 GB" in out
    assert "parameters       1,235,814,400" in out and "32.8 KB a token, 32.8 MB for 1,000" in out
    assert "--river belongs to the weights" in refused("info", tmp_path, "--river", tmp_path)
    assert "no such directory" in refused("info", tmp_path / "other.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "is a pickle" in refused("info", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "model_type is missing" in refused("info", tmp_path / "config.json")


def test_layers_of_their_own_are_said(river, tmp_path):
    write_tiny_checkpoint(
        tmp_path, model_type="smollm3", use_sliding_window=True, sliding_window=8, no_rope_layers=[0, 1, 0]
    )
    out = river("info", tmp_path)[1]
    assert ", a window of 8 in 2 of 3 layers, no rope in 2 of 3 layers\n" in out


def test_fused_projections_are_views_of_one_tensor(tmp_path):
    checkpoint = load_checkpoint(write_tiny_checkpoint(tmp_path, model_type="phi3"))
    block = checkpoint.weights.layers[1]
    for parts in ((block.q_proj, block.k_proj, block.v_proj), (block.gate_proj, block.up_proj)):
        assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
        assert torch.cat(parts).shape[0] == sum(len(part) for part in parts)
        assert all(part.is_contiguous() for part in parts)


def test_fused_projections_are_offloaded(tmp_path):
    directory = write_tiny_checkpoint(tmp_path, model_type="phi3")
    options = {"max_new_tokens": 8, "mode": "full", "stop_tokens": ()}
    expected = river_ext.load(directory, device="cpu").generate([5, 6, 7], **options).tokens
    model = river_ext.load(directory, device="cpu", resident_layers=1)
    assert model.generate([5, 6, 7], **options).tokens == expected
