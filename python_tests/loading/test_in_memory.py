"""Models of transformers in memory: `load` makes of them what it makes of files, without a copy."""

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from conftest import random_hf_model
from test_hf_parity import CASES, SMALL, write_multimodal

import river_ext
from river_ext import RiverError, huggingface
from river_ext.huggingface import river_of
from river_ext.model import KEPT

transformers = pytest.importorskip("transformers")

FAMILIES = [
    "attention_bias", "mistral, window", "qwen2", "qwen3", "phi3, window", "longrope, on the way",
    "ministral, some windows", "ministral3", "smollm3", "granite, tied",
]  # fmt: skip


def in_memory(case: str, **changes):
    model_type, _, own = CASES[case]
    return random_hf_model(model_type, **(own | changes))


def tensors_of(model: river_ext.Model) -> list[torch.Tensor]:
    weights = model.weights
    fields = [tensor for layer in weights.layers for tensor in vars(layer).values()]
    return [t for t in (weights.embed_tokens, weights.norm, weights.lm_head, *fields) if t is not None]


def storages(tensors) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("case", FAMILIES)
def test_a_model_is_what_its_directory_is_and_shares_its_weights(case, tmp_path):
    module = in_memory(case)
    module.save_pretrained(tmp_path)
    model, stored = river_ext.load(module), river_ext.load(tmp_path, device="cpu")
    assert storages(tensors_of(model)) == storages(module.parameters())
    assert (model.config, model.fingerprint) == (stored.config, stored.fingerprint)
    assert all(map(torch.equal, tensors_of(model), tensors_of(stored)))
    stored.save_river(tmp_path / "river")
    river = river_ext.load(module, river=tmp_path / "river").river
    assert torch.equal(river[0].qkv_proj, model.river[0].qkv_proj)


@pytest.mark.parametrize("tied", [True, False])
def test_the_text_model_of_a_multimodal_one(tied, tmp_path):
    write_multimodal(tmp_path, tied)
    module = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    model, stored = river_ext.load(module), river_ext.load(tmp_path, device="cpu")
    assert storages(tensors_of(model)) < storages(module.parameters())
    assert (model.config, model.fingerprint) == (stored.config, stored.fingerprint)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("case", ["gqa 4/2", "phi3"])
def test_the_process_grows_by_the_river_alone(case):
    """Each layer is a small part of it, and so is what quantising one takes for a while."""
    module = in_memory(case, hidden_size=512, intermediate_size=1024, num_hidden_layers=6, pad_token_id=0)
    size = sum(p.nbytes for p in module.parameters())
    river_ext.load(in_memory(case, pad_token_id=0))  # what the first river of a process takes
    before = resident_bytes()
    model = river_ext.load(module)
    river = sum(t.nbytes for layer in model.river for t in vars(layer).values())
    gc.collect()
    grown = resident_bytes() - before
    print(f"{case}: {size >> 20} MB of weights, {river >> 20} MB of river, grown by {grown >> 20} MB")
    assert size > 50 << 20 and grown < river + size / 3


def test_it_generates_and_is_kept_as_long_as_the_model():
    module = in_memory("gqa 4/2")
    model = river_ext.load(module)
    assert "Model(llama, 3 layers" in repr(model) and model.text is None
    prompt = {"input_ids": torch.tensor([[5, 9, 3]]), "attention_mask": torch.ones(1, 3)}
    out = model.generate(prompt, max_new_tokens=12, mode="lossless", stop_tokens=())
    expected = module.generate(
        torch.tensor([[5, 9, 3]]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert out.tokens == expected[0, 3:].tolist()
    assert river_of(module) is model
    river, kept = weakref.ref(model), len(KEPT)
    del model
    gc.collect()
    assert river() is not None
    del module
    gc.collect()
    assert river() is None and len(KEPT) == kept - 1


def test_a_river_is_of_the_present_weights(tmp_path):
    module = in_memory("gqa 4/2")
    first = river_of(module)
    assert river_of(module) is first
    with torch.no_grad():
        module.lm_head.weight.mul_(2)
    second = river_of(module)
    assert second is not first and not torch.equal(second.river.lm_head, first.river.lm_head)
    assert storages(tensors_of(second)) == storages(module.parameters())
    module.load_state_dict(in_memory("gqa 4/2", seed=1).state_dict())
    assert river_of(module) is not second
    module.to(torch.bfloat16)
    assert river_of(module).config.dtype == torch.bfloat16
    with torch.inference_mode():
        river_of(in_memory("gqa 4/2"))  # whose weights count no changes


def by_a_fused_optimiser(module):
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True).step()


def by_its_data(module):
    module.lm_head.weight.data.mul_(2)


def in_inference_mode(module):
    with torch.inference_mode():
        module.lm_head.weight.mul_(2)


@pytest.mark.parametrize("change", [by_a_fused_optimiser, by_its_data, in_inference_mode])
def test_changes_that_torch_does_not_count(change):
    with torch.inference_mode(change is in_inference_mode):
        module = in_memory("gqa 4/2")
    versions = [0 if p.is_inference() else p._version for p in module.parameters()]
    first = river_of(module)
    change(module)
    assert [0 if p.is_inference() else p._version for p in module.parameters()] == versions
    assert river_of(module) is not first


def test_a_river_goes_before_the_next_one_is_made(monkeypatch):
    module, load = in_memory("gqa 4/2"), huggingface.load
    first = weakref.ref(river_of(module))

    def next_one(*args, **kwargs):
        assert first() is None
        return load(*args, **kwargs)

    monkeypatch.setattr(huggingface, "load", next_one)
    with torch.no_grad():
        module.lm_head.weight.mul_(2)
    assert river_of(module) is river_of(module)


def test_options_of_load_hold_for_the_next_river(tmp_path):
    module = in_memory("gqa 4/2")
    river_ext.load(module).save_river(tmp_path / "river")
    chosen = river_ext.load(module, river=tmp_path / "river")
    assert river_of(module) is chosen
    with torch.no_grad():
        module.model.norm.weight.mul_(2)
    for _ in range(2):
        with pytest.raises(RiverError, match="built from another checkpoint"):
            river_of(module)


def mixed(module):
    module.model.layers[1].mlp.up_proj.to(torch.bfloat16)


def other_layout(module):
    module.lm_head.weight.data = module.lm_head.weight.data.T.contiguous().T


def not_finite(module):
    module.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan


class Packed(torch.Tensor):
    """As of a quantised weight."""


def packed(module):
    module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach().as_subclass(Packed))


@pytest.mark.parametrize(
    "change, options, complaint",
    [
        (packed, {}, "lm_head.weight is a Packed; accepted: plain tensors"),
        (mixed, {}, "up_proj.weight is torch.bfloat16, and would be copied; accepted: torch.float32"),
        (other_layout, {}, "lm_head.weight is not contiguous, and would be copied"),
        (not_finite, {}, "layers.1.mlp.up_proj.weight holds NaN"),
        (None, {"dtype": "bfloat16"}, "embed_tokens.weight is torch.float32, and would be copied"),
        (None, {"resident_layers": 2}, "resident_layers=2 for a model in memory; accepted: None"),
        (lambda module: module.to("meta"), {}, "device 'meta' cannot be used"),
        (lambda module: module.to(torch.float64), {}, "is stored as torch.float64; accepted: BF16, F16, F32"),
        (lambda module: delattr(module, "lm_head"), {}, r"lm_head.weight \[96, 64\] is missing"),
    ],
)  # fmt: skip
def test_refused(change, options, complaint):
    module = in_memory("gqa 4/2")
    if change:
        change(module)
    with pytest.raises(RiverError, match=complaint) as error:
        river_ext.load(module, **options)
    assert "\n" not in str(error.value) and module not in KEPT


def of_another_class():
    """What it computes nobody knows."""
    module = in_memory("gqa 4/2")
    module.__class__ = type("Mine", (type(module),), {})
    return module


@pytest.mark.parametrize(
    "module, complaint",
    [
        (lambda: torch.nn.Linear(2, 2), "Linear in memory: it has no config of transformers"),
        (lambda: in_memory("gqa 4/2").model, "LlamaModel in memory: tensor model.embed_tokens.weight"),
        (of_another_class, r'architectures is \["Mine"\]; accepted: a class of llama models'),
        (lambda: random_hf_model("gpt_neox", **SMALL), "model_type is \"gpt_neox\"; accepted: "),
    ],
)  # fmt: skip
def test_other_modules_are_refused(module, complaint):
    with pytest.raises(RiverError, match=complaint):
        river_ext.load(module())
