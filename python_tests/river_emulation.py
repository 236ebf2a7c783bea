"""Builds the kernels for the emulated GPU (cuda/emulation/) into build/emulation/<variant>/, for the tests.

The same loop as the extension's, so only what changed is compiled again; not part of the package.
"""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import river_native

# Contraction is off, as nvcc contracts in other places: what needs certain bits says so by intrinsics.
FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-function", "-DRIVER_EMULATION"]
VARIANTS = {
    "plain": ["-O2"],
    "sanitized": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}
PYTHON_SOURCES = ("module.cpp", "op_calls.cpp")  # they include pybind11


def find_pybind11(torch):
    """Its own package where there is one, else the copy that torch brings along."""
    spec = importlib.util.find_spec("pybind11")
    return Path(spec.origin).parent / "include" if spec else torch.path / "include"


def build(root, variant="plain", say=lambda text: print(text, flush=True)):
    """Compiles the variant where needed and returns the module's path. Raises river_native.BuildError."""
    csrc, emulation = root / "csrc", root / "python_tests" / "cuda" / "emulation"
    folder = root / "build" / "emulation"
    cxx = [*river_native.find_cxx(), *FLAGS, f"-I{csrc}", f"-I{emulation.parent}"]
    includes = [find_pybind11(river_native.find_torch()), river_native.find_python_headers()]
    units = []
    for source in sorted([*emulation.glob("*"), *csrc.glob("cuda/*.cu")]):
        if source.suffix not in (".cpp", ".cu"):
            continue
        name = f"{source.parent.name}_{source.name}.o"
        if source.name in PYTHON_SOURCES:  # slow to compile, nothing to find there: once, for all variants
            flags, target = ["-O0", *(f"-isystem{path}" for path in includes)], folder / name
        else:
            flags, target = VARIANTS[variant], folder / variant / name
        units.append(river_native.Unit(source, target, [*cxx, *flags, "-x", "c++", "-c", str(source)]))
    module = folder / variant / f"river_emulation{sysconfig.get_config_var('EXT_SUFFIX')}"
    link = [*cxx, *VARIANTS[variant], "-shared", *(str(unit.object) for unit in units)]
    with river_native.alone_in(folder):
        river_native.make_library(module, units, link, lambda stale: river_native.compile_all(stale, say))
    return module


def load(module):
    spec = importlib.util.spec_from_file_location("river_emulation", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def sanitizer_environment():
    """What a Python process needs to load the sanitized variant: runtimes come first, Python may leak."""
    runtimes = [
        subprocess.run(
            [*river_native.find_cxx(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    try:
        for name in sys.argv[1:] or VARIANTS:
            print(build(root, name))
    except river_native.BuildError as error:
        sys.exit(f"emulation: {error}")
