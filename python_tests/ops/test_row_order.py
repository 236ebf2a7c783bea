"""The row orders of packed weights are written twice, in csrc/row_order.h and in w4.py: they are the same."""

import shutil
import subprocess
from pathlib import Path

import pytest

from river_ext.quant import w4

# (heads, kv heads, head_dim, rotary_dim, intermediate_size): usual, odd sizes, partial rotary, none
SHAPES = [(4, 2, 64, 64, 128), (3, 1, 6, 6, 100), (4, 2, 16, 6, 24), (3, 3, 10, 2, 7), (5, 1, 22, 0, 9)]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("row_order") / "row_order"
    source = Path(__file__).with_name("row_order.cpp")
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["c++", *flags, str(source), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_and_packing_agree_on_the_orders(program, shape):
    arguments = [str(size) for size in shape]
    lines = subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout
    qkv, gate_up = ([int(row) for row in line.split()] for line in lines.splitlines())
    assert qkv == w4.qkv_order(w4.BlockShape(64, *shape)).tolist()
    assert gate_up == w4.gate_up_order(shape[-1]).tolist()
