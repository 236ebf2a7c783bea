"""docs/transformers.md: its programs run, one after the other, on the bundled model."""

import re
from pathlib import Path

import pytest

import river_ext
from river_ext.huggingface import WARPERS

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "transformers.md").read_text()


def test_the_programs_run(capsys):
    names, results = {}, []
    for program in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S):
        program = program.replace("path/to/hf-checkpoint", str(ROOT / "river_ext" / "demo"))
        exec(compile(program, "docs/transformers.md", "exec"), names)
        results.append(names["out"][0].tolist())
    hf_model, tokenizer, inputs = (names[name] for name in ("hf_model", "tokenizer", "inputs"))
    plain = hf_model.generate(**inputs, max_new_tokens=40)[0]
    lossless, river, again, _, stopped, sampled = results
    assert lossless == plain.tolist() and again == river
    text, depths = capsys.readouterr().out.rsplit("[", 1)
    assert text.strip() == tokenizer.decode(plain) and set(depths.strip(" ]\n").split(", ")) == {"16"}
    assert tokenizer.decode(stopped).endswith("####") and sampled != lossless
    model = river_ext.huggingface.river_of(hf_model)
    out = model.generate(inputs, max_new_tokens=40, mode="river", threshold=0.9)
    assert river[-len(out.tokens) :] == out.tokens and min(out.exit_depths) < 16


def test_what_it_says_of_options():
    ours = {"mode", "threshold", "min_layers", "prefill", "draft_tokens", "river_head", "kv_strategy"}
    options = PAGE[PAGE.index("## Options") : PAGE.index("## What works")]
    assert (ours | {"batch_policy", "exit_control", "seed"}) <= set(re.findall(r"`(\w+)`", options))
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| `do_sample`")]
    assert re.findall(r"`(\w+)`", row.split("|")[1])[1:] == list(WARPERS.values())
