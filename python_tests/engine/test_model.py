"""Loading, and saving a river."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import demo_model, random_model

import river_ext
from river_ext.engine.network import Network
from river_ext.errors import RiverError


def test_importing_the_package_is_light():
    code = (
        "import sys, river_ext; assert not {'tokenizers', 'safetensors'} & set(sys.modules); river_ext.load"
    )
    root = Path(river_ext.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = river_ext.nothing


def test_the_bundled_model():
    model = demo_model()
    assert model.config.num_hidden_layers == len(model.river) == len(model.network.layers) >= 16
    assert model.tokenizer is not None
    assert model.network.dtype == torch.bfloat16


def test_repr():
    text = repr(demo_model())
    assert text.startswith("Model(llama, 16 layers, hidden 128, vocabulary 512, bfloat16 on cpu, '")
    assert repr(random_model()) == "Model(llama, 4 layers, hidden 64, vocabulary 80, float32 on cpu)"


def test_dtype():
    model = river_ext.load(device="cpu", dtype="float32")
    assert model.network.dtype == torch.float32
    out = model.generate("Question:", max_new_tokens=4, return_logits=True)
    bf16 = demo_model().generate("Question:", max_new_tokens=4, return_logits=True)
    assert (out.logits[0] - bf16.logits[0]).abs().max() < 0.3


def test_a_saved_river_gives_the_same_tokens(tmp_path):
    demo_model().save_river(tmp_path / "river")
    again = river_ext.load(device="cpu", river=tmp_path / "river")
    for a, b in zip(demo_model().river, again.river, strict=True):
        for name, packed in vars(a).items():
            assert torch.equal(packed, getattr(b, name))
    options = {"max_new_tokens": 8, "mode": "full_w4", "return_logits": True}
    a, b = (model.generate("Question: Tom", **options) for model in (demo_model(), again))
    assert torch.equal(a.logits, b.logits)


def test_cuda_without_kernels_is_refused():
    if torch._C._dispatch_has_kernel_for_dispatch_key("river::decoder_block", "CUDA"):
        pytest.skip("this build has CUDA kernels")
    with pytest.raises(RiverError, match="device.*cuda.*accepted: .*cpu"):
        river_ext.load(device="cuda")
    assert river_ext.load(device="auto").network.device.type == "cpu"


@pytest.mark.parametrize("device", ["tpu", "meta", 7])
def test_other_devices_are_refused(device):
    with pytest.raises(RiverError, match="device"):
        river_ext.load(device=device)


def test_a_river_of_another_depth_is_refused():
    model = random_model()
    with pytest.raises(RiverError, match="3 exit layers"):
        Network(model.config, model.weights, model.river[:3])
