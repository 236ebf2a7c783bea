"""The GPU benchmarks without a GPU: sums, arguments, refusals, and whole runs on a pretended one."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from blocks import int32

from bench.gpu import chain, check, peers, ring, sanitizer_cases, steps, suite_summary
from bench.gpu import kernels as kernels_script
from bench.lib import clocks, gpu, models, records, variants
from bench.lib.peers import TorchStep
from bench.lib.weights import random_network
from river_ext import ops
from river_ext.engine.cache import KVCache
from river_ext.engine.network import Place

SCRIPTS = [chain, check, kernels_script, peers, ring, sanitizer_cases, steps]


def names(modules):
    return [module.__name__ for module in modules]


# ---- what is counted --------------------------------------------------------------------------------


def test_floors_are_those_of_the_design():
    """Of an H100, whose ring is expected to read 3.0 TB/s; steps.py divides by what the ring really does."""
    expected = {("1B", 16): 835, ("8B", 32): 5050, ("8B", 4): 2120, ("8B", 0): 1700, ("1B", 3): 456}
    assert {(b.model, b.depth) for b in models.BUDGETS} == set(expected)
    for (model, depth), floor in expected.items():
        for factor in (1.0, 1.43):  # the ratio of a step is the same on a faster card
            time = gpu.Time(factor * 1.5 * floor, 0.1, 1)
            line = steps.step_fields(model, depth, 1024, 1, 3000 / factor, time)
            assert line["floor_us"] == pytest.approx(factor * floor, rel=5e-3)
            assert line["x_floor"] == pytest.approx(1.5, rel=5e-3) and 1 < line["goal"] < 1.2
    assert steps.step_fields("1B", 16, 32, 1, 3000, time)["goal"] is None


def test_bytes_of_layers_are_those_of_the_design():
    for model, dense, packed in (("8B", 436e6, 123e6), ("1B", 122e6, 34e6)):
        assert models.layer_bytes(models.CONFIGS[model]) == pytest.approx((dense, packed), rel=1e-2)
    assert models.exit_depths(models.CONFIGS["8B"]) == [32, 16, 8, 4, 3, 2, 1, 0]
    assert models.exit_depths(models.CONFIGS["1B"]) == [16, 8, 4, 3, 2, 1, 0]


def test_cycles_are_those_of_the_design():
    """8B with four drafts: 2.15 backbone passes for 4.35 tokens, of which one is the backbone's own."""
    config, budget = models.CONFIGS["8B"], models.CYCLE_BUDGET
    full = models.step_bytes(config, 32, 1024)
    assert models.cycle_bytes(config, 4, 1024) / full == pytest.approx(2.15, rel=5e-3)
    assert models.cycle_bytes(config, 0, 1024, 2) == models.step_bytes(config, 32, 1024, 2)
    assert models.tokens_of_cycle(4, 0.93) == pytest.approx(4.347, rel=1e-3)
    assert models.tokens_of_cycle(7, 1.0) == 8 and models.tokens_of_cycle(7, 0.0) == 1
    cycle, step = (gpu.Time(passes * full / 3e6, 0.1, 1) for passes in (2.15, 1))
    line = steps.cycle_fields("8B", 4, 1, 3000, cycle, cycle, step)
    assert line["x_floor"] == pytest.approx(1.0, rel=5e-3) and line["goal"] == 1.06
    assert line["x_full"] == {"0.8": pytest.approx(1.563, rel=1e-3), "0.93": pytest.approx(2.022, rel=1e-3)}
    assert line["goal_x_full"] == {"0.93": budget.speed_up} and budget.acceptance in steps.ACCEPTANCES
    assert steps.cycle_fields("8B", 4, 2, 3000, cycle, cycle, step)["goal"] is None


def test_rows_on_both_paths_read_both_layers():
    config = models.CONFIGS["1B"]
    dense, packed = (models.step_bytes(config, depth, 1024, 8) for depth in (16, 0))
    assert models.mixed_bytes(config, 16, 1024, 8) == dense
    twice = models.mixed_bytes(config, 0, 1024, 8) - dense - packed
    assert twice == -models.step_bytes(config, 0, 1024, 8) + 16 * models.layer_bytes(config)[1]


def test_time_is_the_median_of_both_series():
    time = gpu.time_of([10.0, 11.0, 30.0], [12.0, 12.0, 13.0], launches=2)
    assert time.us == 6.0 and time.spread_percent == pytest.approx(100 / 11)


def test_intercept():
    assert chain.intercept([(0, 3.0), (1, 5.0), (2, 7.0)]) == pytest.approx(3.0)


def test_checksums_of_the_ring():
    data = torch.randint(0, 256, (5 * 8192 + 48,), dtype=torch.uint8)
    expected = [0, 0, 0]
    for index, start in enumerate(range(0, data.numel(), 8192)):
        for word in data[start : start + 8192][: ring.TOUCHED].view(torch.int32).tolist():
            expected[index % 3] ^= word
    assert ring.checksums(data, 8192, 3) == expected


def test_ring_configurations_fit_an_sm():
    for stage, piece, depth, blocks in ring.configurations(227 * 1024):
        assert stage * depth * blocks < 227 * 1024 and stage % piece == 0 and depth <= 24
    assert {(9216, 9216, 8, 1), (16384, 1024, 2, 2)} <= set(ring.configurations(227 * 1024))


@pytest.mark.parametrize("dtype", check.MAGIC_LIMITS, ids=str)
def test_magic_error_sees_only_lost_sums(dtype):
    """A product that is exactly 0; sums rounded to the model dtype on the way must show."""

    def careless(x, packed, out_features):
        dense = ops.dequantize_w4(packed, out_features, x.shape[1], torch.float32)
        parts = (x[:, i : i + 64].float() @ dense[:, i : i + 64].T for i in range(0, x.shape[1], 64))
        return sum(part.to(dtype) for part in parts)

    limit = check.MAGIC_LIMITS[dtype]
    assert check.magic_error(2048, dtype, device="cpu") < limit
    assert check.magic_error(2048, dtype, careless, device="cpu") > limit


def test_torch_step_is_the_same_computation():
    config = replace(
        models.CONFIGS["1B"], hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=64,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, rotary_dim=16,
    )  # fmt: skip
    network = random_network(config, "cpu")
    step = TorchStep(network, rows=2, context=10)
    cache = KVCache(config, 2, 11, torch.bfloat16)
    cache.k.copy_(step.cache.k)
    cache.v.copy_(step.cache.v)
    place = Place(cache, int32([0, 1]), int32([10, 10]), network.rope(11))
    plain = ours = network.embed(step.tokens)
    for index, layer in enumerate(network.layers):
        plain = step.layer(index, plain)
        ours, _ = layer.block(ours, place)
        assert gpu.relative_error(plain, ours) < 2e-2
    step()
    assert step.tokens.shape == (2,)


# ---- arguments, refusals, files ---------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_help_and_refusal(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 0 and "--quick" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--quick"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        script.main()
    written = capsys.readouterr()
    assert end.value.code == 2 and written.out == ""
    assert written.err.startswith(f"{script.__name__}.py: no CUDA device") and written.err.count("\n") == 1


def test_refuses_an_extension_without_cuda(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        ops._C, "build_info", lambda: {"cuda": False, "cuda_note": "not built (RIVER_CUDA=0)"}
    )
    with pytest.raises(SystemExit):
        gpu.require_cuda()
    assert "river_ext has no CUDA kernels: not built (RIVER_CUDA=0)" in capsys.readouterr().err


def test_clocks_of_nvidia_smi():
    found = clocks.read("1980, 3201, 1980, 3201, 41, [N/A]\n")
    assert found["clocks_sm"] == 1980 and found["clocks_mem"] == 3201 and found["power_draw"] is None
    assert clocks.read("No devices were found") == {}


def test_a_peer_that_fails_is_not_run():
    lines = []
    report = kernels_script.Report(
        lambda record, text="", **fields: lines.append((record, fields)), 4000.0, [""]
    )
    for _ in range(2):
        assert report.attempt("peer", lambda: [][0]) is None
    peers = {"torch": gpu.Time(5.0, 0.1, 10), "triton": None}
    times = {"": gpu.Time(2.5, 0.1, 10), "late_trigger=0": gpu.Time(4.0, 0.1, 10)}
    report("linear", "1B o", 1, 8_000_000, times, peers)
    assert [record for record, _ in lines] == ["not run", "kernel", "kernel"]
    assert lines[0][1] == {"what": "peer", "reason": "list index out of range"}
    _, default = lines[1]
    assert default["gb_s"] == 3200 and default["percent_of_ceiling"] == 80 and default["variant"] == ""
    assert default["x_torch"] == 2 and default["x_triton"] is None
    assert lines[2][1]["variant"] == "late_trigger=0" and lines[2][1]["percent_of_ceiling"] == 50


MOST = "61 of 62 edges of a captured step are programmatic"


@pytest.mark.parametrize(
    "step, cycle, capability, ok, text",
    [
        (61, 40, (9, 0), True, f"{MOST}; 40 of 62 edges of a captured cycle are programmatic"),
        (0, 61, (9, 0), False, "0 of 62 edges of a captured step are programmatic: every kernel waits for "),
        (61, 0, (9, 0), False, f"{MOST}; 0 of 62 edges of a captured cycle are programmatic: every kernel"),
        (0, 0, (8, 0), True, "0 of 62 edges"),
        (61, None, (9, 0), True, f"{MOST}; cycle: not counted: no libcuda"),
        (None, 0, (9, 0), False, "step: not counted: no libcuda; 0 of 62 edges of a captured cycle are"),
    ],
)
def test_graphs_without_programmatic_edges(step, cycle, capability, ok, text):
    found = {
        name: {"not_run": "no libcuda"} if early is None else {"edges": 62, "programmatic": early}
        for name, early in (("step", step), ("cycle", cycle))
    }
    got = check.edges_found(found, capability)
    assert got["ok"] is ok and got["text"].startswith(text)


@pytest.mark.parametrize("bf16, fp16, ok", [(5e-6, 2e-5, True), (2.1e-5, 2e-5, True), (5e-5, 2e-5, False),
                                            (5e-6, 1e-3, False), (float("nan"), 2e-5, False)])  # fmt: skip
def test_magic_reports_its_figure(bf16, fp16, ok):
    found = check.magic_found({torch.bfloat16: bf16, torch.float16: fp16})
    assert found["ok"] is ok and f"bfloat16 {bf16:.1e} of at most 5.0e-05" in found["text"]


# ---- variants ---------------------------------------------------------------------------------------


@pytest.fixture
def switches(monkeypatch):
    """Three of the extension's switches, not all as they are by themselves."""
    state = {"late_trigger": 1, "early_attention": 0, "paired_steps": 1}

    def set_variant(name, value):
        before = state[name]
        state[name] = value
        return before

    monkeypatch.setattr(ops._C, "variants", lambda: dict(state))
    monkeypatch.setattr(ops._C, "set_variant", set_variant)
    return state


def designs(*arguments, **options):
    p = argparse.ArgumentParser()
    variants.add_argument(p, **options)
    return variants.designs(p.parse_args(arguments))


def test_every_variant_is_compared_unless_some_are_named(switches):
    assert designs() == ["", "late_trigger=0", "early_attention=1"]
    assert designs(whole_steps=True) == ["", "late_trigger=0", "early_attention=1", "paired_steps=0"]
    assert designs("--variants") == [""]
    assert designs("--variants", "late_trigger=0,1,2") == ["", "late_trigger=0", "late_trigger=2"]


@pytest.mark.parametrize("text, message", [
    ("trigger=0", "no variant 'trigger'; accepted: late_trigger, early_attention, paired_steps"),
    ("late_trigger", "'late_trigger' is not NAME=0,1"), ("late_trigger=0,x", "is not NAME=0,1"),
])  # fmt: skip
def test_variants_that_are_refused(switches, capsys, text, message):
    with pytest.raises(SystemExit):
        designs("--variants", text)
    assert message in capsys.readouterr().err


def test_a_design_is_set_while_it_is_captured_and_no_longer(switches):
    with variants.using("late_trigger=0"):
        assert switches == {"late_trigger": 0, "early_attention": 0, "paired_steps": 1}
    with pytest.raises(ZeroDivisionError), variants.using("early_attention=1"):
        raise ZeroDivisionError
    assert switches == {"late_trigger": 1, "early_attention": 0, "paired_steps": 1}


# ---- whole runs on a pretended GPU ------------------------------------------------------------------

SMALL = replace(
    models.TINY, hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1
)


class PretendedGraph:
    """What was captured runs again with each replay."""

    def __init__(self, run, switches):
        self.run, self.captured_with, self.replay = run, dict(switches), run


@pytest.fixture
def pretended_device(monkeypatch):
    """What the scripts ask of a device."""
    facts = SimpleNamespace(name="Pretended GPU", multi_processor_count=2, L2_cache_size=1, major=9, minor=0,
                            total_memory=2**30, shared_memory_per_block_optin=227 * 1024)  # fmt: skip
    monkeypatch.setattr(gpu, "require_cuda", lambda: torch.manual_seed(0))
    monkeypatch.setattr(torch, "set_default_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "driver", lambda: None)
    monkeypatch.setattr(clocks, "streaming_graph", lambda: None)
    monkeypatch.setattr(clocks, "under_load", lambda graph: {})
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "WORKING_SET", 1)
    monkeypatch.setattr(gpu, "GRAPH_BYTES", 1)


@pytest.fixture
def pretended_gpu(monkeypatch, tmp_path, switches, pretended_device):
    """The scripts as they are, but for the calls that need a device: the ops run on the CPU."""
    monkeypatch.setenv("RIVER_RECORDS", str(tmp_path / "gpu.jsonl"))

    def capture(run, keep_graph=False):
        run()
        return PretendedGraph(run, switches)

    def replay_us(graph, repeats):
        for _ in range(repeats):
            graph.replay()
        design = getattr(
            graph, "graph", graph
        ).captured_with  # steps.py replays a graph several times for once
        return [900.0 + 90.0 * (1 - design["late_trigger"])] * repeats

    def read_ring(data, sums, stage, piece, stages, blocks):
        sums[: 2 * blocks] = torch.tensor(ring.checksums(data, stage, 2 * blocks), dtype=torch.int32)

    monkeypatch.setattr(gpu, "capture", capture)
    monkeypatch.setattr(gpu, "replay_us", replay_us)
    monkeypatch.setattr(ring, "read_ring", read_ring)
    monkeypatch.setattr(ring, "random_bytes", lambda size: torch.zeros(1 << 14, dtype=torch.uint8))
    monkeypatch.setattr(models, "CONFIGS", {"1B": SMALL, "8B": SMALL})
    for module in (steps, kernels_script, peers):
        monkeypatch.setattr(module, "CONFIGS", models.CONFIGS)
    monkeypatch.setattr(steps, "EARLY", 1)
    network = random_network
    for module in (steps, kernels_script, peers, check):
        monkeypatch.setattr(module, "random_network", lambda config: network(config, "cpu"))

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
        script.main()
        return records.read(tmp_path / "gpu.jsonl")

    return run


def test_steps_run(pretended_gpu, monkeypatch, capsys):
    """Every line is saved; the budgets come first; a variant is timed in turns with the default."""
    budgets = [models.Budget("1B", 3, 1.08, "none"), models.Budget("8B", 0, 1.08, "none")]
    monkeypatch.setattr(steps, "BUDGETS", budgets)
    monkeypatch.setattr(steps, "exit_depths", lambda config: [3, 1, 0])
    monkeypatch.setattr(steps, "CONTEXT", 40)
    monkeypatch.setattr(steps, "generate_us", lambda *arguments, **options: 1000.0)
    lines = pretended_gpu(steps, "--contexts", "40", "60", "--rows", "1", "2", "--repeats", "2")
    found = [line for line in lines if line["record"] == "step"]
    first = [(line["model"], line["depth"], line["variant"]) for line in found[:8]]
    designs = ["", "late_trigger=0", "early_attention=1", "paired_steps=0"]
    assert first == [("1B", 3, design) for design in designs] + [("8B", 0, design) for design in designs]
    assert [line["device"]["us"] for line in found[:4]] == [450, 495, 450, 450] and found[1][
        "beside_us"
    ] == 450
    rest = {(line["model"], line["context"], line["rows"], line["depth"]) for line in found[8:]}
    assert len(found) - 8 == len(rest) == 2 * 2 * 2 * 3 - 2  # all but the two that the budgets asked for
    assert found[0]["ceiling_gb_s"] == next(line["gb_s"] for line in lines if line["record"] == "ceiling")
    assert sum(line["record"] == "generate" for line in lines) == 4
    assert "late_trigger=0, % time: 1B depth 3 +10.0, 8B depth 0 +10.0" in capsys.readouterr().out
    assert "late_trigger=0: +10.0 % time" in suite_summary.summary(lines).splitlines()[1]
    assert [line for line in lines if line["record"] == "not run"] == []
    cycles = [line for line in lines if line["record"] == "cycle"]
    cases = [(1, 1), (1, 2), (1, 3), (1, 4), (1, 7), (2, 3)]
    found = [(line["model"], line["requests"], line["drafts"]) for line in cycles]
    assert found == [(model, *case) for model in ("1B", "8B") for case in cases]
    assert {line["cycle"]["us"] for line in cycles} == {900} and {line["full"]["us"] for line in cycles} == {
        450
    }
    mixed = [
        (line["model"], line["depth"], line["mixed"]["us"]) for line in lines if line["record"] == "mixed"
    ]
    assert mixed == [("1B", 1, 450), ("8B", 1, 450)]


def test_a_step_at_other_depths_is_no_result(pretended_gpu):
    step = steps.Step(random_network(SMALL, "cpu"), 4, 40)
    step.set_depths([1, 3, 0, 2])
    step.graph.replay()
    step.check([1, 3, 0, 2])
    with pytest.raises(SystemExit, match="at depths \\[1, 3, 0, 2\\], not 2 at \\[1, 3, 2, 0\\]"):
        step.check([1, 3, 2, 0])


def test_a_cycle_that_ends_early_is_no_result(pretended_gpu):
    """By a draft, or a request, that is none."""
    network = random_network(SMALL, "cpu")
    for drafts, wanted, slots, told in (
        (2, 1, [0, 1], "2 rows inactive"),
        (2, 2, [0, -1], "gave \\[[1-3], -1\\]"),
    ):
        one = steps.Cycle(network, 2, 40, drafts, repeats=2)
        for _ in range(2):
            one.runner.want([wanted] * 2)
            one.runner.slots.copy_(int32(slots))
            one.runner.verify_slots[:2] = int32(slots)
            one.graph.replay()
        with pytest.raises(SystemExit, match=told):
            one.check()
        one.reset()
        one.graph.replay()
        with pytest.raises(SystemExit, match="1 of 2 cycles"):
            one.check()
        one.graph.replay()
        one.check()


def test_cycles_are_told_in_the_summary():
    time, full = gpu.Time(11000.0, 0.1, 1), gpu.Time(5300.0, 0.1, 2)
    lines = [
        {
            "part": "steps",
            "record": "cycle",
            **steps.cycle_fields(model, drafts, requests, 3000, time, time, full),
        }
        for model in ("1B", "8B")
        for requests, choices in steps.CYCLES.items()
        for drafts in choices
    ]
    mixed = {"us": 3000.0}
    lines.append({"part": "steps", "record": "mixed", "model": "8B", "depth": 4, "rows": 8, "x_floor": 1.1}
                 | dict.fromkeys(("mixed", "dense", "packed"), mixed))  # fmt: skip
    lines.append(
        {"part": "steps", "record": "not run", "model": "8B", "what": "lossless cycles", "reason": "no"}
    )
    said = suite_summary.summary(lines)
    assert "| 8B, 4 x 1 | 10855 | 11000 | 1.013 (1.06 met) | 11000 | 5300 | 1.62 | 2.09 (1.9 met) |" in said
    assert "MISSED" not in said and "more lines in the log" not in said
    assert "8B T=8, half leave at 4: 3000 us, 1.10 x floor; all dense 3000, packed 3000" in said
    assert "failures: 1\n8B lossless cycles: no" in said
    late = gpu.Time(11700.0, 0.1, 1)
    slow = steps.cycle_fields("8B", 4, 1, 3000, late, late, full)
    said = suite_summary.summary([{"part": "steps", "record": "cycle", **slow}])
    assert "1.078 (1.06 MISSED)" in said and "(1.9 met)" in said


def test_a_quick_run_of_steps(pretended_gpu, monkeypatch):
    monkeypatch.setattr(
        steps, "BUDGETS", [models.Budget("1B", 3, 1.08, "none"), models.Budget("1B", 1, 1.15, "none")]
    )
    monkeypatch.setattr(steps, "CONTEXT", 40)
    lines = pretended_gpu(steps, "--quick", "--repeats", "2", "--variants", "late_trigger=0,1")
    found = [(line["depth"], line["variant"]) for line in lines if line["record"] == "step"]
    assert found == [(3, ""), (1, ""), (3, "late_trigger=0"), (1, "late_trigger=0")]


def test_a_design_that_fails_costs_no_other_line(pretended_gpu, monkeypatch):
    made = steps.Step.__init__

    def fail(step, network, rows, context, design=""):
        if design == "late_trigger=0":
            raise RuntimeError("kernel linear: invalid argument")
        made(step, network, rows, context, design)

    monkeypatch.setattr(steps, "BUDGETS", [models.Budget("1B", 3, 1.08, "none")])
    monkeypatch.setattr(steps, "CONTEXT", 40)
    monkeypatch.setattr(steps.Step, "__init__", fail)
    lines = pretended_gpu(steps, "--quick", "--repeats", "2")
    assert [line["variant"] for line in lines if line["record"] == "step"] == [
        "", "early_attention=1", "paired_steps=0",
    ]  # fmt: skip
    assert "1B late_trigger=0: kernel linear: invalid argument" in suite_summary.summary(lines)


def test_generate_is_timed(pretended_gpu, monkeypatch):
    monkeypatch.setattr(steps, "TOKENS", (3, 6))
    network = random_network(SMALL, "cpu")
    for depth in (3, 1, 0):
        for control in ("host", "device"):
            assert isinstance(steps.generate_us(network, depth, 20, control, repeats=1), float)


def test_chains_run(pretended_gpu, monkeypatch):
    monkeypatch.setattr(chain, "SIZES", (128, 192, 256))
    monkeypatch.setattr(chain, "TINY", 2)
    lines = pretended_gpu(chain, "--quick", "--repeats", "2")
    found = [
        (line["kernel"], line["size"], line["mode"], line["variant"])
        for line in lines
        if line["record"] == "chain"
    ]
    assert (
        len(found) == len(set(found)) == 2 * (2 * (2 + 3) + 1)
    )  # sizes x (kernels x (modes, designs) and torch)
    assert {line["record"] for line in lines} == {"start", "ceiling", "chain", "intercept", "tiny", "clocks"}


def test_kernels_run(pretended_gpu, monkeypatch, capsys):
    shapes = {"1B o": (128, 128), "8B o": (128, 192)}
    monkeypatch.setattr(kernels_script, "LAYER_SHAPES", shapes)
    monkeypatch.setattr(kernels_script, "SMALL", 2)
    monkeypatch.setattr(kernels_script, "int4_weights", lambda n, k: [][0])
    lines = pretended_gpu(kernels_script, "--rows", "1", "2", "--contexts", "40", "--repeats", "2")
    found = [line for line in lines if line["record"] == "kernel"]
    kinds = {(line["kernel"], line["rows"]) for line in found}
    names = [
        "linear",
        "linear_w4",
        "decoder_block",
        "exit_layer",
        "lm_head",
        "lm_head_w4",
        "decode_attention",
        "state_similarity",
    ]
    assert kinds == {(name, rows) for name in names for rows in (1, 2)} | {("decode_attention", 5)}
    assert {line["variant"] for line in found} == {"", "late_trigger=0", "early_attention=1"}
    assert any(line["record"] == "not run" and line["what"] == "torch int4" for line in lines)
    assert sum("% of the ring" in line for line in suite_summary.summary(lines).splitlines()) == len(kinds)


def test_checks_run(pretended_gpu, monkeypatch):
    """One by name, as the suite asks; what fails is said, and the rest goes on."""
    early = iter([8, 0])  # a step's, a cycle's
    monkeypatch.setattr(check, "programmatic_edges", lambda graph: {"edges": 9, "programmatic": next(early)})
    monkeypatch.setattr(check, "magic_error", lambda k, dtype: 4e-6)
    monkeypatch.setattr(ring, "copy_gb_s", lambda repeats: 2900.0)
    with pytest.raises(SystemExit, match="check: failed: edges$"):
        pretended_gpu(check, "edges", "magic", "ring")
    lines = pretended_gpu(check, "magic")
    found = [(line["check"], line["ok"]) for line in lines if line["record"] == "check"]
    assert found == [("edges", False), ("magic", True), ("ring", True), ("magic", True)]


def test_an_unknown_check_is_refused(pretended_gpu, capsys):
    with pytest.raises(SystemExit):
        pretended_gpu(check, "boundary")
    assert "no check 'boundary'; accepted: edges, runtime, stream, magic, ring" in capsys.readouterr().err


def test_the_ring_runs(pretended_gpu, monkeypatch):
    monkeypatch.setattr(ring, "copy_gb_s", lambda repeats: 2900.0)
    lines = pretended_gpu(ring, "--quick", "--repeats", "2")
    assert {line["record"] for line in lines} == {
        "start", "sweep", "ceiling", "half an SM", "copy", "size", "clocks"
    }  # fmt: skip


def test_peers_run(pretended_gpu, monkeypatch):
    monkeypatch.setattr(peers, "in_time", lambda *arguments: {"not_run": "no result within 1 s"})
    lines = pretended_gpu(peers, "--contexts", "8", "--repeats", "2")
    found = {line["peer"]: line.get("us") for line in lines if line["record"] == "peer"}
    assert found == {"torch, cuBLAS, CUDA graph": 900.0, "transformers, compiled": None, "vLLM": None}


def test_the_peer_of_transformers_runs_uncompiled(pretended_gpu, monkeypatch):
    """All but the compiler: the call of each of its parts."""
    pytest.importorskip("transformers.models.llama.modeling_llama")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(peers, "STEPS", 2)
    monkeypatch.setattr(peers, "WARM", 1)
    assert peers.transformers_step("1B", 8, 1)["us"] > 0


def test_the_peer_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert peers.vllm_step("1B", 8, 1) == {"not_run": "vllm is not installed"}


def test_the_peer_of_vllm_is_timed(pretended_gpu, monkeypatch):
    """All but vLLM: a token's time is that of the tokens that a longer run has more."""
    pytest.importorskip("transformers")
    clock = [0.0]

    class LLM:
        def __init__(self, folder, **options):
            assert "LlamaForCausalLM" in (Path(folder) / "config.json").read_text()
            assert options["load_format"] == "dummy" and options["max_model_len"] == 8 + 2 * peers.STEPS

        def generate(self, prompt, options, use_tqdm):
            clock[0] += 1 + 0.002 * options["max_tokens"]  # 2 ms a token, and what starts a run

    vllm = SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options, __version__="0")
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(peers.time, "perf_counter", lambda: clock[0])
    assert peers.vllm_step("1B", 8, 2)["us"] == pytest.approx(2000)


def test_sanitizer_cases_run(pretended_gpu, monkeypatch, capsys):
    for name in ("cuda", "pin_memory"):
        monkeypatch.setattr(torch.Tensor, name, lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(sanitizer_cases, "int32", lambda *values: torch.tensor(values, dtype=torch.int32))
    monkeypatch.setattr(sanitizer_cases, "read_ring", lambda: None)
    monkeypatch.setattr(sanitizer_cases, "random_network", lambda config: random_network(config, "cpu"))
    monkeypatch.setattr(gpu, "require_cuda", lambda warm: None)
    pretended_gpu(sanitizer_cases)
    assert capsys.readouterr().out.splitlines()[-1] == sanitizer_cases.DONE
