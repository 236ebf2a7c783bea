"""The build as a user meets it: one clear sentence for whatever is missing, and no work done twice."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

import river_backend  # noqa: E402
import river_emulation  # noqa: E402
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


def test_cuda_files_are_compiled_first(monkeypatch):
    """Each takes longer than all else together on a machine of many cores."""
    monkeypatch.setattr(river_native, "cuda_folders", lambda nvcc: ([], []))
    sources = river_native.read_sources(ROOT)
    cuda = river_native.Cuda(True, "", "/opt/bin/nvcc", "9.0")
    units, _ = river_native.plan(ROOT, "0", CUDA_TORCH, cuda, sources)
    assert [unit.source for unit in units][: len(sources["cuda"])] == sources["cuda"]


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


@pytest.mark.parametrize("arch", ["7.5", "6.1", "7.0+PTX", "7.9a"])
def test_architectures_that_the_kernels_cannot_be_compiled_for_are_refused_by_name(arch):
    """Else ptxas would say it, in a page of messages for every file."""
    for archs in (arch, f"9.0;{arch}"):
        with pytest.raises(river_native.BuildError, match=re.escape(f"{arch!r} is too old")) as error:
            river_native.gencode(archs)
        assert "sm_80" in str(error.value) and "\n" not in str(error.value)
    assert river_native.gencode("8.0;10.0;12.0+PTX")[1] == "-gencode=arch=compute_100,code=sm_100"


def test_too_old_an_architecture_ends_the_build_before_it_begins(tmp_path):
    """Through the entry that pip and the suite use; nothing is compiled."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho '#$ INCLUDES=\"-I/none\"' >&2\n")
    nvcc.chmod(0o755)
    environment = os.environ | {
        "RIVER_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "7.5",
        "PATH": f"{tmp_path}:/usr/bin:/bin",
    }
    environment.pop("CUDA_HOME", None)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "river_ext: TORCH_CUDA_ARCH_LIST: '7.5' is too old" in done.stderr


def test_architectures_by_default(nvcc):
    """Machine code for the chips that are tested, and PTX of plain compute_90 for those to come."""
    flags = river_native.gencode(river_native.decide_cuda(A_CUDA_SOURCE, CUDA_TORCH).archs)
    machine_code = ["80", "86", "89", "90a"]
    assert flags[:-1] == [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in machine_code]
    assert flags[-1] == "-gencode=arch=compute_90,code=compute_90"


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
    folders = [ROOT / "csrc" / name for name in ("ops", "cpu", "cpu/isa", "cuda")]
    present = {path for folder in folders for suffix in ("*.cpp", "*.cu") for path in folder.glob(suffix)}
    assert listed == present
    assert next(iter(sources["isa"])) == "portable" and not sources["isa"]["portable"]


def test_kernels_leak_no_code_for_one_instruction_set():
    """An inline function that objects share exists once in the program: it must be nobody's vector code."""
    objects = sorted((ROOT / "build" / "native").glob("cpu_isa_kernels.cpp.*.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("needs the objects of a build, and nm")
    for path in objects:
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        assert not re.findall(r"^.* [VWu] .*$", symbols, re.M), path.name


def test_pybind11_and_torch_meet_in_no_file():
    """The pybind11 headers that torch 2.11 brings refuse to be included after TORCH_TARGET_VERSION."""
    sources = [path.read_text() for path in (ROOT / "csrc").rglob("*.cpp")]
    module = [text for text in sources if "#include <pybind11/" in text]
    headers = "|".join(path.stem for path in (ROOT / "csrc" / "ops").glob("*.h"))
    assert len(module) == 1 and not re.search(rf'#include ("({headers})\.h|<torch/)', module[0])


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_changed_header_recompiles_and_nothing_else_does(tmp_path):
    source, header = tmp_path / "a file.cpp", tmp_path / "a.h"
    header.write_text("inline int f() { return 1; }\n")
    source.write_text('#include "a.h"\nint g() { return f(); }\n')
    unit = river_native.Unit(source, tmp_path / "a.o", ["c++", "-c", str(source)])
    assert not river_native.up_to_date(unit)

    def compile_it():
        for path in (source, header):
            os.utime(path, (0, 0))  # not written while it is being compiled
        river_native.compile_all([unit], lambda text: None)
        assert river_native.up_to_date(unit)

    compile_it()
    for path in (source, header, unit.object):
        os.utime(path)  # a copy of the tree has new times and the same contents
    assert river_native.up_to_date(unit)
    later = time.time() + 1000  # by the clock of the machine that the copy is from
    for path in (source, header):
        os.utime(path, (later, later))
    river_native.compile_all([unit], lambda text: None)
    assert river_native.up_to_date(unit)
    header.write_text("inline int f() { return 2; }\n")
    os.utime(header, (1, 1))  # nor does an old time hide new contents
    assert not river_native.up_to_date(unit)
    compile_it()
    unit.command.append("-O1")
    assert not river_native.up_to_date(unit)


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_source_that_changes_while_it_is_compiled_is_compiled_again(tmp_path):
    source, compiler = tmp_path / "a.cpp", tmp_path / "slow"
    source.write_text("int f() { return 1; }\n")
    os.utime(source, (0, 0))
    compiler.write_text(f"#!/bin/sh\nc++ \"$@\" && echo 'int f() {{ return 2; }}' > {source}\n")
    compiler.chmod(0o755)
    unit = river_native.Unit(source, tmp_path / "a.o", [str(compiler), "-c", str(source)])
    river_native.compile_all([unit], lambda text: None)
    assert not river_native.up_to_date(unit)


EMULATION = {
    "python_tests/cuda/emulation/module.cpp": '#define SHOWN __attribute__((visibility("default")))\n'
    'extern "C" SHOWN int right() { return TWO; }\n',
    "python_tests/cuda/emulation/a.cpp": "int a() { return 1; }\n",
    "csrc/cuda/b.cu": "int b() { return 2; }\n",
}
RACE = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1].split(":")
import river_emulation
print("ready", flush=True)
sys.stdin.readline()
print(river_emulation.build(Path(sys.argv[2]), sys.argv[3], say=lambda text: None), flush=True)
"""


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_concurrent_builds_of_the_emulator(tmp_path, monkeypatch):
    """Six processes at once, as six workers of a test run are, of two variants that share an object."""
    for name, text in EMULATION.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text.replace("TWO", "2"))
        os.utime(tmp_path / name, (0, 0))
    compiler, log, pipe = tmp_path / "slow", tmp_path / "log", subprocess.PIPE
    compiler.write_text(f'#!/bin/sh\necho "$*" >> {log}\nsleep 0.2\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    path = f"{ROOT / 'build_backend'}:{ROOT / 'python_tests'}"
    command = [sys.executable, "-c", RACE, path, str(tmp_path)]
    racing = [
        subprocess.Popen([*command, variant], text=True, **dict.fromkeys(("stdin", "stdout", "stderr"), pipe))
        for variant in ("plain", "sanitized") * 3
    ]  # fmt: skip
    for process in racing:
        assert process.stdout.readline() == "ready\n"
    for process in racing:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=300) for process in racing]
    assert [process.returncode for process in racing] == [0] * 6, answers[0][1] + answers[1][1]
    calls = [line.split() for line in log.read_text().splitlines()]
    made = sorted(Path(call[call.index("-o") + 1]).name.split(".")[0] for call in calls)
    assert (
        made == ["cuda_b"] * 2 + ["emulation_a"] * 2 + ["emulation_module"] + ["river_emulation"] * 2
    )  # once each
    modules = {answer.strip() for answer, _ in answers}
    assert len(modules) == 2 and not list((tmp_path / "build").rglob("*.tmp"))
    assert ctypes.CDLL(min(modules)).right() == 2


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_an_object_that_another_build_made_anew_is_linked_anew(tmp_path, monkeypatch):
    """The emulator's variants share one: up to date is not the same as linked."""
    monkeypatch.setattr(river_emulation, "VARIANTS", {"plain": ["-O0"], "other": ["-O1"]})

    def write(value):
        for name, text in EMULATION.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text.replace("TWO", str(value)))
            os.utime(tmp_path / name, (value, value))

    def right(variant):
        module = river_emulation.build(tmp_path, variant, say=lambda text: None)
        code = f"import ctypes; print(ctypes.CDLL({str(module)!r}).right())"
        return int(
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        )

    write(2)
    assert (right("plain"), right("other")) == (2, 2)
    write(3)
    assert (right("plain"), right("other")) == (3, 3)


def test_collecting_tests_builds_no_emulator():
    """A compiler that does not exist would stop a build: those who only run GPU tests need none."""
    files = [
        "test_gpu.py",
        "test_cuda_kernels.py",
        "test_emulation.py",
        "test_emulated_step.py",
        "test_read_ring.py",
    ]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"CXX": "no-such-compiler", "RIVER_REQUIRE_CUDA": "1"}
    done = subprocess.run([*command, *(str(ROOT / "python_tests" / "cuda" / name) for name in files)],
                          env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert "[cuda-" in done.stdout and "error" not in done.stdout.splitlines()[-1]


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_compile_error_shows_what_the_compiler_says(tmp_path):
    (tmp_path / "bad.cpp").write_text("int f() { return missing_name; }\n")
    unit = river_native.Unit(
        tmp_path / "bad.cpp", tmp_path / "bad.o", ["c++", "-c", str(tmp_path / "bad.cpp")]
    )
    with pytest.raises(river_native.BuildError, match="missing_name"):
        river_native.compile_all([unit], lambda text: None)
    assert not river_native.up_to_date(unit)


def test_a_build_never_changes_a_module_that_is_in_use(tmp_path, monkeypatch):
    """A process that has the old module mapped would crash if its bytes changed."""
    root = tmp_path / "tree"
    native = root / "build" / "native"
    native.mkdir(parents=True)
    target = tmp_path / "_C.so"
    monkeypatch.setattr(river_native, "read_sources", lambda root: {"ops": ["x"], "isa": {}})
    monkeypatch.setattr(river_native, "find_torch", lambda: CPU_TORCH)
    monkeypatch.setattr(river_native, "decide_cuda", lambda *_: river_native.Cuda(False, "no"))
    for content in ("old", "new"):
        copy = f"import sys; open(sys.argv[2], 'w').write({content!r})"
        link = [sys.executable, "-c", copy]
        monkeypatch.setattr(river_native, "plan", lambda *_, link=link: ([], link))
        river_native.build(root, "1", target, say=lambda text: None)
        if content == "old":
            in_use = target.open()
    assert (in_use.read(), target.read_text()) == ("old", "new")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["_C.so"]


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


def test_what_is_no_module_is_in_the_wheel_too(checkout):
    run_setup(checkout, "build_py")
    (built,) = (path.parent for path in (checkout / "build").rglob("py.typed"))
    assert (built / "_C.pyi").exists() and (built / "demo_tasks" / "generator.py").exists()
    assert {path.name for path in (built / "demo").iterdir()} == {
        "MODEL_CARD.md", "config.json", "model.safetensors", "tokenizer.json"
    }  # fmt: skip
