"""The GPU benchmarks as far as they need no GPU: sums, files, arguments, refusals, the suite's driver."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blocks import int32

from river_ext import ops
from river_ext.cache import KVCache

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.append(str(BENCH))

import chain  # noqa: E402
import check  # noqa: E402
import gpu  # noqa: E402
import gpu_suite  # noqa: E402
import kernels as kernels_script  # noqa: E402
import models  # noqa: E402
import peers  # noqa: E402
import ring  # noqa: E402
import sanitizer_cases  # noqa: E402
import steps  # noqa: E402

SCRIPTS = [chain, check, kernels_script, peers, ring, sanitizer_cases, steps]


def names(modules):
    return [module.__name__ for module in modules]


# ---- what is counted --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", models.BUDGETS, ids=lambda b: f"{b.model}-{b.depth}")
def test_floors_are_those_of_the_design(budget):
    assert models.floor_us(models.CONFIGS[budget.model], budget.depth, 1024) == pytest.approx(
        budget.floor_us, rel=2e-3
    )
    assert budget.floor_us < budget.stage_b_us < budget.stage_a_us


def test_bytes_of_layers_are_those_of_the_design():
    for model, dense, packed in (("8B", 436e6, 123e6), ("1B", 122e6, 34e6)):
        assert models.layer_bytes(models.CONFIGS[model]) == pytest.approx((dense, packed), rel=1e-2)
    assert models.exit_depths(models.CONFIGS["8B"]) == [32, 16, 8, 4, 3, 2, 1, 0]
    assert models.exit_depths(models.CONFIGS["1B"]) == [16, 8, 4, 3, 2, 1, 0]


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
    network = models.random_network(config, "cpu")
    step = models.TorchStep(network, rows=2, context=10)
    cache = KVCache(config, 2, 11, torch.bfloat16)
    cache.k.copy_(step.cache.k)
    cache.v.copy_(step.cache.v)
    plain = ours = network.embed(step.tokens)
    for index in range(2):
        plain = step.layer(index, plain)
        ours, _ = network.decoder_block(index, ours, cache, int32([0, 1]), int32([10, 10]), network.rope(11))
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


def test_results_file(tmp_path):
    result = {"machine": {"device": "NVIDIA H200"}, "ring": [{"gb_s": 4000.5}]}
    path = gpu.write("ring", tmp_path / "new", result)
    assert path.name == "ring_nvidia_h200.json" and list(path.parent.iterdir()) == [path]
    assert json.loads(path.read_text()) == {"question": "ring"} | result
    with pytest.raises(ValueError, match="JSON compliant"):
        gpu.write("ring", tmp_path / "new", result | {"gb_s": float("nan")})
    assert json.loads(path.read_text()) == {"question": "ring"} | result


def test_clocks_of_nvidia_smi():
    clocks = gpu.read_clocks("1980, 3201, 1980, 3201, 41, [N/A]\n")
    assert clocks["clocks_sm"] == 1980 and clocks["clocks_mem"] == 3201 and clocks["power_draw"] is None
    assert gpu.read_clocks("No devices were found") is None


def test_a_peer_that_fails_is_not_run():
    report = kernels_script.Report(ceiling=4000.0)
    assert report.attempt("peer", lambda: [][0]) is None
    assert report.not_run == [{"what": "peer", "reason": "list index out of range"}]
    report(
        "linear",
        "1B o",
        1,
        8_000_000,
        gpu.Time(2.5, 0.1, 10),
        {"torch": gpu.Time(5.0, 0.1, 10), "triton": None},
    )
    (line,) = report.lines
    assert line["gb_s"] == 3200 and line["percent_of_ceiling"] == 80
    assert line["x_torch"] == 2 and line["x_triton"] is None


def test_budget_table():
    budget = models.BUDGETS[0]
    line = {"model": "1B", "depth": 16, "context": 1024, "rows": 1, "control_us": 8.0}
    line |= {"device": {"us": 700.0}, "kernels": {"us": 692.0}}
    row = steps.budget_line(budget, [line], {"host": 900.0, "device": 710.0})
    assert row["within_stage_a"] and row["host_control_us"] == 208 and row["device_us_context_32"] is None
    assert "| 1B, exit depth 16 | 583 | 720 | 700 | - | 692 | 900 | 710 |" in steps.table([row])
    empty = steps.budget_line(budget, [], {})
    assert empty["device_us"] is None and empty["within_stage_a"] is None
    json.dumps([row, empty], allow_nan=False)


# ---- the suite --------------------------------------------------------------------------------------


def suite_script(*arguments):
    command = ["bash", str(BENCH / "gpu_suite.sh"), *arguments]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_suite_script():
    assert subprocess.run(["bash", "-n", str(BENCH / "gpu_suite.sh")]).returncode == 0
    listed = suite_script("--list")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == gpu_suite.NAMES
    unknown = suite_script("benchmarks")
    assert unknown.returncode == 2 and "no part 'benchmarks'; accepted: build, check" in unknown.stderr


def test_suite_parts_are_shortest_first_and_fit():
    assert gpu_suite.NAMES[:2] == ["build", "check"]
    expected = [part.expected for part in gpu_suite.PARTS]
    assert expected[2:] == sorted(expected[2:]) and sum(expected) < gpu_suite.SECONDS < 540
    scripts = set(gpu_suite.NAMES) - {"build", "tests", "sanitizer"}
    assert all((BENCH / f"{name}.py").exists() for name in scripts)
    assert len(scripts) + 2 <= 8  # their files, the suite's own and its log


def test_suite_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "ask", lambda command: None)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.sh"])
    assert gpu_suite.main() == 2
    assert capsys.readouterr().err == "gpu_suite: no CUDA device: nvidia-smi names none here\n"


def test_suite_runs_stops_and_records(tmp_path):
    suite = gpu_suite.Suite(tmp_path, "NVIDIA H200", "9.0", quick=False, seconds=60)
    assert suite.outcome(*suite.run([sys.executable, "-c", "print('fine')"], 30)).status == gpu_suite.PASSED
    failed = suite.outcome(*suite.run([sys.executable, "-c", "raise SystemExit('no')"], 30))
    assert (failed.status, failed.reason) == (gpu_suite.FAILED, "exit 1: no")
    stopped = suite.outcome(*suite.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.5))
    assert (stopped.status, stopped.reason) == (gpu_suite.FAILED, "stopped at its time limit")
    suite.record({"ring": {"status": "passed"}, "build": {"status": "passed"}})
    suite.record({"ring": {"status": "failed"}})
    found = json.loads((tmp_path / "suite_nvidia_h200.json").read_text())
    assert found["device"] == "NVIDIA H200"
    assert found["parts"] == {"build": {"status": "passed"}, "ring": {"status": "failed"}}
    assert "fine" in (tmp_path / "suite_nvidia_h200.log").read_text()
    late = gpu_suite.Suite(tmp_path, "NVIDIA H200", "9.0", quick=False, seconds=5)
    assert late.part(gpu_suite.PARTS[-1]).reason == "no time left"


SUMMARY = "========= ERROR SUMMARY: "
RACES = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"
REFUSED = f"========= COMPUTE-SANITIZER\n========= Error: Device not supported\n{SUMMARY}1 error"
MISSING = "ModuleNotFoundError: No module named 'torch'"


@pytest.mark.parametrize(
    "status, output, expected, reason",
    [
        (0, f"all cases ran\n{SUMMARY}0 errors", "passed", None),
        (9, f"========= Invalid __global__ write\n{SUMMARY}3 errors", "failed", "3 errors"),
        (9, f"all cases ran\n{RACES}", "failed", "2 errors"),
        (1, REFUSED, "not run", "Error: Device not supported"),
        (None, "similarity", "not run", "stopped at its time limit"),
        (1, MISSING, "failed", MISSING),
        (0, f"{SUMMARY}0 errors", "failed", "no output"),
    ],
)
def test_sanitizer_outcomes(status, output, expected, reason):
    found = gpu_suite.read_sanitizer(status, output)
    assert (found["status"], found["reason"]) == (expected, reason)
