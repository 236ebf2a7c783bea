"""What `river bench` measures: whose turn it is, what is read and used, and how runs become a row."""

import platform
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from conftest import write_tiny_checkpoint
from tiny_model import demo_model

import river_ext
from river_ext import benchmark
from river_ext.benchmark import Run, settings_of
from river_ext.evaluation.measure import Setting
from river_ext.loading.checkpoint import load_checkpoint
from river_ext.loading.config import read_config
from river_ext.random_model import random_model

LAYERS = 16  # of the demo
PROMPTS = [demo_model().text.encode(text) for text in ("Question: Ana has 21 coins.", "def f(x):")]
FIXED = Setting("depth 3", {"threshold": -2.0, "min_layers": 3})


@pytest.fixture(scope="module")
def measured():
    """The results of two turns, and the settings in the order in which they ran."""
    model, ran, run = demo_model(), [], benchmark._run
    settings = [*settings_of(model, [0.9]), FIXED]

    def recorded(model, number, prompt, options, read):
        (name,) = (s.name for s in settings if s.options | {"max_new_tokens": 12} == options)
        ran.append((number, name))
        return run(model, number, prompt, options, read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "_run", recorded)
        results = benchmark.benchmark(model, PROMPTS, settings, turns=2, max_new_tokens=12)
    return {result.name: result for result in results}, ran


def test_settings_take_turns_on_every_prompt(measured):
    results, ran = measured
    size = len(results)
    blocks = [ran[start : start + size] for start in range(0, len(ran), size)]
    assert len(blocks) == 2 * len(PROMPTS)
    for number, block in enumerate(blocks):
        assert {name for _, name in block} == set(results)
        assert {prompt for prompt, _ in block} == {number % len(PROMPTS)}
    assert len({tuple(name for _, name in block) for block in blocks}) > 1, "the order is drawn anew"


def test_settings_may_have_the_same_name():
    """As thresholds that differ in their last digits only have."""
    settings = settings_of(demo_model(), [0.9, 0.90000001, 0.9])
    results = benchmark.benchmark(demo_model(), PROMPTS[:1], settings, turns=1, max_new_tokens=2)
    assert [len(result.runs) for result in results] == [1] * 6
    assert [result.options for result in results] == [setting.options for setting in settings]


def test_runs_are_what_generate_gives(measured):
    results, _ = measured
    for name, result in results.items():
        outputs = [demo_model().generate(p, max_new_tokens=12, **result.options) for p in PROMPTS]
        assert [run.tokens for run in result.runs] == 2 * [output.tokens for output in outputs], name
        depths = [fmean(output.exit_depths[1:]) for output in outputs]
        assert result.exit_depth == pytest.approx(fmean(depths))
    lossless = results["lossless"]
    drafts = sum(run.drafts for run in lossless.runs)
    assert lossless.acceptance.total == drafts > lossless.acceptance.count > 0
    outputs = [demo_model().generate(p, max_new_tokens=12, **lossless.options) for p in PROMPTS]
    assert [run.quotes for run in lossless.runs] == 2 * [output.stats.quotes for output in outputs]
    assert lossless.same_output.count == lossless.same_output.total == 4
    assert results["depth 3"].exit_depth == 3 and results["full bf16"].x_full == 1
    assert all(result.acceptance is None for name, result in results.items() if name != "lossless")


def test_times_add_up(measured):
    for result in measured[0].values():
        for run in result.runs:
            assert run.first_token_ms > 0 and min(run.token_ms) > 0
            assert len(run.token_ms) == len(run.tokens) - 1
            assert run.prompt_tokens_per_second == pytest.approx(
                1e3 * len(PROMPTS[run.prompt]) / run.first_token_ms
            )
        assert result.token_ms_p50 <= result.token_ms_p95
    for run in measured[0]["full bf16"].runs:
        decoding = 1e3 * (len(run.tokens) - 1) / run.tokens_per_second
        assert sum(run.token_ms) == pytest.approx(decoding)


def of(layer) -> int:
    return sum(tensor.nbytes for tensor in vars(layer).values() if tensor is not None)


@pytest.mark.parametrize(
    "options, backbone, river, w4_head",
    [
        ({"mode": "full"}, LAYERS, 0, False),
        ({"mode": "full_w4"}, 0, LAYERS, False),
        ({"mode": "full_w4", "river_head": "w4"}, 0, LAYERS, True),
        (FIXED.options, 3, LAYERS - 3, False),
    ],
)
def test_bytes_are_those_of_what_ran(options, backbone, river, w4_head):
    model = demo_model()
    output = model.generate(PROMPTS[0], max_new_tokens=5, stop_tokens=(), **options)
    weights, exit_layers, config = model.weights, model.river, model.config
    token = sum(map(of, weights.layers[:backbone])) + sum(of(exit_layers[i]) for i in range(river))
    token += (exit_layers.lm_head if w4_head else weights.lm_head).nbytes
    cache = LAYERS * 2 * config.num_key_value_heads * config.head_dim * 2
    context = len(PROMPTS[0]) + 5 / 2
    assert benchmark._bytes_read(model, output, options) == pytest.approx(4 * (token + context * cache))


def test_bytes_of_lossless_decoding():
    model = demo_model()
    prompt = 3 * model.text.encode("7, 3, 9, 1, 4, 8, 2, 6, ")  # of which some is quoted: that costs no step
    output = model.generate(prompt, max_new_tokens=20, mode="lossless", stop_tokens=())
    stats, weights, river = output.stats, model.weights, model.river
    steps = stats.drafts - stats.quotes
    verifications = stats.steps * (sum(map(of, weights.layers)) + weights.lm_head.nbytes)
    drafts = steps * (sum(map(of, river)) + river.lm_head.nbytes)
    cache = LAYERS * 2 * model.config.num_key_value_heads * model.config.head_dim * 2
    context = (stats.steps + steps) * (len(prompt) + 20 / 2) * cache
    found = benchmark._bytes_read(model, output, {"mode": "lossless"})
    assert steps and stats.quotes and found == pytest.approx(verifications + drafts + context)


def test_tokens_that_come_together_share_the_wait(monkeypatch):
    """Tokens 1 and 2 do, 3 comes alone, and 4 and 5 are the last."""
    clock = iter([0.0, 1.0, 2.95, 3.0, 4.0, 4.49, 4.5])  # the start, then every token
    output = SimpleNamespace(
        tokens=[7] * 6, exit_depths=[16] * 6, checked=lambda: output,
        stats=SimpleNamespace(drafts=3, quotes=1, accepted_drafts=3),
    )  # fmt: skip
    model = SimpleNamespace(stream=lambda prompt: FakeStream(output))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(benchmark, "_bytes_read", lambda *a: 7e9)
    run = benchmark._run(model, 0, [1] * 50, {}, 10.0)
    assert run.token_ms == [pytest.approx(ms) for ms in (1000, 1000, 1000, 250, 250)]
    assert (run.first_token_ms, run.prompt_tokens_per_second) == (1000.0, 50.0)
    assert (run.tokens_per_second, run.gb_per_second) == (pytest.approx(5 / 3.5), 2.0)
    assert benchmark._bursts([3.0]) == [0] and benchmark._bursts([1.0, 2.0]) == [0, 1]


class FakeStream:
    def __init__(self, output):
        self.output = output

    def __iter__(self):
        return iter(self.output.tokens)


def a_run(speed: float | None, **changes) -> Run:
    values = {
        "prompt": 0, "tokens": [1, 2], "first_token_ms": 10.0, "prompt_tokens_per_second": 100.0,
        "token_ms": [5.0], "tokens_per_second": speed, "gb_per_second": speed, "exit_depth": 4.0,
        "drafts": 0, "quotes": 0, "accepted_drafts": 0, "read_gb_per_second": 40.0,
    }  # fmt: skip
    return Run(**values | changes)


def test_runs_become_a_row():
    full = [a_run(10.0), a_run(20.0), a_run(40.0)]
    runs = [
        a_run(20.0, first_token_ms=30.0, token_ms=list(range(1, 21)), drafts=4, accepted_drafts=3),
        a_run(60.0, tokens=[1, 3], exit_depth=6.0, drafts=4, accepted_drafts=1, read_gb_per_second=80.0),
        a_run(None, tokens=[1], token_ms=[], gb_per_second=None, exit_depth=None),  # a first token alone
    ]
    row = benchmark._result(demo_model(), Setting("lossless", {"mode": "lossless"}), runs, full)
    assert (row.tokens_per_second, row.x_full, row.first_token_ms) == (40.0, 2.5, 10.0)
    assert row.percent_of_read == pytest.approx((50 + 75) / 2)
    assert (row.token_ms_p50, row.token_ms_p95) == (10.0, pytest.approx(19.0))
    assert row.exit_depth == 5.0
    assert (row.acceptance.count, row.acceptance.total) == (4, 8)
    assert (row.same_output.count, row.same_output.total) == (1, 3)
    alone = benchmark._result(demo_model(), FIXED, [runs[2]], full[:1])
    assert (alone.tokens_per_second, alone.token_ms_p95, alone.x_full, alone.acceptance) == (None,) * 4


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_once(tmp_path, tied):
    directory = write_tiny_checkpoint(tmp_path / "m", tie_word_embeddings=tied, torch_dtype="bfloat16")
    model = river_ext.load(directory)
    weights, river = model.weights, model.river
    backbone = sum(map(of, weights.layers)) + weights.norm.nbytes + weights.embed_tokens.nbytes
    head = 0 if tied else weights.lm_head.nbytes
    small = len(weights.layers) * 2 * 64 * 2 + weights.norm.nbytes + weights.embed_tokens.nbytes
    packed, w4 = sum(map(of, river)), river.lm_head.nbytes
    expected = {
        "full": backbone + head,
        "lossless": backbone + head + packed + w4,
        "full_w4": small + head + packed,
        "river": backbone + head + packed,
    }
    for mode, size in expected.items():
        assert benchmark._weight_bytes(model, {"mode": mode}) == size, mode
    assert benchmark._weight_bytes(model, {"mode": "full_w4", "river_head": "w4"}) == small + packed + w4


def test_names_say_which_head_draws():
    names = [setting.name for setting in settings_of(demo_model(), [0.5, -2.0], 3, "w4")]
    assert names == [
        "full bf16", "lossless", "full W4, W4 head", "River 0.5 from layer 3, W4 head",
        "River -2 from layer 3, W4 head",
    ]  # fmt: skip


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "phi3"])
def test_a_random_model_has_the_tensors_of_a_checkpoint(tmp_path, model_type):
    """And runs in every mode."""
    changes = {"model_type": model_type, "head_dim": 16, "torch_dtype": "bfloat16"}
    directory = write_tiny_checkpoint(tmp_path / "m", **changes)
    stored = load_checkpoint(directory).weights
    model = random_model(read_config(directory), torch.device("cpu"))
    pairs = zip(stored.layers, model.weights.layers, strict=True)
    for there, here in [(stored, model.weights), *pairs]:
        for name, tensor in vars(there).items():
            other = getattr(here, name)
            if isinstance(tensor, torch.Tensor):
                assert (other.shape, other.dtype) == (tensor.shape, tensor.dtype), name
            elif name != "layers":
                assert other is None, name
    for name, tensor in vars(model.weights.layers[0]).items():
        if tensor is not None and tensor.dim() == 1:
            assert tensor.eq(0 if name.endswith("_bias") else 1).all(), name
    for setting in settings_of(model, [0.5]):
        output = model.generate([1, 2, 3], max_new_tokens=4, stop_tokens=(), **setting.options)
        assert len(output.tokens) == 4


def test_the_machine_and_its_memory():
    facts = benchmark.machine()
    assert facts["threads"] == torch.get_num_threads() and facts["memory_gib"] > 0.1
    if platform.machine() == "x86_64":
        assert int(facts["cpu_family"]) > 0 and facts["processor"] in Path("/proc/cpuinfo").read_text()
    assert 50e6 < benchmark.peak_memory_bytes(torch.device("cpu")) < facts["memory_gib"] * 2**30
