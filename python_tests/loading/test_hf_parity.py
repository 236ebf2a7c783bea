"""Logits and greedy tokens equal to those of transformers, on random models of every accepted family.

Both the engine and the specification (reference.py) are compared, in fp32, at full depth.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import river_ext
from river_ext import RiverError, reference
from river_ext.loading.checkpoint import load_checkpoint
from river_ext.loading.rope import query_scales, rope_tables, unrotated_tables

transformers = pytest.importorskip("transformers")

NEW_TOKENS = 128
TOLERANCE = 1e-4  # max |difference| / max |logit|

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}

GRANITE = {
    "embedding_multiplier": 12.0, "attention_multiplier": 0.15, "residual_multiplier": 0.7,
    "logits_scaling": 6.0,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
MINISTRAL3 = YARN | {
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 32
}  # fmt: skip
SMALL = {"pad_token_id": 0}  # in the vocabulary
SLIDE, FULL = "sliding_attention", "full_attention"
MINISTRAL = {"sliding_window": 16, "head_dim": 16, "layer_types": [SLIDE, FULL, SLIDE]}


def longrope(original: int, **changes) -> dict:
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0], "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0]}
    parameters = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, **factors}
    return SMALL | {"rope_parameters": parameters, "original_max_position_embeddings": original, **changes}


# name: (model type, prompt length, config changes); all sequences cross position 64
CASES = {
    "gqa 4/2": ("llama", 24, {}),
    "mha": ("llama", 5, {"num_key_value_heads": 4}),
    "mqa": ("llama", 24, {"num_key_value_heads": 1}),
    "3 heads of 64": ("llama", 24, {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1}),
    "one-token prompt": ("llama", 1, {}),
    "explicit head_dim": ("llama", 24, {"head_dim": 32}),
    "attention_bias": ("llama", 24, {"attention_bias": True}),
    "tied": ("llama", 24, {"tie_word_embeddings": True}),
    "odd sizes": ("llama", 24, {"vocab_size": 101, "intermediate_size": 77, "num_hidden_layers": 5}),
    "rope_theta": ("llama", 24, {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama3": ("llama", 24, {"rope_parameters": LLAMA3}),
    "linear": ("llama", 24, {"rope_parameters": LINEAR, "max_position_embeddings": 64}),
    "dynamic": ("llama", 24, {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
    "dynamic, long prompt": ("llama", 90, {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
    "mistral": ("mistral", 24, {"sliding_window": None}),
    "mistral, window": ("mistral", 40, {"sliding_window": 16, "head_dim": 32}),
    "qwen2": ("qwen2", 24, {"tie_word_embeddings": True}),
    "qwen2, window": (
        "qwen2",
        24,
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0},
    ),
    "qwen3": ("qwen3", 24, {"head_dim": 32}),
    "yarn": ("qwen2", 24, {"rope_parameters": YARN}),
    "yarn, long prompt": ("qwen3", 90, {"rope_parameters": YARN | {"attention_factor": 1.3}, "head_dim": 32}),
    "yarn, all its numbers": (
        "llama",
        24,
        {
            "rope_parameters": YARN
            | {
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "mscale": 1.2,
                "mscale_all_dim": 0.7,
                "truncate": False,
            }
        },
    ),
    "phi3": ("phi3", 24, SMALL),
    "phi3, window": ("phi3", 24, SMALL | {"sliding_window": 16, "tie_word_embeddings": True}),
    "longrope, short": ("phi3", 24, longrope(200)),
    "longrope, on the way": ("phi3", 24, longrope(64)),
    "longrope, full prompt": ("phi3", 64, longrope(64)),
    "longrope, long prompt": ("phi3", 65, longrope(64, num_key_value_heads=1)),
    "ministral, some windows": ("ministral", 24, MINISTRAL),
    "mistral, some windows": ("mistral", 24, MINISTRAL),  # which transformers takes for a ministral
    "ministral3": ("ministral3", 24, SMALL | {"rope_parameters": MINISTRAL3, "head_dim": 16}),
    "ministral3, window": (
        "ministral3",
        40,
        SMALL | {"rope_parameters": MINISTRAL3, "head_dim": 32, "sliding_window": 24},
    ),
    "qwen2, some windows": (
        "qwen2",
        24,
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3, some windows": (
        "qwen3",
        24,
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "head_dim": 16,
            "layer_types": [SLIDE, FULL, FULL],
        },
    ),
    "smollm3": ("smollm3", 24, SMALL | {"no_rope_layer_interval": 2}),
    "smollm3, some windows": (
        "smollm3",
        24,
        SMALL | {"no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 16},
    ),
    "qwen3, bias": ("qwen3", 24, {"head_dim": 16, "attention_bias": True}),
    "granite": ("granite", 24, GRANITE),
    "granite, bias": ("granite", 24, GRANITE | {"attention_bias": True}),
    "granite, tied": ("granite", 24, GRANITE | {"tie_word_embeddings": True, "embedding_multiplier": 1.3}),
    "granite, no multipliers": ("granite", 24, {}),
}


def hf_greedy(directory, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy tokens and the logits that chose them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


def engine_greedy(directory, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    model = river_ext.load(directory, device="cpu")
    out = model.generate(
        prompt, max_new_tokens=NEW_TOKENS, threshold=float("inf"), stop_tokens=(), return_logits=True
    )
    assert out.exit_depths == [model.config.num_hidden_layers] * NEW_TOKENS
    return out.tokens, out.logits


def reference_greedy(directory, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """From the functions of reference.py: the prompt's rows together, then one row at a time."""
    checkpoint = load_checkpoint(directory)
    config, weights = checkpoint.config, checkpoint.weights
    total, switch = len(prompt) + NEW_TOKENS, config.rotates_anew_after
    shape = (config.num_hidden_layers, 1, config.num_key_value_heads, total, config.head_dim)
    k_cache, v_cache = torch.zeros(shape), torch.zeros(shape)

    def forward(tokens, first, seq_len=None):
        tables = rope_tables(config, total, seq_len)
        still, scales = unrotated_tables(tables), query_scales(config, total)
        hidden = weights.embed_tokens[torch.tensor(tokens)]
        positions = torch.arange(first, first + len(tokens), dtype=torch.int32)
        slots = torch.zeros_like(positions)
        for layer, block in enumerate(weights.layers):
            cos, sin = still if layer in config.nope_layers else tables
            window = None if layer in config.full_attention_layers else config.sliding_window
            hidden, _ = reference.decoder_block(
                hidden=hidden, **vars(block), k_cache=k_cache[layer], v_cache=v_cache[layer], slots=slots,
                positions=positions, cos=cos, sin=sin, query_scale=scales, sliding_window=window,
                num_attention_heads=config.num_attention_heads, rms_norm_eps=config.rms_norm_eps,
                softmax_scale=config.softmax_scale, residual_multiplier=config.residual_multiplier,
            )  # fmt: skip
        return reference.lm_head(
            hidden[-1:], weights.norm, weights.lm_head, config.rms_norm_eps,
            logits_scaling=config.logits_scaling,
        )  # fmt: skip

    tokens, all_logits = [], []
    while len(tokens) < NEW_TOKENS:
        known = prompt + tokens
        anew = not tokens or len(known) - 1 == switch
        first = 0 if anew else len(known) - 1
        token, logits, _ = forward(known[first:], first, len(known) if anew else None)
        tokens.append(token.item())
        all_logits.append(logits)
    return tokens, torch.cat(all_logits)


@pytest.mark.parametrize("case", CASES)
def test_greedy_generation_equals_transformers(case, hf_checkpoint):
    model_type, prompt_length, changes = CASES[case]
    directory = hf_checkpoint(model_type, **changes)
    prompt = torch.randint(3, 96, (prompt_length,), generator=torch.Generator().manual_seed(1)).tolist()
    expected_tokens, expected_logits = hf_greedy(directory, prompt)
    assert len(set(expected_tokens)) > 20, "the random model repeats itself: the test would show little"
    for greedy in (reference_greedy, engine_greedy):
        tokens, logits = greedy(directory, prompt)
        assert tokens == expected_tokens, greedy.__name__
        error = (logits - expected_logits).abs().max() / expected_logits.abs().max()
        print(f"{case}, {greedy.__name__}: relative error of the logits {error:.1e}")
        assert error < TOLERANCE, greedy.__name__


def write_multimodal(directory, tied: bool) -> dict:
    """A random checkpoint whose text model is a Ministral 3: its tensors."""
    torch.manual_seed(0)
    text = transformers.AutoConfig.for_model(
        "ministral3", vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        rope_parameters=dict(MINISTRAL3), **SMALL,
    )  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 16, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    model = transformers.Mistral3ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                size = 0.2 if "embed_tokens" in name else 1.5 * parameter.shape[1] ** -0.5
                parameter.copy_(size * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
def test_the_text_model_of_a_multimodal_checkpoint_equals_transformers(tied, tmp_path):
    stored = write_multimodal(tmp_path, tied)
    assert any(name.startswith("vision_tower.") for name in stored)
    prompt = list(range(3, 20))
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, use_cache=True
    )[0, len(prompt) :].tolist()
    assert len(set(expected)) > 20, "the random model repeats itself: the test would show little"
    model = river_ext.load(tmp_path, device="cpu")
    assert model.config.model_type == "ministral3" and model.config.tie_word_embeddings == tied
    assert model.generate(prompt, max_new_tokens=NEW_TOKENS, mode="full", stop_tokens=()).tokens == expected
    # the names that transformers has in memory
    renamed = {
        name.replace("language_model.model.", "model.language_model."): t for name, t in stored.items()
    }
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    assert river_ext.load(tmp_path, device="cpu").fingerprint == model.fingerprint
    save_file(renamed | {"extra.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RiverError, match="tensor extra.weight has no place"):
        river_ext.load(tmp_path, device="cpu")
    twice = renamed | {"language_model.model.norm.weight": torch.ones(64)}
    save_file(twice, tmp_path / "model.safetensors")
    with pytest.raises(RiverError, match="is also there as"):
        river_ext.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "case", ["longrope, on the way", "ministral, some windows", "ministral3", "smollm3, some windows"]
)
def test_every_mode_and_a_saved_river(case, hf_checkpoint, tmp_path):
    model_type, _, changes = CASES[case]
    directory = hf_checkpoint(model_type, **changes)
    model, prompt = river_ext.load(directory, device="cpu"), list(range(3, 27))
    options = {"max_new_tokens": 60, "stop_tokens": ()}
    full, w4, lossless = (model.generate(prompt, mode=m, **options) for m in ("full", "full_w4", "lossless"))
    assert lossless.tokens == full.tokens and w4.exit_depths == [0] * 60
    options["threshold"] = sorted(layers[0] for layers in full.similarities)[30]
    mid = model.generate(prompt, **options)
    assert 1 in mid.exit_depths and len(set(mid.exit_depths[1:])) > 1
    model.save_river(tmp_path / "river")
    again = river_ext.load(directory, device="cpu", river=tmp_path / "river").generate(prompt, **options)
    assert (again.tokens, again.exit_depths) == (mid.tokens, mid.exit_depths)


def edit(directory, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def assert_equals_transformers(directory, mode: str = "river") -> None:
    prompt = list(range(3, 20))
    expected = hf_greedy(directory, prompt)[0]
    assert len(set(expected)) > 20, "the random model repeats itself: the test would show little"
    model = river_ext.load(directory, device="cpu")
    options = {"mode": "full"} if mode == "full" else {"threshold": float("inf")}
    assert model.generate(prompt, max_new_tokens=NEW_TOKENS, stop_tokens=(), **options).tokens == expected
    assert len(model.generate(prompt, max_new_tokens=8, mode="full_w4", stop_tokens=()).tokens) == 8


def test_a_stored_head_counts_in_a_tied_model(hf_checkpoint):
    directory = hf_checkpoint(tie_word_embeddings=True)
    head = load_file(directory / "model.safetensors")["model.embed_tokens.weight"].flip(0) * 2
    edit(directory, lambda tensors: tensors.update({"lm_head.weight": head.contiguous()}))
    assert_equals_transformers(directory)


def test_granite_in_every_mode(hf_checkpoint):
    """Through the river's exit layers too: drafts that are right come from the same arithmetic."""
    directory = hf_checkpoint("granite", **GRANITE)
    assert_equals_transformers(directory)
    model, prompt = river_ext.load(directory, device="cpu"), list(range(3, 20))
    for options in ({}, {"temperature": 0.8, "seed": 5}, {"temperature": 1.2, "top_p": 0.9}):
        options |= {"max_new_tokens": 40, "stop_tokens": ()}
        full = model.generate(prompt, mode="full", **options)
        lossless = model.generate(prompt, mode="lossless", draft_tokens=3, **options)
        assert lossless.tokens == full.tokens and any(lossless.drafted)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9, 1e-6])
def test_layers_that_do_almost_nothing(hf_checkpoint, size):
    directory = hf_checkpoint()

    def shrink(tensors):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            tensors[f"model.layers.1.{name}.weight"] *= size

    edit(directory, shrink)
    assert_equals_transformers(directory, mode="full")


@pytest.mark.parametrize("stop", ["<|end|>", "7<|end|>", "<|end|>!"])
def test_a_special_token_as_a_stop_string_equals_transformers(stop, hf_checkpoint):
    """The vocabulary is made so that the model writes 7<|end|>!, the middle one being special."""
    directory = hf_checkpoint("llama", vocab_size=300)
    prompt = [5, 9, 3]
    whole = river_ext.load(directory, device="cpu").generate(prompt, max_new_tokens=12, mode="full")
    before, special, after = whole.tokens[4:7]
    assert len({before, special, after}) == 3 and special not in whole.tokens[:5]
    rest = iter(sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"7", "!"}))
    names = {before: "7", special: "<|end|>", after: "!"}
    words = {names.get(i) or next(rest, f"{i}"): i for i in range(300)}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))

    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    expected = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 3, dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        stop_strings=[stop],
        tokenizer=transformers.AutoTokenizer.from_pretrained(directory),
    )[0, 3:].tolist()
    assert expected == whole.tokens[: len(expected)] and len(expected) < 12
    model = river_ext.load(directory, device="cpu")
    out = model.generate(prompt, max_new_tokens=12, mode="full", stop=stop, stop_tokens=())
    assert (out.tokens, out.finish_reason) == (expected, "stop")
    cut = model.text.decode(expected[:-1] if stop.endswith("!") else expected)
    assert out.text == (cut[:-1] if stop.startswith("7") else cut)
