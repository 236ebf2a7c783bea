"""The tables of memory: the document has those of the script, and they are the sizes of real tensors."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_tiny_checkpoint

import river_ext
from bench import memory
from river_ext.engine.cache import KVCache
from river_ext.loading.config import read_config

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "offloading.md").read_text()
RESULTS = json.loads((ROOT / "bench" / "results" / "memory_smollm2_cpu_amd_epyc_1t.json").read_text())


def test_the_document_has_the_tables_of_the_script():
    tables = [memory.table(config, memory.RESIDENT) for config in memory.SHAPES.values()]
    counted = memory.text_of(memory.as_the_paper_counts(memory.SHAPES["Llama-3.1-8B"]))
    for text in [*tables, counted]:
        assert f"\n```\n{text}\n```\n" in DOCUMENT


def test_the_document_has_what_was_measured():
    rows = [
        f"| {line['stage']} | {line['anonymous']:.0f} | {line['file']:.0f} |" for line in RESULTS["memory"]
    ]
    measured = re.findall(r"^\| (?:loaded|tokens|a prompt).*\|$", DOCUMENT, re.M)
    columns = [re.split(r" *\| *", row.strip("| ")) for row in measured]
    whole, offloaded = rows[:3], rows[3:]
    assert whole == [f"| {stage} | {a} | {f} |" for stage, a, f, _, _ in columns]
    assert offloaded == [f"| {stage} | {a} | {f} |" for stage, _, _, a, f in columns]


def test_it_is_the_arithmetic_of_the_paper():
    """To the last digit of its table."""
    counted = memory.as_the_paper_counts(memory.SHAPES["Llama-3.1-8B"])
    assert {
        name: [round(size / 2**30, 2) for size in sizes] for name, sizes in counted.items()
    } == memory.PAPER


def size(tensors) -> int:
    """Bytes of tensors, each storage once."""
    return sum({t.data_ptr(): t.nbytes for t in tensors if isinstance(t, torch.Tensor)}.values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("changes", [{}, {"model_type": "qwen2"}, {"model_type": "qwen3", "head_dim": 32}])
def test_the_bytes_are_those_of_tensors(tmp_path, changes, tied):
    """Of a model in memory, biases, norms and padding included."""
    directory = write_tiny_checkpoint(
        tmp_path, tie_word_embeddings=tied, intermediate_size=100, num_hidden_layers=4, **changes
    )
    model, config = river_ext.load(directory), read_config(directory)
    weights, river = model.weights, model.river
    layers = [vars(layer) for layer in weights.layers]
    around = [weights.embed_tokens, weights.norm]
    small = [value for layer in layers for value in layer.values() if value is not None and value.dim() == 1]
    matrices = [[v for v in layer.values() if v is not None and v.dim() == 2] for layer in layers]
    packed = [*(tensor for layer in river for tensor in vars(layer).values()), river.lm_head]
    backbone = [*around, weights.lm_head, *small, *sum(matrices, [])]
    cache = KVCache(config, 1, memory.CONTEXTS[0], config.dtype)
    expected = {
        "backbone": size(backbone),
        "full W4": size([*around, *small, *packed]),
        "River": size(backbone + packed),
        "River, 1 layers resident": size([*around, weights.lm_head, *small, *packed, *sum(matrices[:3], [])]),
    }
    cached = size([cache.k, cache.v])
    needs = memory.needs(config, 1)
    assert {name: sizes[0] - cached for name, sizes in needs.items()} == expected
    assert all(sizes[1] - sizes[0] == cached for sizes in needs.values())
    assert memory.needs(config, 4)["River, 4 layers resident"] == needs["River"], "nothing to stream"


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--measure"], "a checkpoint's directory"),
        (["--resident-layers", "0"], "resident_layers=0"),
        (["none/there"], "no such directory"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, named):
    monkeypatch.setattr(sys, "argv", ["memory.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        memory.main()
    assert ended.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_a_directory_of_any_model(monkeypatch, capsys, tmp_path):
    write_tiny_checkpoint(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["memory.py", str(tmp_path / "model"), "--resident-layers", "2"])
    memory.main()
    out = capsys.readouterr().out
    assert out.startswith("model, GiB; it has 256 positions\n") and "River, 2 layers resident" in out
