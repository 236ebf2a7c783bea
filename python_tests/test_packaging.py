"""The build as a user meets it: one clear sentence for whatever is missing, and no work done twice."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_backend"))

import river_backend  # noqa: E402
import river_native  # noqa: E402

CPU_TORCH = river_native.Torch(Path("/nowhere"), "2.13.0+cpu", "")
CUDA_TORCH = river_native.Torch(Path("/nowhere"), "2.11.0+cu130", "13.0")
A_CUDA_SOURCE = {"cuda": [Path("x.cu")]}


@pytest.fixture
def no_nvcc(monkeypatch):
    monkeypatch.delenv("RIVER_CUDA", raising=False)
    monkeypatch.setattr(river_native, "find_nvcc", lambda: None)


@pytest.fixture
def nvcc(monkeypatch):
    monkeypatch.delenv("RIVER_CUDA", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(river_native, "find_nvcc", lambda: "/opt/bin/nvcc")


def test_forced_cuda_without_nvcc_is_one_sentence(no_nvcc, monkeypatch):
    monkeypatch.setenv("RIVER_CUDA", "1")
    with pytest.raises(river_native.BuildError, match="no nvcc was found") as error:
        river_native.decide_cuda({"cuda": []}, CPU_TORCH)
    assert "\n" not in str(error.value)


def test_cuda_switch_takes_0_and_1(no_nvcc, monkeypatch):
    monkeypatch.setenv("RIVER_CUDA", "yes")
    with pytest.raises(river_native.BuildError, match="RIVER_CUDA=yes"):
        river_native.decide_cuda(A_CUDA_SOURCE, CPU_TORCH)
    monkeypatch.setenv("RIVER_CUDA", "0")
    assert not river_native.decide_cuda(A_CUDA_SOURCE, CUDA_TORCH).on


def test_cuda_needs_torch_with_cuda_unless_forced(nvcc, monkeypatch):
    assert "torch 2.13.0+cpu has no CUDA" in river_native.decide_cuda(A_CUDA_SOURCE, CPU_TORCH).note
    assert river_native.decide_cuda(A_CUDA_SOURCE, CUDA_TORCH).on
    monkeypatch.setenv("RIVER_CUDA", "1")
    assert river_native.decide_cuda(A_CUDA_SOURCE, CPU_TORCH).on


def test_missing_nvcc_is_said_not_silent(no_nvcc):
    decision = river_native.decide_cuda(A_CUDA_SOURCE, CUDA_TORCH)
    assert not decision.on and "no nvcc was found" in decision.note


def test_architectures(nvcc, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0+PTX")
    decision = river_native.decide_cuda(A_CUDA_SOURCE, CUDA_TORCH)
    assert decision.archs == "8.6;9.0+PTX"
    assert river_native.gencode(decision.archs) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    with pytest.raises(river_native.BuildError, match="'Hopper'"):
        river_native.gencode("8.0;Hopper")


def test_building_without_torch_is_one_sentence():
    """`-S -I` hides site-packages, the environment's own included, as in one where nothing is installed."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'build_backend')!r}); import river_backend as b; "
        "b.expose_environment = lambda: None; b.prepare_metadata_for_build_wheel('nowhere')"
    )
    done = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "torch>=2.11" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_old_torch_is_refused(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1+cpu'\ncuda = None\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(river_native.BuildError, match=r"torch >= 2.11 is needed, found 2.9.1\+cpu"):
        river_native.find_torch()


def test_backend_asks_only_for_what_is_missing(monkeypatch):
    installed = {"setuptools": (65, 5), "torch": (2, 10)}
    monkeypatch.setattr(river_backend, "version_of", installed.get)
    assert river_backend.missing(river_backend.NEEDED) == ["torch>=2.11", "wheel"]
    installed |= {"setuptools": (80, 0), "torch": (2, 12)}
    assert river_backend.missing(river_backend.NEEDED) == []


def test_every_source_file_is_listed():
    sources = river_native.read_sources(ROOT)
    listed = {path for kind in ("ops", "kernels", "plain", "cuda") for path in sources[kind]}
    folders = (ROOT / "csrc", ROOT / "csrc" / "cpu")
    present = {path for folder in folders for suffix in ("*.cpp", "*.cu") for path in folder.glob(suffix)}
    assert listed == present
    assert next(iter(sources["isa"])) == "portable" and not sources["isa"]["portable"]


def test_kernels_leak_no_code_for_one_instruction_set():
    """An inline function that objects share exists once in the program: it must be nobody's vector code."""
    objects = sorted((ROOT / "build" / "native").glob("cpu_kernels.cpp.*.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("needs the objects of a build, and nm")
    for path in objects:
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        assert not re.findall(r"^.* [VWu] .*$", symbols, re.M), path.name


def test_pybind11_and_torch_meet_in_no_file():
    """The pybind11 headers that torch 2.11 brings refuse to be included after TORCH_TARGET_VERSION."""
    sources = [path.read_text() for path in (ROOT / "csrc").glob("*.cpp")]
    module = [text for text in sources if "#include <pybind11/" in text]
    assert len(module) == 1 and not re.search(r'#include ("ops_|<torch/)', module[0])


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_changed_header_recompiles_and_nothing_else_does(tmp_path):
    source, header = tmp_path / "a file.cpp", tmp_path / "a.h"
    header.write_text("inline int f() { return 1; }\n")
    source.write_text('#include "a.h"\nint g() { return f(); }\n')
    unit = river_native.Unit(source, tmp_path / "a.o", ["c++", "-c", str(source)])
    assert not river_native.up_to_date(unit)
    river_native.compile_all([unit], lambda text: None)
    assert river_native.up_to_date(unit)
    later = (tmp_path / "a.o").stat().st_mtime + 1
    os.utime(header, (later, later))
    assert not river_native.up_to_date(unit)
    river_native.compile_all([unit], lambda text: None)
    os.utime(header, (0, 0))
    assert river_native.up_to_date(unit)
    unit.command.append("-O1")
    assert not river_native.up_to_date(unit)


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_compile_error_shows_what_the_compiler_says(tmp_path):
    (tmp_path / "bad.cpp").write_text("int f() { return missing_name; }\n")
    unit = river_native.Unit(
        tmp_path / "bad.cpp", tmp_path / "bad.o", ["c++", "-c", str(tmp_path / "bad.cpp")]
    )
    with pytest.raises(river_native.BuildError, match="missing_name"):
        river_native.compile_all([unit], lambda text: None)
    assert not river_native.up_to_date(unit)


def test_jobs(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert river_native.job_count() == 3
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(river_native.BuildError, match="MAX_JOBS=many"):
        river_native.job_count()


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a build reads, but for the sources of the extension."""
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("river_ext", "river_cli", "build_backend"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def run_setup(checkout, *commands):
    subprocess.run(
        [sys.executable, "setup.py", "-q", *commands], cwd=checkout, check=True, capture_output=True
    )


def test_builds_write_into_the_folder_build_alone(checkout):
    before = {path.name for path in checkout.iterdir()}
    run_setup(checkout, "egg_info", "build_py")
    assert {path.name for path in checkout.iterdir()} - before == {"build"}
    assert list((checkout / "build").rglob("entry_points.txt"))


def test_a_module_that_has_gone_is_in_no_wheel(checkout):
    (checkout / "river_ext" / "gone.py").touch()
    run_setup(checkout, "build_py")
    (built,) = (checkout / "build").rglob("gone.py")
    (checkout / "river_ext" / "gone.py").unlink()
    run_setup(checkout, "build_py")
    assert not built.exists() and (built.parent / "model.py").exists()
    assert (built.parent.parent / "river_cli" / "arguments.py").exists()
