"""The generation loop, streaming, teacher forcing, and every refusal."""

import json
import math

import numpy as np
import pytest
import torch
from oracle import oracle, same
from tiny_model import demo_model, random_model, random_prompt
from tokenizers import Tokenizer, decoders, models

import river_ext
from river_ext.engine.decoder import HostDecoder
from river_ext.engine.prefill import Prefill
from river_ext.engine.sequence import GenerationOutput
from river_ext.errors import RiverError
from river_ext.loading.text import Text

LAYERS = 4
QUESTION = "Question: Ana has 21 coins and buys 12 more at the fair. How many coins does Ana have?\nAnswer:"
PROMPTS = [random_prompt(n, n) for n in (1, 6, 11, 3)]


# --- what comes out -------------------------------------------------------------------------------------


def test_output():
    model = demo_model()
    out = model.generate(QUESTION, max_new_tokens=48, threshold=0.5, return_logits=True)
    n = len(out.tokens)
    assert isinstance(out, GenerationOutput)
    assert out.finish_reason == ("stop" if out.tokens[-1] in model.config.eos_token_ids else "length")
    assert out.text == model.text.decode(out.tokens)
    assert "<s>" not in out.text
    assert len(out.exit_depths) == len(out.similarities) == n
    assert [len(s) for s in out.similarities] == out.exit_depths
    assert out.logits.shape == (n, model.config.vocab_size) and out.logits.dtype == torch.float32
    assert out.stats.prompt_tokens == len(model.text.encode(QUESTION))
    assert out.stats.new_tokens == n
    assert out.stats.mean_exit_depth == pytest.approx(sum(out.exit_depths) / n)
    assert out.stats.tokens_per_second == pytest.approx((n - 1) / out.stats.decode_seconds)
    assert out.stats.prefill_seconds > 0


def test_one_prompt_one_output_a_list_a_list():
    model, options = demo_model(), {"max_new_tokens": 4}
    ids = model.text.encode(QUESTION)
    alone = model.generate(QUESTION, **options)
    assert model.generate(ids, **options).tokens == alone.tokens
    assert model.generate(tuple(ids), **options).tokens == alone.tokens
    assert model.generate(torch.tensor(ids), **options).tokens == alone.tokens
    outputs = model.generate([QUESTION, ids], **options)
    assert [out.tokens for out in outputs] == [alone.tokens] * 2
    assert [out.text for out in model.generate([ids], **options)] == [alone.text]


def test_arrays_and_encodings_are_prompts():
    model, ids = random_model(), PROMPTS[1]
    options = {"max_new_tokens": 4, "mode": "full"}
    alone = model.generate(ids, **options)
    one_row = torch.tensor([ids])
    padded = {
        "input_ids": torch.tensor([[0, 0, *ids]]),
        "attention_mask": torch.tensor([[0, 0] + [1] * len(ids)]),
    }
    for prompt in (
        one_row,
        one_row.numpy(),
        np.array(ids),
        list(one_row[0]),
        range(7),
        {"input_ids": ids},
        padded,
    ):
        expected = alone if not isinstance(prompt, range) else model.generate(list(prompt), **options)
        assert model.generate(prompt, **options).tokens == expected.tokens
        stream = model.stream(prompt, **options)
        assert [piece.token for piece in stream] == expected.tokens
    batches = ([one_row, np.array(ids)], [ids], {"input_ids": [ids, ids]}, [padded, {"input_ids": ids}])
    for batch in batches:
        assert {tuple(out.tokens) for out in model.generate(batch, **options)} == {tuple(alone.tokens)}
    ragged = {"input_ids": [[0, *ids], ids[:3]], "attention_mask": [[0] + [1] * len(ids), [1, 1, 1]]}
    assert model.generate(ragged, **options)[0].tokens == alone.tokens
    assert model.generate(ragged, **options)[1].tokens == model.generate(ids[:3], **options).tokens
    assert model.score(one_row, prompt_length=1).exit_depths == model.score(ids, prompt_length=1).exit_depths


def test_a_batch_encoding_is_a_prompt():
    encoding = pytest.importorskip("transformers").BatchEncoding
    ids = PROMPTS[1]
    alone = random_model().generate(ids, max_new_tokens=3)
    tensors = encoding({"input_ids": [ids], "attention_mask": [[1] * len(ids)]}, tensor_type="pt")
    assert random_model().generate(tensors, max_new_tokens=3).tokens == alone.tokens


def test_values_per_request_as_arrays():
    model, options = random_model(), {"max_new_tokens": np.array(6), "temperature": torch.tensor(1.0)}
    lists = model.generate(
        PROMPTS, threshold=[0.5, 0.7, 0.9, 2], min_layers=[1, 2, 3, 4], seed=[1, 2, 3, 4], **options
    )
    arrays = model.generate(
        PROMPTS,
        threshold=np.array([0.5, 0.7, 0.9, 2]),
        min_layers=torch.tensor([1, 2, 3, 4]),
        seed=range(1, 5),
        stop_tokens=np.array([], int),
        return_logits=np.bool_(True),
        **options,
    )
    assert [out.tokens for out in arrays] == [out.tokens for out in lists]
    by_layer = [[0.5, 0.7, 0.9, 2], [2, 0.6, 0.6, 0.6], [1, 1, -2, 0], [0.7] * 4]
    lists = model.generate(PROMPTS, threshold=by_layer, **options)
    arrays = model.generate(PROMPTS, threshold=np.array(by_layer), **options)
    singles = [
        model.generate(prompt, threshold=torch.tensor(own), **options)
        for prompt, own in zip(PROMPTS, by_layer, strict=True)
    ]
    for found in (arrays, singles):
        assert [out.exit_depths for out in found] == [out.exit_depths for out in lists]
    assert model.generate(PROMPTS[:1], threshold=[by_layer[0]], **options)[0].tokens == lists[0].tokens
    one = model.generate(PROMPTS, threshold=torch.tensor(0.7), seed=np.int64(3), **options)
    assert [out.tokens for out in one] == [
        out.tokens for out in model.generate(PROMPTS, threshold=0.7, seed=3, **options)
    ]


def test_outputs_are_json():
    stream = demo_model().stream(QUESTION, max_new_tokens=5, return_logits=True)
    pieces = [json.loads(json.dumps(piece.to_dict())) for piece in stream]
    out = stream.output
    assert [piece["token"] for piece in pieces] == out.tokens
    document = json.loads(json.dumps(out.to_dict(), allow_nan=False))
    assert document.pop("stats") == out.stats.to_dict() == vars(out.stats)
    assert document == {k: v for k, v in vars(out).items() if k not in ("logits", "stats")}


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 1e-30}])
def test_temperatures_at_the_limits_of_fp32(options):
    """The smallest are greedy; the largest draw from a flat distribution."""
    model, options = random_model(), {"max_new_tokens": 12, "mode": "full", **options}
    greedy = model.generate(PROMPTS[1], **options).tokens
    for temperature in (1e-300, 1e-45, 1e-38, 1e-30):
        assert model.generate(PROMPTS[1], temperature=temperature, **options).tokens == greedy
    assert model.generate(PROMPTS[1], temperature=3.4e38, **options).tokens != greedy


def test_limits_of_fp32_elsewhere():
    model, options = random_model(), {"max_new_tokens": 12}
    never = model.generate(PROMPTS[1], threshold=math.inf, **options)
    always = model.generate(PROMPTS[1], threshold=-math.inf, **options)
    assert model.generate(PROMPTS[1], threshold=1e300, **options).exit_depths == never.exit_depths
    assert model.generate(PROMPTS[1], threshold=-1e300, **options).exit_depths == always.exit_depths
    greedy = model.generate(PROMPTS[1], **options).tokens
    for top_p in (1e-300, 1e-45):
        assert model.generate(PROMPTS[1], temperature=1, top_p=top_p, **options).tokens == greedy
    assert model.generate(PROMPTS[1], temperature=1, min_p=1 - 1e-12, **options).tokens == greedy
    alike = [{"top_p": 1.0}, {"top_p": 1 - 1e-12}, {"top_k": 10**30}, {"top_k": 80}]
    alike += [{"min_p": 0}, {"min_p": 1e-300}, {"min_p": 1e-45}]
    drawn = [model.generate(PROMPTS[1], temperature=1, seed=2**63 - 1, **options, **o).tokens for o in alike]
    assert drawn == drawn[:1] * 7 and drawn[0] != greedy
    assert model.generate(PROMPTS[1], temperature=1, seed=-(2**63), **options).tokens


def test_logits_outlive_the_call_as_ordinary_tensors():
    logits = random_model().generate(PROMPTS[0], max_new_tokens=3, return_logits=True).logits
    logits += 1
    assert random_model().generate(PROMPTS[0], max_new_tokens=3).logits is None


@pytest.mark.parametrize(
    "options", [{}, {"mode": "full_w4"}, {"temperature": 1.0, "top_k": 9}, {"prefill": "min"}]
)
def test_deterministic(options):
    first, second = (
        random_model().generate(PROMPTS, max_new_tokens=10, threshold=0.8, return_logits=True, **options)
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert (a.tokens, a.exit_depths, a.similarities) == (b.tokens, b.exit_depths, b.similarities)
        assert torch.equal(a.logits, b.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {"threshold": math.inf},
        {"mode": "full_w4"},
        {"mode": "full_w4", "river_head": "w4"},
        {"threshold": -2, "min_layers": 2},
        {"threshold": 0.6},
    ],
)
def test_a_batch_equals_single_runs_bit_for_bit(dtype, options):
    options = {"max_new_tokens": 10, "return_logits": True, **options}
    model = random_model(dtype=dtype)
    for prompt, out in zip(PROMPTS, model.generate(PROMPTS, **options), strict=True):
        alone = model.generate(prompt, **options)
        assert out.tokens == alone.tokens
        assert out.similarities == alone.similarities
        assert torch.equal(out.logits, alone.logits)


def test_eight_prompts_some_of_which_finish_early():
    prompts = [random_prompt(n + 1, n) for n in range(8)]
    options = {"max_new_tokens": 20, "mode": "full", "stop_tokens": list(range(0, 80, 7))}
    outputs = random_model().generate(prompts, **options)
    assert len({len(out.tokens) for out in outputs}) > 2
    for prompt, out in zip(prompts, outputs, strict=True):
        assert out.tokens == random_model().generate(prompt, **options).tokens


def test_modes():
    model, ids = random_model(), PROMPTS[1]
    full_w4 = model.generate(ids, max_new_tokens=6, mode="full_w4")
    assert full_w4.exit_depths == [0] * 6
    assert full_w4.similarities == [[]] * 6
    by_depth = model.generate(ids, max_new_tokens=1, prefill="depth:0")
    assert by_depth.exit_depths == [0]
    assert by_depth.tokens == full_w4.tokens[:1]
    assert model.generate(ids, max_new_tokens=6, mode="full").exit_depths == [LAYERS] * 6


HEADS = {
    "full_w4": {"mode": "full_w4"},
    "the river": {"threshold": 0.6},
    "sampled": {"mode": "full_w4", "temperature": 0.9, "seed": 3},
    "filters": {"threshold": 0.6, "temperature": 1.0, "top_k": 9},
}


@pytest.mark.parametrize("control", ["host", "device"])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_the_head_of_the_river(options, control):
    """It draws every token but the first one of mode "river"."""
    options, model, prompt = {"max_new_tokens": 30, **options}, random_model(), PROMPTS[1]
    out = model.generate(prompt, river_head="w4", exit_control=control, **options)
    assert same(out, oracle(model, prompt, river_head="w4", **options))
    by_models = model.generate(prompt, exit_control=control, **options)
    assert same(by_models, oracle(model, prompt, **options))
    assert out.tokens != by_models.tokens, "else this test could not fail"


def test_a_prompt_at_full_depth_draws_by_the_models_head():
    """Whatever its steps draw by: the two heads are not always of one mind."""
    model, options = random_model(), {"max_new_tokens": 1, "river_head": "w4"}
    differ = 0
    for seed in range(20):
        prompt = random_prompt(4, seed)
        first = model.generate(prompt, mode="river", return_logits=True, **options)
        assert torch.equal(
            first.logits, model.generate(prompt, mode="full", return_logits=True, max_new_tokens=1).logits
        )
        by_river, by_model = (
            model.generate(prompt, mode="full_w4", return_logits=True, **options | {"river_head": head})
            for head in ("w4", "model")
        )
        differ += not torch.equal(by_river.logits, by_model.logits)
    assert differ == 20


@pytest.mark.parametrize("control", ["host", "device"])
@pytest.mark.parametrize("wants", [False, True], ids=["tokens alone", "logits"])
@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.0, "top_k": 9}], ids=["greedy", "filters"])
def test_rows_of_one_step_draw_by_different_heads(control, wants, sampled):
    """Each gets what it gets alone, in every mixture."""
    model, heads = random_model(), ["w4", "model", "w4", "model", "model"]
    options = {"max_new_tokens": 9, "mode": "full_w4", "return_logits": wants, **sampled}
    prompts = [random_prompt(n + 2, n) for n in range(len(heads))]
    engine = model.engine(slots=5, exit_control=control)
    for number, (prompt, head) in enumerate(zip(prompts, heads, strict=True)):
        engine.submit(prompt, id=number, **options | {"river_head": head, "max_new_tokens": 9 - number})
    outputs = {event.id: event.output for event in engine if event.output}
    for number, (prompt, head) in enumerate(zip(prompts, heads, strict=True)):
        alone = model.generate(prompt, **options | {"river_head": head, "max_new_tokens": 9 - number})
        assert outputs[number].tokens == alone.tokens
        if wants:
            assert torch.equal(outputs[number].logits, alone.logits)


def test_a_river_without_a_head(monkeypatch):
    model = random_model()
    expected = model.generate(PROMPTS[0], max_new_tokens=4).tokens
    monkeypatch.setattr(model.network, "lm_head_w4", None)
    message = "river_head='w4' needs a river with a head.*accepted: river_head='model', or a river that"
    with pytest.raises(RiverError, match=message):
        model.generate(PROMPTS[0], max_new_tokens=4, river_head="w4")
    with pytest.raises(RiverError, match=message):
        model.score([1, 2, 3], prompt_length=1, river_head="w4")
    assert model.generate(PROMPTS[0], max_new_tokens=4).tokens == expected


@pytest.mark.parametrize("control", ["host", "device"])
def test_log_probabilities(control):
    model, options = random_model(), {"max_new_tokens": 6, "temperature": 1.5, "top_k": 9, "seed": 4}
    out = model.generate(PROMPTS[1], logprobs=3, return_logits=True, exit_control=control, **options)
    logprobs = out.logits.log_softmax(-1)
    assert out.logprobs == [row[token].item() for row, token in zip(logprobs, out.tokens, strict=True)]
    values, ids = logprobs.topk(3)
    assert [[pair[0] for pair in top] for top in out.top_logprobs] == ids.tolist()
    assert [[pair[1] for pair in top] for top in out.top_logprobs] == values.tolist()
    none = model.generate(PROMPTS[1], logprobs=0, exit_control=control, **options)
    assert (none.tokens, none.logprobs) == (out.tokens, out.logprobs)
    assert none.top_logprobs == [[]] * 6 and none.logits is None
    assert model.generate(PROMPTS[1], **options).logprobs is None


def test_any_number_of_prompts():
    """More than there are slots, each with values of its own."""
    prompts = [random_prompt(n % 5 + 1, n) for n in range(21)]
    lengths = [n % 4 + 1 for n in range(21)]
    outputs = random_model().generate(
        prompts, max_new_tokens=lengths, temperature=[0.0, 1.0, 2.0] * 7, top_k=[0, 5, 7] * 7, seed=range(21)
    )
    for n, (prompt, out) in enumerate(zip(prompts, outputs, strict=True)):
        options = {"temperature": float(n % 3), "top_k": [0, 5, 7][n % 3], "seed": n}
        assert out.tokens == random_model().generate(prompt, max_new_tokens=lengths[n], **options).tokens


def test_threshold_matters_to_the_tokens():
    """The river is an approximation: on random weights shallow exits give other tokens than full depth."""
    model = random_model()
    full = model.generate(PROMPTS[2], max_new_tokens=30, mode="full")
    early = model.generate(PROMPTS[2], max_new_tokens=30, threshold=-2)
    assert full.tokens[0] == early.tokens[0], "from the same full prefill"
    assert full.tokens != early.tokens


# --- where it ends --------------------------------------------------------------------------------------


def test_stop_tokens():
    full = random_model().generate(PROMPTS[1], max_new_tokens=12, mode="full")
    assert full.finish_reason == "length", "this model has no end-of-sequence token"
    stop = full.tokens[4]
    n = full.tokens.index(stop) + 1
    for stop_tokens in (stop, [stop], (79, stop), {stop}):
        out = random_model().generate(PROMPTS[1], max_new_tokens=12, mode="full", stop_tokens=stop_tokens)
        assert (out.tokens, out.finish_reason) == (full.tokens[:n], "stop")
    with_eos = random_model(eos_token_ids=(stop,))
    assert with_eos.generate(PROMPTS[1], max_new_tokens=12, mode="full").tokens == full.tokens[:n]
    out = with_eos.generate(PROMPTS[1], max_new_tokens=12, mode="full", stop_tokens=())
    assert out.tokens == full.tokens


def test_a_stop_token_as_the_last_one_allowed_is_a_stop():
    full = random_model().generate(PROMPTS[1], max_new_tokens=3, mode="full")
    n = full.tokens.index(full.tokens[-1]) + 1
    out = random_model().generate(PROMPTS[1], max_new_tokens=n, mode="full", stop_tokens=full.tokens[-1])
    assert out.finish_reason == "stop"


# where stop strings are taken from the text that the model writes without them
STOPS = {
    "a character": lambda text: text[3],
    "across tokens": lambda text: text[3:9],
    "the beginning": lambda text: text[:4],
    "the end": lambda text: text[-3:],
    "the first of two": lambda text: [text[8:14], text[4:7]],
    "absent": lambda text: "\N{SNOWMAN}",
    "absent at last": lambda text: text[-3:] + "!",
}


@pytest.mark.parametrize("choose", STOPS.values(), ids=STOPS)
def test_stop_strings(choose):
    options = {"max_new_tokens": 24, "mode": "full", "stop_tokens": ()}
    whole = demo_model().generate(QUESTION, **options)
    stop = choose(whole.text)
    places = [whole.text.find(s) for s in ([stop] if isinstance(stop, str) else stop)]
    places = [place for place in places if place >= 0]
    out = demo_model().generate(QUESTION, stop=stop, **options)
    assert out.text == whole.text[: min(places, default=None)]
    assert out.finish_reason == ("stop" if places else "length")
    assert out.tokens == whole.tokens[: len(out.tokens)]
    assert out.text in demo_model().text.decode(out.tokens), "the tokens go on to the end of the stop string"
    if not places:
        assert out.tokens == whole.tokens


def test_a_stop_string_before_an_unfinished_character_is_the_reason():
    """The last token allowed ends with a stop string and with the first byte of a character."""
    tokens = random_model().generate(PROMPTS[1], max_new_tokens=3, mode="full").tokens
    assert tokens[2] not in tokens[:2]
    words = {"end\u00e2" if i == tokens[2] else chr(0x141 + i): i for i in range(80)}  # \u00e2 is byte 0xE2
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=next(iter(words))))
    tokenizer.decoder = decoders.ByteLevel()
    options = {"max_new_tokens": 3, "mode": "full"}
    for stop, reason, tail in (("end", "stop", ""), ("\ufffd", "stop", "end"), ("no", "length", "end\ufffd")):
        out = random_model(tokenizer=tokenizer).generate(PROMPTS[1], stop=stop, **options)
        assert (out.tokens, out.finish_reason) == (tokens, reason)
        assert out.text == "".join(chr(0x141 + i) for i in tokens[:2]) + tail


def test_a_stop_string_ends_only_its_own_row():
    prompts = [QUESTION, "def add(x):"]
    options = {"max_new_tokens": 24, "mode": "full", "stop_tokens": ()}
    whole = demo_model().generate(prompts, **options)
    stop = next(w for w in (whole[0].text[i : i + 4] for i in range(20)) if w not in whole[1].text)
    outputs = demo_model().generate(prompts, stop=stop, **options)
    assert outputs[0].text == whole[0].text[: whole[0].text.index(stop)]
    assert outputs[1].text == whole[1].text
    assert (outputs[0].finish_reason, outputs[1].finish_reason) == ("stop", "length")


def test_without_a_tokenizer_there_is_no_text():
    out = random_model().generate(PROMPTS[1], max_new_tokens=3)
    assert out.text == ""
    assert [piece.text for piece in random_model().stream(PROMPTS[1], max_new_tokens=3)] == [""] * 3


# --- streaming ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "full"},
        {"stop": "1"},
        {"stop": [" ", "2 "]},
        {"stop": ["\n\n\n", "zz"], "stop_tokens": ()},
        {"max_new_tokens": 5},
        {"max_new_tokens": 1},
        {"temperature": 2.0, "seed": 3},
        {"temperature": 2.0, "top_p": 0.95, "seed": 4},
        {"temperature": 2.0, "min_p": 0.05, "seed": 5},
    ],
)
def test_stream_gives_what_generate_gives(options):
    options = {"max_new_tokens": 40, **options}
    out = demo_model().generate(QUESTION, **options)
    stream = demo_model().stream(QUESTION, **options)
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == out.text == stream.output.text
    assert stream.output.finish_reason == out.finish_reason
    assert stream.output.similarities == out.similarities
    assert [piece.token for piece in pieces] == out.tokens
    assert [piece.exit_depth for piece in pieces] == out.exit_depths


def test_stream_is_a_stream(monkeypatch):
    """A piece arrives before the next token is computed."""
    steps, step = [], HostDecoder.step
    monkeypatch.setattr(HostDecoder, "step", lambda *a, **k: steps.append(1) or step(*a, **k))
    stream = random_model().stream(PROMPTS[1], max_new_tokens=5, exit_control="host")
    assert (stream.output.tokens, stream.output.finish_reason) == ([], None)
    for count, piece in enumerate(stream):
        assert len(steps) == count
        assert stream.output.tokens[-1] == piece.token


def test_stream_refuses_at_once():
    with pytest.raises(RiverError, match="max_new_tokens"):
        random_model().stream(PROMPTS[1], max_new_tokens=0)
    with pytest.raises(RiverError, match="one prompt"):
        random_model().stream(PROMPTS)
    with pytest.raises(TypeError, match="no argument 'max_tokens'; .* did you mean max_new_tokens"):
        random_model().stream(PROMPTS[1], max_tokens=3)
    with pytest.raises(TypeError, match="no argument 'n'; accepted: max_new_tokens, threshold"):
        random_model().stream(PROMPTS[1], n=3)


def test_an_unknown_keyword_is_answered_with_the_closest_one():
    model = random_model()
    for call, keyword, meant in (
        (model.generate, "temprature", "temperature"),
        (model.generate, "max_tokens", "max_new_tokens"),
        (model.stream, "threshhold", "threshold"),
    ):
        message = f"^no argument '{keyword}'; accepted: .*; did you mean {meant}\\?$"
        with pytest.raises(TypeError, match=message):
            call(PROMPTS[1], **{keyword: 1})
    with pytest.raises(TypeError, match="did you mean prompt_length"):
        model.score(PROMPTS[1], promt_length=1)
    with pytest.raises(TypeError, match="no argument 'dtyp'; accepted: path, device, .*; did you mean dtype"):
        river_ext.load(dtyp="float32")
    with pytest.raises(TypeError, match="progress$"):
        model.generate(PROMPTS[1], wxyz=1)


# --- teacher forcing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"threshold": 0.8}, {"threshold": -2, "min_layers": 3}, {"mode": "full"}, {"mode": "full_w4"},
     {"threshold": 0.8, "prefill": "last"}, {"mode": "full_w4", "river_head": "w4"}],
)  # fmt: skip
def test_score_of_its_own_tokens_equals_generate(options):
    model, prompt = random_model(), PROMPTS[2]
    out = model.generate(prompt, max_new_tokens=12, return_logits=True, **options)
    logits, exit_depths = model.score([*prompt, *out.tokens], prompt_length=len(prompt), **options)
    assert torch.equal(logits, out.logits)
    assert exit_depths == out.exit_depths


def test_score_of_other_tokens():
    model, tokens = random_model(), random_prompt(20)
    logits, exit_depths = model.score(tokens, prompt_length=5, mode="full")
    assert logits.shape == (15, 80)
    assert exit_depths == [LAYERS] * 15
    longer, _ = model.score(tokens, prompt_length=12, mode="full")
    assert torch.allclose(longer, logits[7:], rtol=0, atol=1e-4)
    river, depths = model.score(tokens, prompt_length=5, threshold=-2)
    assert torch.equal(river[0], logits[0])
    assert depths == [LAYERS] + [1] * 14
    assert not torch.equal(river[1:], logits[1:])


def test_score_takes_as_many_tokens_as_the_model_has_positions():
    tokens = random_prompt(64)
    assert len(random_model().score(tokens, prompt_length=60).exit_depths) == 4
    with pytest.raises(RiverError, match="65 tokens"):
        random_model().score([*tokens, 1], prompt_length=60)
    for prompt_length in (0, 64):
        with pytest.raises(RiverError, match="prompt_length"):
            random_model().score(tokens, prompt_length=prompt_length)


@pytest.mark.parametrize("tokens", ["a text", [{"role": "user", "content": "a text"}]], ids=["text", "chat"])
def test_score_takes_token_ids_alone(tokens):
    """Also where a tokenizer could make some of a text."""
    for model in (random_model(), demo_model()):
        with pytest.raises(RiverError, match="tokens is .*a text.*; accepted: token ids"):
            model.score(tokens, prompt_length=1)


# --- bad input ------------------------------------------------------------------------------------------

REFUSED = {
    "empty list": ([], {}, "prompt is empty"),
    "empty prompt in a batch": ([[1], []], {}, "prompt is empty"),
    "empty array": (torch.tensor([]), {}, "prompt is empty"),
    "id too large": ([1, 80], {}, "prompt holds 80; accepted: token ids from 0 to 79"),
    "negative id": ([1, -1], {}, "prompt holds -1"),
    "float id": ([1.5], {}, "prompt holds 1.5"),
    "bool id": ([True], {}, "prompt holds True"),
    "two rows": (torch.ones(2, 2, dtype=torch.long), {}, r"an array \[2, 2\]; accepted: \[n\] or \[1, n\]"),
    "three dimensions": (torch.ones(1, 1, 2, dtype=torch.long), {}, r"an array \[1, 1, 2\]"),
    "two rows in a batch": ([[1], np.ones((2, 2), int)], {}, r"an array \[2, 2\]"),
    "floats": (np.ones(3), {}, "prompt holds 1.0"),
    "booleans": (np.ones(3, bool), {}, "prompt holds True"),
    "no data": (torch.ones(3, device="meta"), {}, "prompt is a Tensor that cannot be read"),
    "set": ({1, 2}, {}, "prompt is a set"),
    "sets": ([{1, 2}], {}, "prompt is a set"),
    "generator": ((i for i in [1]), {}, "prompt is a generator"),
    "dictionary": ({"ids": [1]}, {}, "prompt is a dict without input_ids"),
    "mask of another length": (
        {"input_ids": [1, 2], "attention_mask": [1]},
        {},
        "attention_mask does not fit",
    ),
    "mask of nothing": ({"input_ids": [1], "attention_mask": [0]}, {}, "prompt is empty"),
    "no ids": ({"input_ids": None}, {}, "prompt is a NoneType"),
    "number of ids": ({"input_ids": 3, "attention_mask": 1}, {}, "attention_mask does not fit"),
    "no prompt": (None, {}, "prompt is a NoneType"),
    "bytes": (b"abc", {}, "prompt is a bytes"),
    "batch of bytes": ([b"abc"], {}, "prompt is a bytes"),
    "text without a tokenizer": ("hello", {}, "needs a tokenizer"),
    "too long": ([1] * 50, {"max_new_tokens": 15}, "65 positions; the model has 64"),
    "one too long": ([[1], [1] * 50], {"max_new_tokens": 15}, "65 positions; the model has 64"),
    "no new tokens": ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
    "huge count": ([1], {"max_new_tokens": 10**5000}, "max_new_tokens=a int that cannot be shown"),
    "float count": ([1], {"max_new_tokens": 2.0}, "max_new_tokens=2.0"),
    "nan threshold": ([1], {"threshold": math.nan}, "threshold=nan"),
    "nan threshold of one": ([[1], [2]], {"threshold": [0.5, math.nan]}, "threshold=nan"),
    "text threshold": ([1], {"threshold": "0.5"}, "threshold='0.5'"),
    "huge threshold": ([1], {"threshold": 10**400}, "threshold=1000"),
    "endless threshold": ([1], {"threshold": 10**5000}, "threshold=a int that cannot be shown"),
    "thresholds of some layers": (
        [1],
        {"threshold": [0.5, 0.6, 0.7]},
        r"threshold=\[0.5, 0.6, 0.7\], a list of 3; accepted: a number, or a list of 4, one for each layer",
    ),
    "thresholds of too many layers": ([[1]], {"threshold": [[0.5] * 5]}, "a list of 5; accepted"),
    "threshold of no layer": ([[1]], {"threshold": [[]]}, r"threshold=\[\], a list of 0; accepted"),
    "nan threshold of a layer": ([1], {"threshold": [0.5, math.nan, 1, 1]}, "threshold=nan"),
    "word for a layer": ([1], {"threshold": [0.5, "calibrated", 1, 1]}, "threshold='calibrated'; accepted"),
    "layers for all prompts": ([[1], [2]], {"threshold": [0.5] * 4}, "threshold has 4 values for 2 prompts"),
    "set of thresholds": (
        [[1], [2]],
        {"threshold": {0.5, 0.7}},
        "threshold is a set; accepted: one value, or",
    ),
    "dictionary of seeds": ([1], {"seed": {0: 1}}, "seed is a dict"),
    "array of thresholds": ([[1], [2]], {"threshold": np.ones(3)}, "threshold has 3 values for 2 prompts"),
    "rows of thresholds": ([[1]], {"threshold": np.ones((1, 2))}, r"threshold=\[1.0, 1.0\]"),
    "array of temperatures": ([1], {"temperature": np.ones(2)}, "temperature has 2 values for 1 prompts"),
    "counts": ([[1], [2]], {"max_new_tokens": [1, 2, 3]}, "max_new_tokens has 3 values for 2 prompts"),
    "one count too large": ([[1], [2]], {"max_new_tokens": [1, 64]}, "65 positions; the model has 64"),
    "array for a name": ([1], {"mode": np.array(["river", "full"])}, "mode=array.*accepted: 'river'"),
    "array for a policy": ([1], {"prefill": np.array(["full", "min"])}, "prefill=array.*accepted: 'full'"),
    "array of flags": ([1], {"return_logits": np.array([True, False])}, "return_logits=.*True or False"),
    "text for a flag": ([1], {"return_logits": "no"}, "return_logits='no'; accepted: True or False"),
    "thresholds": ([[1], [2]], {"threshold": [0.5] * 3}, "threshold has 3 values for 2 prompts"),
    "min_layers 0": ([1], {"min_layers": 0}, "min_layers=0; accepted: an integer from 1 to 4"),
    "min_layers 5": ([1], {"min_layers": 5}, "min_layers=5; accepted: an integer from 1 to 4"),
    "min_layers list": ([1], {"min_layers": [1, 2]}, "min_layers has 2 values for 1 prompts"),
    "policy": ([1], {"batch_policy": "max"}, "batch_policy='max'; accepted: 'row', 'min'"),
    "prefill": ([1], {"prefill": "half"}, "prefill='half'; accepted"),
    "endless depth": ([1], {"prefill": "depth:" + "1" * 5000}, "prefill='depth:1111.*; accepted.*0 to 4"),
    "prefill depth": ([1], {"prefill": "depth:5"}, "prefill='depth:5'; accepted.*0 to 4"),
    "mode": ([1], {"mode": "half"}, "mode='half'; accepted: 'river', 'lossless', 'full', 'full_w4'"),
    "drafts of another mode": (
        [1],
        {"draft_tokens": 3},
        "draft_tokens=3 needs mode='lossless'; mode='river'",
    ),
    "no drafts": ([1], {"mode": "lossless", "draft_tokens": 0}, "draft_tokens=0; .* an integer from 1 to 7"),
    "eight drafts": (
        [1],
        {"mode": "lossless", "draft_tokens": 8},
        "draft_tokens=8; .* an integer from 1 to 7",
    ),
    "drafts by name": ([1], {"mode": "lossless", "draft_tokens": "many"}, "draft_tokens='many'"),
    "lossless prefill": ([1], {"mode": "lossless", "prefill": "min"}, "prefill='min' needs mode='river'"),
    "mode of a strange type": ([1], {"mode": ["river"]}, "mode=\\['river'\\]; accepted"),
    "mode and prefill": ([1], {"mode": "full", "prefill": "min"}, "prefill='min' needs mode='river'"),
    "kv_strategy": ([1], {"kv_strategy": "drop"}, "kv_strategy='drop'; accepted: 'share', 'mask', 'reco"),
    "kv_strategy of a strange type": ([1], {"kv_strategy": ["mask"]}, "kv_strategy=\\['mask'\\]; accepted"),
    "kv_strategy and mode": (
        [1],
        {"kv_strategy": "mask", "mode": "full_w4"},
        "mode='full_w4' needs kv_strategy='share'; kv_strategy='mask' takes mode='river'",
    ),
    "kv_strategy and lossless": (
        [1],
        {"kv_strategy": "recompute", "mode": "lossless"},
        "mode='lossless' needs kv_strategy='share'",
    ),
    "kv_strategy and prefill": (
        [1],
        {"kv_strategy": "monotone", "prefill": "depth:2"},
        "prefill='depth:2' needs kv_strategy='share'; kv_strategy='monotone' takes prefill='full'",
    ),
    "kv_strategy and head": (
        [1],
        {"kv_strategy": "propagate", "river_head": "w4"},
        "river_head='w4' needs kv_strategy='share'; .* takes river_head='model'",
    ),
    "temperature": ([1], {"temperature": -0.1}, "temperature=-0.1"),
    "nan temperature": ([1], {"temperature": math.nan}, "temperature=nan"),
    "temperature past fp32": (
        [1],
        {"temperature": 1e39},
        r"temperature=1e\+39; accepted: .* to 3.40282e\+38",
    ),
    "infinite temperature": ([1], {"temperature": math.inf}, "temperature=inf"),
    "top_p 0": ([1], {"top_p": 0.0}, "top_p=0.0"),
    "top_p 2": ([1], {"top_p": 2}, "top_p=2"),
    "min_p below 0": ([1], {"min_p": -0.1}, "min_p=-0.1; accepted: a number from 0 .* to 1"),
    "min_p 2": ([1], {"min_p": 2}, "min_p=2"),
    "nan min_p": ([1], {"min_p": math.nan}, "min_p=nan"),
    "text for min_p": ([1], {"min_p": "0.1"}, "min_p='0.1'; accepted: a number"),
    "top_k": ([1], {"top_k": -1}, "top_k=-1"),
    "seed": ([1], {"seed": 2**63}, "seed=9223372036854775808"),
    "seeds": ([1], {"seed": [1, 2]}, "seed has 2 values for 1 prompts"),
    "stop without a tokenizer": ([1], {"stop": "x"}, "need a tokenizer"),
    "array of stop strings": ([1], {"stop": np.array([1])}, "stop="),
    "endless stop strings": ([1], {"stop": ["x" * 40_000] * 2}, "stop has 80000 characters; accepted: 65536"),
    "nothing to stop at": ([1], {"stop": None}, "stop=None; accepted: a string that is not empty"),
    "flag as a stop token": ([1], {"stop_tokens": True}, "stop_tokens holds True"),
    "empty stop": ([1], {"stop": ""}, "stop=''"),
    "stop of numbers": ([1], {"stop": [1]}, r"stop=\[1\]"),
    "stop token": ([1], {"stop_tokens": [80]}, "stop_tokens holds 80"),
    "head": ([1], {"river_head": "w8"}, "river_head='w8'; accepted: 'model', 'w4'"),
    "head of a strange type": ([1], {"river_head": True}, "river_head=True; accepted"),
    "head of full": ([1], {"river_head": "w4", "mode": "full"}, "'w4' needs mode='river' or 'full_w4'"),
    "head of lossless": ([1], {"river_head": "w4", "mode": "lossless"}, "'w4' needs mode='river' or 'full"),
    "exit control": (
        [1],
        {"exit_control": "cuda"},
        "exit_control='cuda'; accepted: 'auto', 'host', 'device'",
    ),
    "exit control of a strange type": ([1], {"exit_control": None}, "exit_control=None; accepted"),
    "log-probabilities": ([1], {"logprobs": 21}, "logprobs=21; accepted: an integer from 0 to 20"),
    "flag for log-probabilities": ([1], {"logprobs": True}, "logprobs=True; accepted: an integer from 0"),
}


@pytest.mark.parametrize(("prompt", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(monkeypatch, prompt, options, message):
    monkeypatch.setattr(Prefill, "advance", lambda *a: pytest.fail("refused too late"))
    with pytest.raises(RiverError, match=message) as caught:
        random_model().generate(prompt, **{"max_new_tokens": 4, **options})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_refused_with_a_tokenizer():
    for prompt in ("", [""], ["x", ""]):
        with pytest.raises(RiverError, match="prompt is empty"):
            demo_model().generate(prompt)
    with pytest.raises(RiverError, match="not UTF-8"):
        demo_model().generate("a\udcff")
    with pytest.raises(RiverError, match="positions; the model has"):
        demo_model().generate(QUESTION, max_new_tokens=demo_model().config.max_length - 2)


def test_a_tokenizer_larger_than_the_vocabulary():
    model = random_model(tokenizer=demo_model().tokenizer)
    with pytest.raises(RiverError, match="prompt holds [0-9]+; accepted: token ids from 0 to 79"):
        model.generate("Question:")


def test_the_longest_request_fits():
    out = random_model().generate([1] * 50, max_new_tokens=14)
    assert len(out.tokens) == 14


def test_river_error_is_a_value_error():
    assert issubclass(river_ext.RiverError, ValueError)


def test_an_unfinished_character_reaches_the_text():
    """Byte tokens that end inside a character, by both ways to the text."""
    text = demo_model().text
    assert isinstance(text, Text)
    options = {"max_new_tokens": 30, "temperature": 50.0, "seed": 1}
    out = demo_model().generate(QUESTION, **options)
    assert out.text == text.decode(out.tokens)
    assert "".join(p.text for p in demo_model().stream(QUESTION, **options)) == out.text
