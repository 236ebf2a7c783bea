"""`generate` of transformers with our decoding loop against its own: the same tokens, ends and results."""

import copy
import inspect
from threading import Thread

import pytest
import torch
from conftest import random_hf_model
from test_hf_parity import CASES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import river_ext
from river_ext import RiverError, custom_generate, huggingface
from river_ext.engine.engine import Engine
from river_ext.huggingface import river_of

transformers = pytest.importorskip("transformers")

PADDING = 0
BATCHES = [
    "gqa 4/2", "attention_bias", "linear", "mistral, window", "qwen2, some windows", "qwen3",
    "phi3, window", "longrope, short", "ministral, some windows", "ministral3, window",
    "smollm3, some windows", "granite, bias",
]  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    model = random_hf_model(pad_token_id=PADDING)
    model.generation_config.eos_token_id = None
    return model


def prompts(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Random ones, padded on the left."""
    generator, longest = torch.Generator().manual_seed(1), max(lengths)
    rows = [torch.randint(3, 96, (length,), generator=generator) for length in lengths]
    ids = [torch.cat([torch.full((longest - len(row),), PADDING), row]) for row in rows]
    masks = [torch.tensor([0] * (longest - length) + [1] * length) for length in lengths]
    return {"input_ids": torch.stack(ids), "attention_mask": torch.stack(masks)}


def both(model, inputs: dict, **options) -> tuple:
    """The results of their loop and of ours."""
    theirs = model.generate(**inputs, **options)
    return theirs, model.generate(**inputs, **options, custom_generate=custom_generate)


@pytest.mark.parametrize("case", BATCHES)
def test_greedy_batches_equal_those_of_transformers(case):
    model_type, _, changes = CASES[case]
    model = random_hf_model(model_type, **({"pad_token_id": PADDING} | changes))
    theirs, ours = both(model, prompts([30, 7, 1]), max_new_tokens=50, do_sample=False, eos_token_id=None)
    assert theirs.shape == (3, 80) and len(set(theirs[0, 30:].tolist())) > 15
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", ["longrope, full prompt", "dynamic, long prompt"])
def test_rows_whose_rotation_depends_on_their_length(case):
    """Theirs depend on the longest row, and on earlier calls, so each is compared with what it is alone."""
    model_type, _, changes = CASES[case]
    model = random_hf_model(model_type, **({"pad_token_id": PADDING} | changes))
    options = dict(max_new_tokens=30, do_sample=False, eos_token_id=None)
    inputs = prompts([90, 66, 20])
    ours = model.generate(**inputs, **options, custom_generate=custom_generate)
    for ids, mask, row in zip(inputs["input_ids"], inputs["attention_mask"], ours, strict=True):
        alone = copy.deepcopy(model).generate(ids[mask.bool()][None], **options)[0]
        assert torch.equal(row[mask.argmax() :], alone)
        assert torch.equal(row[:90], ids)


def test_rows_end_by_tokens_and_lengths(llama):
    inputs = prompts([12, 9, 5, 5, 12, 3, 1, 8, 4, 4])  # more rows than run at once
    whole = llama.generate(**inputs, max_new_tokens=30, do_sample=False)[:, 12:]
    ends = [int(whole[0, 20]), int(whole[1, 3]), int(whole[2, 0]), 5000]  # the last one is no token
    theirs, ours = both(llama, inputs, max_new_tokens=30, do_sample=False, eos_token_id=ends)
    lengths = (ours[:, 12:] != PADDING).sum(-1).tolist()
    assert torch.equal(ours, theirs) and len(set(lengths)) > 3
    theirs, ours = both(llama, prompts([6, 2]), max_length=9, do_sample=False)
    assert torch.equal(ours, theirs) and ours.shape == (2, 9)
    config = transformers.GenerationConfig(
        max_new_tokens=30, do_sample=False, eos_token_id=ends[1], pad_token_id=95, bos_token_id=1
    )
    theirs, ours = both(llama, prompts([12, 9]), generation_config=config)
    assert torch.equal(ours, theirs) and (ours[1, -5:] == 95).all()
    theirs, ours = both(llama, {"inputs": torch.tensor([[5, 9, 3]])}, max_new_tokens=1, do_sample=False)
    assert torch.equal(ours, theirs) and ours.shape == (1, 4)
    (same,) = [llama.generate(torch.tensor([[5, 9, 3]]), max_new_tokens=1, custom_generate=custom_generate)]
    assert torch.equal(same, ours)


def test_without_an_end_of_sequence_only_ends_of_others_need_padding():
    model = random_hf_model()
    model.generation_config.eos_token_id = None
    inputs = {"input_ids": torch.tensor([[5, 9, 3], [4, 4, 4]]), "attention_mask": torch.ones(2, 3).long()}
    theirs, ours = both(model, inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(ours, theirs)
    with pytest.raises(RiverError, match="pad_token_id=None for 2 rows, which MaxTimeCriteria may end"):
        model.generate(**inputs, max_new_tokens=4, max_time=9.0, custom_generate=custom_generate)


class AfterThree(transformers.StoppingCriteria):
    """Three times the token in a row's text, the prompt included; it also looks at nothing but that."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids == self.token).sum(-1) >= 3


def characters() -> transformers.PreTrainedTokenizerFast:
    """Each token is a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:96]
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("mode", ["lossless", "full"])
def test_criteria_of_ones_own_end_rows(llama, mode, monkeypatch):
    """A draft that goes on behind the end is cut. An end of sequence lets transformers pad what has ended."""
    cancelled, cancel = [], Engine.cancel
    monkeypatch.setattr(Engine, "cancel", lambda engine, id: cancelled.append(id) or cancel(engine, id))
    inputs = prompts([12, 9, 5])
    whole = llama.generate(**inputs, max_new_tokens=30, do_sample=False)
    often = whole[0, 12:].mode().values.item()
    unseen = next(i for i in range(3, 96) if i not in whole)
    options = dict(max_new_tokens=30, do_sample=False, eos_token_id=unseen)
    lengths = [transformers.MaxLengthCriteria(length) for length in (20, 17)]
    for criteria in ([AfterThree(often)], lengths):
        theirs = llama.generate(**inputs, **options, stopping_criteria=criteria)
        ours = llama.generate(
            **inputs, **options, stopping_criteria=criteria, custom_generate=custom_generate, mode=mode
        )
        assert torch.equal(ours, theirs) and not torch.equal(ours, whole)
    assert cancelled, "rows that have ended are not computed any longer"
    if mode == "lossless":
        alone = river_of(llama).generate(inputs["input_ids"][0], max_new_tokens=30, mode=mode, stop_tokens=())
        assert any(alone.drafted)


def test_stop_strings(llama):
    inputs, tokenizer = prompts([12, 9]), characters()
    whole = llama.generate(**inputs, max_new_tokens=30, do_sample=False)[:, 12:].tolist()
    ascii = [next(i for i in range(5, 30) if max(row[i : i + 2]) < 94) for row in whole]
    strings = [tokenizer.decode(row[i : i + 2]) for i, row in zip(ascii, whole, strict=True)]
    options = dict(max_new_tokens=30, do_sample=False, eos_token_id=2)
    theirs = llama.generate(**inputs, **options, stop_strings=strings, tokenizer=tokenizer)
    criterion = transformers.StopStringCriteria(tokenizer, strings)
    ours = llama.generate(**inputs, **options, stopping_criteria=[criterion], custom_generate=custom_generate)
    assert torch.equal(ours, theirs) and ours.shape == (2, 12 + max(ascii) + 2)
    try:
        same = llama.generate(
            **inputs, **options, stop_strings=strings, tokenizer=tokenizer, custom_generate=custom_generate
        )
    except ValueError as error:  # generate keeps the tokenizer from callables, whatever they are
        assert "could not locate a tokenizer" in str(error)
    else:
        assert torch.equal(same, theirs)


class Recorder:
    def __init__(self):
        self.heard = []

    def put(self, value):
        assert value.device.type == "cpu"
        self.heard.append(value.tolist())

    def end(self):
        self.heard.append("end")


@pytest.mark.parametrize("lengths", [[12], [12, 9, 5]])
def test_streamers_hear_what_they_hear_from_transformers(llama, lengths):
    inputs = prompts(lengths)
    whole = llama.generate(**inputs, max_new_tokens=30, do_sample=False)
    theirs, ours = Recorder(), Recorder()
    options = dict(max_new_tokens=30, do_sample=False, eos_token_id=int(whole[-1, 12 + 7]))
    llama.generate(**inputs, **options, streamer=theirs)
    llama.generate(**inputs, **options, streamer=ours, custom_generate=custom_generate)
    assert ours.heard == theirs.heard and len(ours.heard) > 8


def test_a_text_streamer_in_a_thread(llama):
    tokenizer, inputs = characters(), prompts([12])
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    options = inputs | dict(max_new_tokens=20, do_sample=False, streamer=streamer)
    Thread(target=llama.generate, kwargs=options | dict(custom_generate=custom_generate)).start()
    text = "".join(streamer)
    expected = llama.generate(**inputs, max_new_tokens=20, do_sample=False)[0, 12:]
    assert text == tokenizer.decode(expected)


def test_a_streamer_is_ended_by_a_refusal(llama):
    streamer = Recorder()
    options = dict(streamer=streamer, repetition_penalty=1.3, max_new_tokens=3)
    with pytest.raises(RiverError):
        llama.generate(**prompts([12]), **options, custom_generate=custom_generate)
    assert streamer.heard[-1] == "end"


def test_two_threads_share_a_river(monkeypatch):
    model, made = random_hf_model(pad_token_id=PADDING), []
    load = huggingface.load
    monkeypatch.setattr(
        huggingface, "load", lambda *args, **kwargs: made.append(args) or load(*args, **kwargs)
    )
    options = prompts([12, 4]) | dict(max_new_tokens=30, do_sample=False, eos_token_id=None)
    expected, found = model.generate(**options), []

    def work():
        found.append(model.generate(**options, custom_generate=custom_generate))

    threads = [Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(found) == 3 and all(torch.equal(one, expected) for one in found)


def test_options_are_those_of_the_river(llama):
    inputs = prompts([12, 9])
    model, (first, second) = river_of(llama), [i[m.bool()] for i, m in zip(*inputs.values(), strict=True)]
    similarities = model.generate(first, max_new_tokens=20, mode="full", stop_tokens=()).similarities
    options = dict(
        mode="river", threshold=sorted(s[0] for s in similarities)[10], min_layers=1, prefill="min"
    )
    ours = llama.generate(**inputs, max_new_tokens=20, **options, custom_generate=custom_generate)
    alone = [model.generate(p, max_new_tokens=20, stop_tokens=(), **options) for p in (first, second)]
    assert ours[:, 12:].tolist() == [out.tokens for out in alone] and len(set(alone[0].exit_depths)) > 1
    assert not torch.equal(ours, llama.generate(**inputs, max_new_tokens=20, do_sample=False))
    with pytest.raises(RiverError, match="mode='lossles'; accepted: 'river', 'lossless'"):
        llama.generate(**inputs, max_new_tokens=2, mode="lossles", custom_generate=custom_generate)
    with pytest.raises(ValueError, match="treshold"):  # by transformers
        llama.generate(**inputs, max_new_tokens=2, treshold=0.5, custom_generate=custom_generate)
    with pytest.raises(RiverError, match=r"need 312 positions; the model has 256"):
        llama.generate(**inputs, max_new_tokens=300, custom_generate=custom_generate)


def test_the_options_are_those_of_the_model():
    """Every keyword of `Model.generate` but those that `generate` of transformers has its own words for."""
    theirs = {
        "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "stop_tokens", "logprobs",
        "return_logits", "progress", "prompt", "self", "deep_tokens",
    }  # fmt: skip
    wanted = inspect.signature(river_ext.Model.generate).parameters.keys() - theirs
    parameters = inspect.signature(custom_generate).parameters.values()
    ours = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"streamer"}
    assert ours == wanted
    assert not ours & vars(transformers.GenerationConfig()).keys()


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"top_k": 0}, {"top_k": 7, "top_p": 0.8}, {"temperature": 1.4, "min_p": 0.1}],
)
def test_sampling(llama, options):
    """What is drawn is what the river draws with the same numbers; 50 is the top_k of transformers."""
    inputs = prompts([12, 9])
    call = inputs | options | dict(max_new_tokens=25, do_sample=True, custom_generate=custom_generate)
    sampling = {"temperature": 1.0, "top_k": 50} | options
    expected = [
        river_of(llama).generate(
            ids[mask.bool()], max_new_tokens=25, mode="full", stop_tokens=(), seed=7 + row, **sampling
        )
        for row, (ids, mask) in enumerate(zip(*inputs.values(), strict=True))
    ]
    assert llama.generate(**call, seed=7)[:, 12:].tolist() == [out.tokens for out in expected]
    assert llama.generate(**call, seed=[7, 8])[:, 12:].tolist() == [out.tokens for out in expected]
    torch.manual_seed(3)
    first, second = llama.generate(**call), llama.generate(**call)
    torch.manual_seed(3)
    assert torch.equal(llama.generate(**call), first) and not torch.equal(first, second)


def test_several_texts_of_a_prompt(llama):
    call = prompts([12, 9]) | dict(max_new_tokens=15, num_return_sequences=3, do_sample=True)
    ours = llama.generate(**call, seed=1, custom_generate=custom_generate)
    assert ours.shape == (6, 27) and len({tuple(row) for row in ours[:3, 12:].tolist()}) == 3
    assert torch.equal(ours[:, :12], call["input_ids"].repeat_interleave(3, 0))


def test_greedy_leaves_the_generator_of_torch_alone(llama):
    before = torch.get_rng_state()
    llama.generate(**prompts([4]), max_new_tokens=3, do_sample=False, custom_generate=custom_generate)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "sampling", [{"do_sample": False}, {"do_sample": True, "top_k": 9, "temperature": 0.8}]
)
def test_results_with_logits_and_scores(llama, sampling):
    inputs = prompts([12, 9])
    options = sampling | dict(
        max_new_tokens=20, return_dict_in_generate=True, output_logits=True, output_scores=True
    )
    ours = llama.generate(**inputs, **options, seed=5, custom_generate=custom_generate)
    assert type(ours) is transformers.generation.GenerateDecoderOnlyOutput
    assert set(ours.keys()) == {"sequences", "logits", "scores"}
    known = torch.cat([inputs["attention_mask"], torch.ones(2, 20).long()], 1)
    positions = (known.cumsum(-1) - 1).clamp(min=0)
    forward = llama(ours.sequences, attention_mask=known, position_ids=positions).logits[:, 11:-1]
    logits = torch.stack(ours.logits, 1)
    assert logits.shape == (2, 20, 96) and (logits - forward).abs().max() < 1e-4 * forward.abs().max()
    if sampling["do_sample"]:
        expected = (logits / 0.8).masked_fill(logits < logits.topk(9).values[..., -1:], -torch.inf)
        torch.testing.assert_close(torch.stack(ours.scores, 1), expected)
    else:
        assert torch.equal(torch.stack(ours.scores, 1), logits)
        assert torch.equal(llama.generate(**inputs, **options).sequences, ours.sequences)
    transitions = llama.compute_transition_scores(ours.sequences, ours.scores, normalize_logits=True)
    assert transitions.shape == (2, 20) and transitions.isfinite().all()


class Once(AfterThree):
    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, 12:] == self.token).any(-1)


def test_logits_of_a_row_that_has_ended_are_zeros(llama):
    """Row 1 ends by a draft that was right, so that a token behind it was computed in the same step."""
    inputs = prompts([12, 9])
    drafts = dict(mode="lossless", draft_tokens=1, max_new_tokens=30)
    alone = river_of(llama).generate(inputs["input_ids"][1, 3:], stop_tokens=(), **drafts)
    count = next(i for i in range(4, 30) if alone.drafted[i] and alone.tokens.index(alone.tokens[i]) == i) + 1
    options = dict(return_dict_in_generate=True, output_logits=True, do_sample=False)
    end = [Once(alone.tokens[count - 1])]
    ours = llama.generate(
        **inputs, **options, **drafts, stopping_criteria=end, custom_generate=custom_generate
    )
    zeros = [bool((logits[1] == 0).all()) for logits in ours.logits]
    assert zeros == [False] * count + [True] * (len(zeros) - count) and count < len(zeros)
    assert ours.sequences[1, 12 : 12 + count].tolist() == alone.tokens[:count]
    assert (ours.sequences[1, 12 + count :] == PADDING).all()
    plain = llama.generate(
        **inputs, max_new_tokens=2, return_dict_in_generate=True, custom_generate=custom_generate
    )
    assert plain.logits is None and plain.scores is None


class Custom(transformers.LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


WRONG_ORDER = [transformers.TopPLogitsWarper(0.9), transformers.TemperatureLogitsWarper(0.8)]
TWO_AT_LEAST = [transformers.TopPLogitsWarper(0.1, min_tokens_to_keep=2)]
RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
FILLED = transformers.DynamicCache()
FILLED.update(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16), 0)


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"repetition_penalty": 1.2}, r"RepetitionPenaltyLogitsProcessor \(repetition_penalty=1.2\) changes"),
        ({"no_repeat_ngram_size": 2}, r"NoRepeatNGramLogitsProcessor \(no_repeat_ngram_size=2\) changes"),
        ({"suppress_tokens": [5]}, r"SuppressTokensLogitsProcessor \(suppress_tokens=\[5\]\) changes"),
        ({"min_new_tokens": 2, "eos_token_id": 5}, r"MinLengthLogitsProcessor \(min_length=7\) changes"),
        ({"typical_p": 0.5, "do_sample": True}, r"TypicalLogitsWarper \(typical_p=0.5\) changes logits"),
        ({"logits_processor": [Custom()]}, "Custom changes logits; accepted: temperature, top_k, top_p, min"),
        ({"logits_processor": WRONG_ORDER}, "TemperatureLogitsWarper; accepted: each once, in the order"),
        ({"logits_processor": TWO_AT_LEAST}, "TopPLogitsWarper with min_tokens_to_keep=2; accepted: 1"),
        ({"num_beams": 2}, "generate asks for beam_search; accepted: greedy_search and sample"),
        ({"prompt_lookup_num_tokens": 3}, "generate asks for assisted_generation"),
        ({"assistant_model": True}, "generate asks for assisted_generation"),
        ({"output_attentions": True}, "output_attentions=True; accepted: output_logits and output_scores"),
        ({"output_hidden_states": True}, "output_hidden_states=True; accepted: output_logits and output_s"),
        ({"attention_mask": RIGHT}, "attention_mask of row 1 ends with 0; accepted: padding on the left"),
        ({"position_ids": 2 * torch.arange(5).expand(2, 5)}, "position_ids are not those of the prompt's"),
        ({"inputs_embeds": torch.zeros(2, 5, 64), "input_ids": None}, "inputs_embeds cannot be used"),
        ({"past_key_values": FILLED}, "holds 3 positions; accepted: an empty cache"),
        ({"seed": [1], "do_sample": True}, "seed has 1 values for 2 prompts"),
        ({"seed": 0.5, "do_sample": True}, "seed=0.5; accepted: an integer"),
    ],
)  # fmt: skip
def test_refused(llama, options, complaint):
    inputs = {"input_ids": prompts([5, 5])["input_ids"], "attention_mask": torch.ones(2, 5).long()}
    inputs |= {"assistant_model": llama} if "assistant_model" in options else options
    inputs |= {"return_dict_in_generate": True}
    with pytest.raises(RiverError, match=complaint) as error:
        llama.generate(**inputs, max_new_tokens=3, custom_generate=custom_generate)
    assert "\n" not in str(error.value)
