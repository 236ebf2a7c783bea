"""The compile gate: what it must refuse, planted in small kernels, and what it says."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

import compile_gate  # noqa: E402
from compile_gate import river_native  # noqa: E402

needs_nvcc = pytest.mark.skipif(not river_native.find_nvcc(), reason="no nvcc")

KERNELS = """
#include "ROOT/csrc/cuda/device/types.cuh"
using namespace river::device;

// Budget: 64 threads, 32 registers
__global__ void __launch_bounds__(64) right_kernel(float* out) {
  dependency_wait();
  out[threadIdx.x] = 1;
}

__global__ void waitless_kernel(float* out) { out[threadIdx.x] = 1; }

__global__ void arriving_kernel(float* out, unsigned* counter) {
  dependency_wait();
  out[threadIdx.x] = 1;
  if (block_arrives_last(counter, gridDim.x)) out[threadIdx.x] = 2;
}

__global__ void hasty_kernel(float* out, unsigned* counter) {  // its write may come behind its arrival
  dependency_wait();
  gpu_fence();
  out[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) atomicInc(counter, gridDim.x - 1);
}

template <int N>
__global__ void local_kernel(float* out, int i) {  // an array indexed at run time lives in local memory
  dependency_wait();
  float values[N] = {};
  for (int j = 0; j < N; j++) values[(j * i + threadIdx.x) % N] += out[j];
  out[threadIdx.x] = values[i];
}
template __global__ void local_kernel<64>(float*, int);

// Budget: 1024 threads, 16 registers, 1000 shared, mma
__global__ void __launch_bounds__(1024)
greedy_kernel(float* out, int stride) {
  __shared__ float kept[1024];
  dependency_wait();
  kept[threadIdx.x] = out[threadIdx.x];
  float values[24];
#pragma unroll
  for (int j = 0; j < 24; j++) values[j] = out[j * stride + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 24; j++) out[(24 - j) * stride + threadIdx.x] = values[j] + kept[1023 - threadIdx.x];
}
"""


@pytest.fixture
def gate(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compile_gate, "BUILD", tmp_path)

    def run(*arguments):
        return compile_gate.main(list(map(str, arguments))), capsys.readouterr().out

    return run


@needs_nvcc
def test_planted_faults_are_refused(gate, tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(KERNELS.replace("ROOT", str(ROOT)))
    failed, out = gate(source, "--archs", "90a")
    failures = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert failed and not any("right_kernel" in line or "arriving_kernel" in line for line in failures)
    for kernel, complaint in [
        ("waitless_kernel", "no dependency_wait"),
        ("hasty_kernel", "1 atomicInc without a gpu_fence() before"),
        ("local_kernel<64>", "bytes of local memory"),
        ("greedy_kernel", "its budget is 16"),
        ("greedy_kernel", "static shared memory, its budget is 1000"),
        ("greedy_kernel", "two blocks per SM allow 32768"),
        ("greedy_kernel", "does not use the tensor cores"),
    ]:
        assert any(kernel in line and complaint in line for line in failures), (kernel, complaint)
    failed, again = gate(source, "--archs", "90a")
    assert failed and "planted " not in again, "compiled twice"


@needs_nvcc
def test_a_budget_without_its_kernel_is_refused(gate, tmp_path):
    source = tmp_path / "misplaced.cu"
    source.write_text("// Budget: 64 threads, 32 registers\n\n\nint nothing;\n")
    with pytest.raises(SystemExit, match="misplaced.cu: a budget is not followed by its kernel"):
        gate(source)


def test_without_nvcc_it_says_so(gate, monkeypatch):
    monkeypatch.setattr(river_native, "find_nvcc", lambda: None)
    failed, out = gate()
    assert not failed and out == "compile gate: skipped, no nvcc\n"
