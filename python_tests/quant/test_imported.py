"""Rivers from the 4-bit weights of AWQ, GPTQ and compressed-tensors checkpoints of the same model."""

import hashlib
import json
from dataclasses import fields

import pytest
import torch
from packed_checkpoints import (
    AWQ_ORDER,
    FORMATS,
    PROJECTIONS,
    Rounded,
    projection_names,
    words,
    write_packed,
)
from safetensors.torch import load_file, save_file

import river_ext
from river_ext.errors import RiverError
from river_ext.loading.checkpoint import load_checkpoint
from river_ext.loading.weights import BlockShape
from river_ext.quant.exit_river import build_river, load_river, save_river
from river_ext.quant.imported.build import import_river
from river_ext.quant.quality import dense_projections

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 64}
COUNT = SHAPE["num_hidden_layers"] * len(PROJECTIONS)


@pytest.fixture
def model(tiny_checkpoint):
    return tiny_checkpoint("model", **SHAPE)


@pytest.fixture
def source(tmp_path):
    return tmp_path / "source"


def imported(model, source):
    checkpoint = load_checkpoint(model)
    return import_river(source, checkpoint.config, checkpoint.weights, progress=False)


def dense(river, model):
    shape = BlockShape.of(load_checkpoint(model).config)
    return {
        (layer, name): weight
        for layer, exit_layer in enumerate(river)
        for name, weight in dense_projections(exit_layer, shape).items()
    }


def relative_error(found, expected):
    return float((found - expected).square().sum() / expected.square().sum())


def refusal(model, source):
    with pytest.raises(RiverError) as error:
        imported(model, source)
    assert "\n" not in str(error.value) and str(source) in str(error.value)
    return str(error.value)


# --- the formats ---


def test_words_are_the_documented_ones():
    numbers = torch.arange(8)[None]
    assert words(numbers).item() == 0x76543210
    assert words(numbers, AWQ_ORDER).item() == 0x75316420
    assert words(numbers.flip(1), AWQ_ORDER).item() == 0x02461357


@pytest.mark.parametrize("group_size", [64, 128, -1])
@pytest.mark.parametrize(
    ("format", "symmetric"),
    [*((format, False) for format in FORMATS), ("GPTQ", True), ("compressed-tensors", True)],
)
def test_weights_are_those_of_the_format(model, source, format, group_size, symmetric):
    rounded = write_packed(source, model, format, group_size, symmetric)
    river = imported(model, source)
    found = dense(river, model)
    assert found.keys() == rounded.keys()
    for name, weight in rounded.items():
        assert torch.equal(found[name], weight.dense), name
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    groups = "one group a row" if group_size == -1 else f"groups of {group_size}"
    assert river.quantiser == "imported" and river.group_size == 64
    assert river.imported == {
        "source": f"{format.removesuffix(' v2')}, {groups}",
        "files": {"model.safetensors": digest},
        "kept": COUNT,
        "requantised": 0,
        "from_backbone": 0,
        "relative_squared_error": 0.0,
    }


def test_the_head_is_the_backbones(model, source):
    write_packed(source, model)
    checkpoint = load_checkpoint(model)
    built = build_river(checkpoint.config, checkpoint.weights, progress=False)
    assert torch.equal(imported(model, source).lm_head, built.lm_head)


@pytest.mark.parametrize("format", FORMATS)
def test_groups_of_32_are_quantised_again_and_the_error_is_stated(model, source, format):
    rounded = write_packed(source, model, format, group_size=32)
    river = imported(model, source)
    assert (river.imported["kept"], river.imported["requantised"]) == (0, COUNT)
    found = dense(river, model)
    errors = sum((found[name] - weight.dense).square().sum() for name, weight in rounded.items())
    squares = sum(weight.dense.square().sum() for weight in rounded.values())
    stated = river.imported["relative_squared_error"]
    assert stated == pytest.approx(float(errors / squares), 1e-5)
    assert 0 < stated < 0.02


def test_groups_that_end_inside_of_a_tile_are_quantised_again(tiny_checkpoint, source):
    sizes = {"hidden_size": 192, "intermediate_size": 192, "num_attention_heads": 2}
    model = tiny_checkpoint("model", **SHAPE | sizes)
    write_packed(source, model, "compressed-tensors", group_size=96)
    assert imported(model, source).imported["requantised"] == COUNT


@pytest.mark.parametrize(("keys", "format"), [((), "GPTQ"), (("format",), "GPTQ v2")])
def test_where_gptq_names_its_format(model, source, keys, format):
    """Some write checkpoint_format, some format; without either it is the older one."""

    def rename(tensors, config):
        settings = config["quantization_config"]
        name = settings.pop("checkpoint_format")
        settings |= dict.fromkeys(keys, name)

    rounded = write_packed(source, model, format, edit=rename)
    found = dense(imported(model, source), model)
    assert all(torch.equal(found[name], weight.dense) for name, weight in rounded.items())


def test_shapes_that_fill_no_words(tiny_checkpoint, source):
    """compressed-tensors pads words; intermediate_size 108 fills 13.5 of them."""
    model = tiny_checkpoint("model", **SHAPE | {"hidden_size": 64, "intermediate_size": 108})
    for symmetric in (False, True):
        path = source / str(symmetric)
        rounded = write_packed(path, model, "compressed-tensors", -1, symmetric)
        found = dense(imported(model, path), model)
        for name, weight in rounded.items():
            assert torch.equal(found[name], weight.dense), name


@pytest.mark.parametrize("format", FORMATS)
def test_tensors_that_hold_several_weights(tiny_checkpoint, source, format):
    """In files of Phi-3, q, k and v are one tensor, gate and up another. Here up has given scales to down."""
    model = tiny_checkpoint("model", **SHAPE, model_type="phi3")

    def move(tensors):
        for layer in range(SHAPE["num_hidden_layers"]):
            scales = some_scales(SHAPE["intermediate_size"], layer)
            tensors[f"model.layers.{layer}.mlp.gate_up_proj.weight"][256:] /= scales[:, None]
            tensors[f"model.layers.{layer}.mlp.down_proj.weight"] *= scales

    rounded = write_packed(source, model, format, move=move)
    river = imported(model, source)
    assert (river.imported["kept"], river.imported["requantised"]) == (COUNT - 2, 2)
    found = dense(river, model)
    for layer in range(SHAPE["num_hidden_layers"]):
        qkv = [found[layer, name] for name in ("q_proj", "k_proj", "v_proj")]
        assert torch.equal(torch.cat(qkv), rounded[layer, "qkv_proj"].dense)
        gate, up = rounded[layer, "gate_up_proj"].dense.split(SHAPE["intermediate_size"])
        assert torch.equal(found[layer, "gate_proj"], gate)
        scales = some_scales(SHAPE["intermediate_size"], layer)
        assert relative_error(found[layer, "up_proj"], up * scales[:, None]) < 1e-3


def test_configs_that_leave_out_what_is_usual(tiny_checkpoint, source):
    """As many KV heads as query heads, that is, as in the backbone's own config."""
    model = tiny_checkpoint("model", **SHAPE, num_key_value_heads=None)
    write_packed(source, model, edit=lambda tensors, config: config.update(num_key_value_heads=None))
    assert imported(model, source).imported["kept"] == COUNT
    one_head = tiny_checkpoint("other", **SHAPE, num_key_value_heads=1)
    assert "num_key_value_heads is 4; accepted: 1" in refusal(one_head, source)


def test_the_text_model_of_a_multimodal_source(tiny_checkpoint, source):
    """Ministral 3 as people have it: what is beside the text model is not looked at."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = dict(SHAPE, model_type="ministral3", head_dim=32, rope_theta=None, rope_parameters=rope)
    model = tiny_checkpoint("model", **text)

    def wrap(tensors, config):
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name.replace("model.", "model.language_model.", 1)] = tensors.pop(name)
        tensors["model.vision_tower.patch_conv.weight"] = torch.zeros(4, 4)
        settings, text = config.pop("quantization_config"), dict(config)
        config.clear()
        config.update(model_type="mistral3", text_config=text, quantization_config=settings)

    rounded = write_packed(source, model, edit=wrap)
    found = dense(imported(model, source), model)
    assert all(torch.equal(found[name], weight.dense) for name, weight in rounded.items())
    other = tiny_checkpoint("other", **text | {"intermediate_size": 128})
    assert "text_config.intermediate_size is 256; accepted: 128" in refusal(other, source)


def test_rounding_of_scales_is_stated(model, source):
    """fp16 holds a bf16 scale exactly, unless it is below the normal range; fp32 ones it rounds."""
    write_packed(source / "bf16", model, "compressed-tensors", scale_dtype=torch.bfloat16)
    assert imported(model, source / "bf16").imported["relative_squared_error"] == 0
    rounded = write_packed(source / "fp32", model, "compressed-tensors", scale_dtype=torch.float32)
    river = imported(model, source / "fp32")
    assert river.imported["kept"] == COUNT
    assert 0 < river.imported["relative_squared_error"] < 2.0**-22
    for name, weight in dense(river, model).items():
        assert relative_error(weight, rounded[name].dense) < 2.0**-22


def test_sharded_sources(model, source):
    rounded = write_packed(source, model)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number in (0, 1):
        weight_map |= dict.fromkeys(names[number::2], f"part{number}.safetensors")
        save_file({n: tensors[n] for n in names[number::2]}, source / f"part{number}.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    river = imported(model, source)
    assert sorted(river.imported["files"]) == ["part0.safetensors", "part1.safetensors"]
    assert all(torch.equal(dense(river, model)[name], weight.dense) for name, weight in rounded.items())


# --- scales that were moved ---


def some_scales(size, seed):
    """From 1/4 to 4."""
    return torch.exp2(4 * torch.rand(size, generator=torch.Generator().manual_seed(seed)) - 2)


def move_into_norms(tensors):
    for layer in range(SHAPE["num_hidden_layers"]):
        prefix, scales = f"model.layers.{layer}.", some_scales(SHAPE["hidden_size"], layer)
        for norm, names in {
            "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        }.items():
            tensors[f"{prefix}{norm}.weight"] /= scales
            for name in names:
                tensors[f"{prefix}{name}.weight"] *= scales


def move_into_v(tensors):
    """Four query heads on two KV heads of 32: columns of o in the order of the query heads."""
    for layer in range(SHAPE["num_hidden_layers"]):
        prefix, scales = f"model.layers.{layer}.self_attn.", some_scales(64, 10 + layer)
        first, second = scales[:32], scales[32:]
        tensors[prefix + "v_proj.weight"] /= scales[:, None]
        tensors[prefix + "o_proj.weight"] *= torch.cat([first, first, second, second])


def move_into_up(tensors):
    for layer in range(SHAPE["num_hidden_layers"]):
        prefix, scales = f"model.layers.{layer}.mlp.", some_scales(SHAPE["intermediate_size"], 20 + layer)
        tensors[prefix + "up_proj.weight"] /= scales[:, None]
        tensors[prefix + "down_proj.weight"] *= scales


def move_all(tensors):
    for move in (move_into_norms, move_into_v, move_into_up):
        move(tensors)


def factors_of(move):
    """What a move multiplies each projection by, by (layer, projection)."""
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    rows = dict.fromkeys(PROJECTIONS, hidden) | dict.fromkeys(("k_proj", "v_proj"), hidden // 2)
    rows |= dict.fromkeys(("gate_proj", "up_proj"), inner)
    names = list(projection_names(SHAPE["num_hidden_layers"]))
    ones = {
        f"{prefix}weight": torch.ones(rows[name], inner if name == "down_proj" else hidden)
        for _, name, prefix in names
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    layers = range(SHAPE["num_hidden_layers"])
    ones |= {f"model.layers.{i}.{norm}.weight": torch.ones(hidden) for i in layers for norm in norms}
    move(ones)
    return {(layer, name): ones[f"{prefix}weight"] for layer, name, prefix in names}


MOVED = {  # which projections have columns of their own scales afterwards
    move_into_norms: {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
    move_into_v: {"o_proj"},
    move_into_up: {"down_proj"},
    move_all: set(PROJECTIONS),
}


@pytest.mark.parametrize("format", ["AWQ", "compressed-tensors"])
@pytest.mark.parametrize("move", MOVED, ids=lambda move: move.__name__)
def test_moved_scales_are_undone(model, source, format, move):
    rounded = write_packed(source, model, format, move=move)
    river = imported(model, source)
    assert river.imported["requantised"] == SHAPE["num_hidden_layers"] * len(MOVED[move])
    assert river.imported["kept"] == COUNT - river.imported["requantised"]
    assert river.imported["relative_squared_error"] < 0.02
    factors = factors_of(move)
    for (layer, name), weight in dense(river, model).items():
        expected = rounded[layer, name].dense / factors[layer, name]
        if (factors[layer, name] == 1).all():
            assert torch.equal(weight, expected), name
        else:  # factors are measured; columns of other scales are quantised again
            limit = 0.02 if name in MOVED[move] else 1e-3
            assert relative_error(weight, expected) < limit, name
            size = float((weight * expected).sum() / expected.square().sum())
            assert size == pytest.approx(1, abs=0.004), name


def test_what_goes_through_v_and_o_is_exactly_what_was_imported(model, source):
    """The scales between two weights are measured, with some error; it must cancel."""
    rounded = write_packed(source, model, "AWQ", move=move_into_v)
    found = dense(imported(model, source), model)
    heads = torch.tensor([0, 0, 1, 1])[:, None] * 32 + torch.arange(32)
    for layer in range(SHAPE["num_hidden_layers"]):
        together = rounded[layer, "o_proj"].dense @ rounded[layer, "v_proj"].dense[heads.flatten()]
        product = found[layer, "o_proj"] @ found[layer, "v_proj"][heads.flatten()]
        assert relative_error(product, together) < 0.015  # of quantising o again


def test_scales_are_undone_where_one_of_the_two_is_not_quantised(model, source):
    leave = [(layer, name) for layer in range(SHAPE["num_hidden_layers"]) for name in ("v_proj", "down_proj")]
    rounded = write_packed(source, model, "AWQ", move=move_all, leave=leave)
    river = imported(model, source)
    assert river.imported["from_backbone"] == len(leave)
    checkpoint = load_checkpoint(model)
    built = dense(build_river(checkpoint.config, checkpoint.weights, progress=False), model)
    factors = factors_of(move_all)
    for name, weight in dense(river, model).items():
        if name in leave:
            assert torch.equal(weight, built[name])
        else:
            assert relative_error(weight, rounded[name].dense / factors[name]) < 0.02, name


def test_norms_of_another_dtype_are_the_same_norms(model, source):
    def round_norms(tensors, config):
        for name in tensors:
            if "norm" in name:
                tensors[name] = tensors[name].bfloat16()

    write_packed(source, model, edit=round_norms)
    assert imported(model, source).imported["kept"] == COUNT


# --- layers that are not in the source ---


def test_what_is_not_quantised_comes_from_the_backbone(model, source):
    def drop_a_layer(tensors, config):
        for name in [name for name in tensors if name.startswith("model.layers.1.")]:
            del tensors[name]

    rounded = write_packed(source, model, leave=[(0, "q_proj")], edit=drop_a_layer)
    river = imported(model, source)
    assert (river.imported["kept"], river.imported["from_backbone"]) == (6, 8)
    checkpoint = load_checkpoint(model)
    built = build_river(checkpoint.config, checkpoint.weights, progress=False)
    for field in fields(built[1]):
        assert torch.equal(getattr(river[1], field.name), getattr(built[1], field.name))
    found = dense(river, model)
    assert torch.equal(found[0, "q_proj"], dense(built, model)[0, "q_proj"])
    assert torch.equal(found[0, "k_proj"], rounded[0, "k_proj"].dense)


def test_a_source_without_quantised_weights_is_refused(model, source):
    write_packed(source, model, leave=[(i, name) for i in range(2) for name in PROJECTIONS])
    assert "no projection of a layer is quantised" in refusal(model, source)


# --- of the same model ---


def test_another_model_is_refused(model, tiny_checkpoint, source):
    write_packed(source, tiny_checkpoint("other", seed=1, **SHAPE))
    message = refusal(model, source)
    assert "of another model" in message and "layers.0.q_proj" in message and "up to 0.2" in message


def test_the_same_model_at_another_scale_is_refused(model, source):
    def double(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"] *= 2

    write_packed(source, model, move=double)
    assert "layers.1.down_proj" in refusal(model, source)


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "num_key_value_heads"])
def test_another_shape_is_refused(model, tiny_checkpoint, source, name):
    other = SHAPE | {name: {"num_hidden_layers": 3, "hidden_size": 64, "num_key_value_heads": 4}[name]}
    write_packed(source, tiny_checkpoint("other", **other))
    assert f"{name} is {other[name]}" in refusal(model, source)


# --- what is refused ---

Q = "model.layers.1.self_attn.q_proj."


def without(name):
    return lambda tensors, config: tensors.pop(name)


def of_shape(name, *shape):
    return lambda tensors, config: tensors.update({name: torch.zeros(shape, dtype=tensors[name].dtype)})


def filled(name, value):
    return lambda tensors, config: tensors[name].fill_(value)


def with_order(tensors, config):
    tensors[Q + "g_idx"] = tensors[Q + "g_idx"].flip(0)


def with_compressed_order(tensors, config):
    tensors[Q + "weight_g_idx"] = torch.tensor([1, 0] * 64, dtype=torch.int32)


def config_group(**changes):
    def edit(tensors, config):
        config["quantization_config"]["config_groups"]["group_0"]["weights"] |= changes

    return edit


def two_config_groups(tensors, config):
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = groups["group_0"]


REFUSED = [
    ("AWQ", {"bits": 8}, None, "quantization_config.bits is 8; accepted: 4"),
    ("AWQ", {"bits": "4"}, None, 'bits is "4"'),
    ("AWQ", {"zero_point": False}, None, "zero_point is false; accepted: true"),
    ("AWQ", {"version": "gemv"}, None, 'version is "gemv"; accepted: "gemm"'),
    ("AWQ", {"version": "marlin"}, None, 'version is "marlin"'),
    ("AWQ", {"quant_method": "fp8"}, None, 'quant_method is "fp8"; accepted: awq, gptq, compressed-tensors'),
    ("AWQ", {"quant_method": None}, None, "quant_method is null"),
    ("AWQ", {"group_size": 0}, None, "group_size is 0"),
    ("AWQ", {"group_size": -2}, None, "group_size is -2"),
    ("AWQ", {"group_size": 1 << 60}, None, "group_size is 1152921504606846976"),
    ("AWQ", {"group_size": 48}, None, "groups of 48 columns do not divide the 128"),
    ("AWQ", {"group_size": 128}, None, "qzeros is I32 [2, 16]; accepted: I32 [1, 16]"),
    ("AWQ", {}, without(Q + "qzeros"), f"tensor {Q}qzeros I32 [2, 16] is missing"),
    ("AWQ", {}, without(Q + "qweight"), f"tensor {Q}qweight I32 [128, 16] is missing"),
    ("AWQ", {}, without(Q + "scales"), f"tensor {Q}scales BF16 or F16 or F32 [2, 128] is missing"),
    ("AWQ", {}, without("model.layers.0.input_layernorm.weight"), "input_layernorm.weight [128] is missing"),
    ("AWQ", {}, of_shape(Q + "qweight", 128, 15), "qweight is I32 [128, 15]; accepted: I32 [128, 16]"),
    ("AWQ", {}, of_shape(Q + "qweight", 2048), "qweight is I32 [2048]"),
    ("AWQ", {}, filled(Q + "scales", torch.nan), f"{Q}* has a scale that is not finite"),
    ("AWQ", {}, filled(Q + "scales", 0.0), "of another model"),
    ("GPTQ", {"bits": 3}, None, "bits is 3"),
    ("GPTQ", {"desc_act": True}, None, "desc_act is true; accepted: false"),
    ("GPTQ", {"desc_act": 1}, None, "desc_act is 1"),
    ("GPTQ", {"checkpoint_format": "marlin"}, None, 'checkpoint_format is "marlin"; accepted: gptq, gptq_v2'),
    ("GPTQ", {"format": "gptq_v2"}, None, 'format is "gptq_v2"; accepted: what checkpoint_format is'),
    ("GPTQ", {"format": "bitblas"}, None, 'format is "bitblas"; accepted: gptq, gptq_v2'),
    ("GPTQ", {"group_size": True}, None, "group_size is true"),
    ("GPTQ", {}, with_order, f"{Q}g_idx orders columns by activations"),
    ("GPTQ", {}, of_shape(Q + "g_idx", 64), "g_idx is I32 [64]"),
    ("compressed-tensors", {"format": "float-quantized"}, None, 'format is "float-quantized"'),
    ("compressed-tensors", {"format": "marlin-24"}, None, 'format is "marlin-24"'),
    ("compressed-tensors", {"config_groups": {}}, None, "config_groups is {}"),
    ("compressed-tensors", {"config_groups": {"a": {}}}, None, "config_groups.a.weights is null"),
    ("compressed-tensors", {}, two_config_groups, "config_groups is"),
    ("compressed-tensors", {}, config_group(num_bits=8), "group_0.weights.num_bits is 8"),
    ("compressed-tensors", {}, config_group(type="float"), 'weights.type is "float"'),
    ("compressed-tensors", {}, config_group(actorder="group"), 'actorder is "group"'),
    ("compressed-tensors", {}, config_group(strategy="tensor"), 'strategy is "tensor"'),
    ("compressed-tensors", {}, config_group(group_size=-5), "group_size is -5"),
    ("compressed-tensors", {}, with_compressed_order, f"{Q}weight_g_idx orders columns by activations"),
    ("compressed-tensors", {}, without(Q + "weight_shape"), f"{Q}weight_shape I64 or I32 [2] is missing"),
    ("compressed-tensors", {}, filled(Q + "weight_shape", -1), "weight_shape is [-1, -1]"),
    ("compressed-tensors", {}, without(Q + "weight_zero_point"), "weight_zero_point I32 [16, 2] is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "settings", "edit", "message"), REFUSED)
def test_what_is_refused(model, source, format, settings, edit, message):
    write_packed(source, model, format, edit=edit, settings=settings)
    assert message in refusal(model, source)


def test_scales_above_the_range_of_fp16_are_refused(model, tmp_path, source):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] *= 3e6
    save_file(tensors, model / "model.safetensors")
    write_packed(source, model, "compressed-tensors", scale_dtype=torch.float32)
    assert "layers.1.q_proj needs a scale above 65504" in refusal(model, source)


def test_files_that_are_no_source(model, source):
    assert "no config.json" in refusal(model, source)
    source.mkdir()
    (source / "config.json").write_text("[]")
    assert "a JSON object is needed" in refusal(model, source)
    (source / "config.json").write_text("{}")
    assert "quantization_config is missing; accepted: an object" in refusal(model, source)
    (source / "config.json").unlink()
    source.rmdir()
    write_packed(source, model)
    file = source / "model.safetensors"
    data = file.read_bytes()
    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        assert "not a complete safetensors file" in refusal(model, source)
    file.rename(source / "pytorch_model.bin")
    assert "is a pickle" in refusal(model, source)


# --- in use ---


@pytest.mark.parametrize("format", FORMATS)
def test_generating_with_an_imported_river(model, source, format):
    write_packed(source, model, format)
    prompt, options = [3, 1, 4, 1, 5], {"max_new_tokens": 24, "stop_tokens": ()}
    full = river_ext.load(model, device="cpu").generate(prompt, mode="full", **options)
    loaded = river_ext.load(model, device="cpu", river=source)
    assert loaded.river.imported["kept"] == COUNT
    assert loaded.generate(prompt, mode="full", **options).tokens == full.tokens
    assert loaded.generate(prompt, mode="lossless", **options).tokens == full.tokens
    early = loaded.generate(prompt, threshold=-2, **options)
    assert set(early.exit_depths[1:]) == {1}


def test_a_saved_import_says_where_it_came_from(model, source, tmp_path):
    write_packed(source, model, "GPTQ", group_size=128)
    loaded = river_ext.load(model, device="cpu", river=source)
    loaded.save_river(tmp_path / "river")
    facts = json.loads((tmp_path / "river" / "river.json").read_text())
    assert facts["quantiser"] == "imported" and facts["imported"] == loaded.river.imported
    again = river_ext.load(model, device="cpu", river=tmp_path / "river")
    assert again.river.imported == loaded.river.imported
    for one, other in zip(loaded.river, again.river, strict=True):
        assert all(torch.equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))


def test_what_is_said_of_an_import_is_checked(model, source, tmp_path):
    write_packed(source, model)
    checkpoint, path = load_checkpoint(model), tmp_path / "river"
    save_river(path, imported(model, source), checkpoint.config, checkpoint.fingerprint)
    facts = json.loads((path / "river.json").read_text())

    def refused_with(imported):
        (path / "river.json").write_text(json.dumps(facts | {"imported": imported}))
        with pytest.raises(RiverError) as error:
            load_river(path, checkpoint.config, checkpoint.fingerprint)
        return str(error.value)

    said = facts["imported"]
    for value in (None, {}, [], {"source": "x"}, said | {"more": 1}):
        assert "imported is" in refused_with(value)
    for key, value in {
        "source": 7, "files": {"a": "b"}, "kept": -1, "requantised": 1.5, "from_backbone": True,
        "relative_squared_error": -0.5,
    }.items():  # fmt: skip
        assert f"imported.{key} is {json.dumps(value)}" in refused_with(said | {key: value})
    (path / "river.json").write_text(json.dumps(facts | {"quantiser": "hqq"}))
    with pytest.raises(RiverError, match="imported is .*no such key"):
        load_river(path, checkpoint.config, checkpoint.fingerprint)


def test_rows_without_weights(model, source):
    """A row of zeros has no factor to the backbone's, and a norm of zero no ratio."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"][5] = 0
    tensors["model.layers.0.input_layernorm.weight"][3] = 0
    save_file(tensors, model / "model.safetensors")
    write_packed(source, model, move=move_all)
    found = dense(imported(model, source), model)
    assert all(weight.isfinite().all() for weight in found.values())
    assert (found[0, "v_proj"][5] == 0).all()


def test_rounding_is_what_this_file_takes_it_for():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for symmetric, limit in ((False, 0.015), (True, 0.025)):
        assert relative_error(Rounded(weight, 32, symmetric).dense, weight) < limit


# --- on the command line ---


def test_converting(model, source, tmp_path, river, river_json):
    write_packed(source, model, "AWQ", group_size=32)
    document = river_json("convert", model, "--river-from", source, "-o", tmp_path / "river")
    assert document["quantiser"] == "imported" and document["imported"]["requantised"] == COUNT
    code, out, _ = river("convert", model, "--river-from", source, "-o", tmp_path / "river", "--force")
    assert code == 0 and f"from AWQ, groups of 32: 0 projections as they are, {COUNT} quantised again" in out
    code, out, _ = river("info", model, "--river", tmp_path / "river")
    digest = document["imported"]["files"]["model.safetensors"]
    assert code == 0 and "from AWQ, groups of 32" in out and digest[:16] in out
    facts = river_json("info", model, "--river", tmp_path / "river")
    assert facts["model"]["river"]["imported"] == document["imported"]


def test_options_that_cannot_be_together(model, source, tmp_path, refused):
    common = ("convert", model, "-o", tmp_path / "river", "--river-from", source)
    assert "--group-size with --river-from" in refused(*common, "--group-size", "64")
    assert "--calibrate with --river-from" in refused(*common, "--calibrate", "file")
    assert "no config.json" in refused(*common)
