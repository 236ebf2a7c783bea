"""Compiles csrc/ into river_ext._C: one loop for the C++ and the CUDA compiler, incremental, in build/native.

`build()` is the entry, called by setup.py. Only the standard library, and torch is found but never imported:
a build without torch, compiler or nvcc ends in one sentence, a rebuild with nothing to do takes no time.
"""

import contextlib
import fcntl
import functools
import glob
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

MIN_TORCH = (2, 11)
MIN_CUDA_ARCH = (8, 0)  # bf16 mma and cp.async
DEFAULT_CUDA_ARCHS = "8.0;8.6;8.9;9.0+PTX"
BYTES_PER_JOB = 2 << 30  # a template-heavy C++ or CUDA file peaks near this


class BuildError(Exception):
    """What is missing or wrong, in one sentence."""


@dataclass
class Unit:
    """One compiler call: source -> object. `command` lacks only the output and dependency-file arguments."""

    source: Path
    object: Path
    command: list


# ---------------------------------------------------------------- what to build


def read_sources(root):
    """csrc/sources.txt as {kind: [paths]}, plus "flags": [...] and "isa": {name: [flags]}."""
    csrc = root / "csrc"
    found = {"flags": [], "isa": {}, "ops": [], "kernels": [], "plain": [], "cuda": []}
    for line in (csrc / "sources.txt").read_text().splitlines():
        kind, *rest = line.split("#")[0].split() or [""]
        if kind == "flags":
            found["flags"] += rest
        elif kind == "isa":
            found["isa"][rest[0]] = rest[1:]
        elif kind in found:
            found[kind] += [Path(p) for pattern in rest for p in sorted(glob.glob(str(csrc / pattern)))]
        elif kind:
            raise BuildError(f"csrc/sources.txt: unknown kind {kind!r}")
    found["plain"] = [p for p in found["plain"] if p not in found["kernels"] + found["ops"]]
    if platform.machine().lower() not in ("x86_64", "amd64"):
        found["isa"] = {"portable": []}
    return found


@dataclass
class Torch:
    path: Path
    version: str
    cuda: str  # "" for a CPU build


def find_torch():
    """The torch that this Python would import, read from its version.py: importing it would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(
            "torch is not installed here, and river_ext compiles against it: "
            'run `pip install "torch>=2.11"` first (a CPU build is enough)'
        )
    path = Path(next(iter(spec.submodule_search_locations)))
    facts = {}
    exec((path / "version.py").read_text(), facts)
    version = str(facts["__version__"])
    if tuple(int(n) for n in re.match(r"(\d+)\.(\d+)", version).groups()) < MIN_TORCH:
        raise BuildError(f"torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]} is needed, found {version} in {path}")
    return Torch(path, version, facts.get("cuda") or "")


def find_cxx():
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if not shutil.which(command[0]):
            raise BuildError(f"CXX={os.environ['CXX']}: no such program")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [shutil.which(name)]
    raise BuildError("no C++ compiler found (tried c++, g++, clang++): install g++ 11 or later, or set CXX")


def find_python_headers():
    folder = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(folder, "Python.h")):
        raise BuildError(f"Python.h is not in {folder}: install Python's headers (package python3-dev)")
    return folder


def find_nvcc():
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for candidate in [*(f"{home}/bin/nvcc" for home in homes[:2] if home), "nvcc", f"{homes[2]}/bin/nvcc"]:
        if shutil.which(candidate):
            return shutil.which(candidate)
    return None


@dataclass
class Cuda:
    """Whether the CUDA kernels are built, and why: `note` is for the user, here and in `river info`."""

    on: bool
    note: str
    nvcc: str = ""
    archs: str = ""


def decide_cuda(sources, torch):
    """No GPU is looked for: a build host often has none."""
    switch = os.environ.get("RIVER_CUDA", "")
    if switch not in ("", "0", "1"):
        raise BuildError(
            f"RIVER_CUDA={switch}: use 1 (build the CUDA kernels), 0 (leave them out), or unset it"
        )
    if switch == "0":
        return Cuda(False, "not built (RIVER_CUDA=0)")
    nvcc = find_nvcc()
    if switch == "1" and not nvcc:
        raise BuildError(
            "RIVER_CUDA=1, but no nvcc was found (looked in CUDA_HOME, PATH and /usr/local/cuda): "
            "install the CUDA toolkit, set CUDA_HOME, or unset RIVER_CUDA for a CPU build"
        )
    if not sources["cuda"]:
        return Cuda(False, "not built (this version has none)")
    if not switch and not torch.cuda:
        return Cuda(False, f"not built (torch {torch.version} has no CUDA; set RIVER_CUDA=1 to force)")
    if not nvcc:
        return Cuda(False, f"not built (torch has CUDA {torch.cuda}, but no nvcc was found; set CUDA_HOME)")
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS
    archs = ";".join(re.split(r"[;,\s]+", archs.strip(" ;,")))
    return Cuda(True, f"built for {archs} with {nvcc}", nvcc, archs)


def gencode(archs):
    """TORCH_CUDA_ARCH_LIST -> nvcc flags. 9.0 means sm_90a; PTX for later chips is of plain compute_90."""
    flags = []
    for arch in archs.split(";"):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if not match:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: {arch!r} is unknown (use numbers, as in 8.0;9.0+PTX)")
        if (int(match[1]), int(match[2])) < MIN_CUDA_ARCH:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: {arch!r} is too old: the kernels need 8.0 (sm_80) or newer"
            )
        number, suffix = match[1] + match[2], match[3]
        real = number + (suffix or ("a" if number == "90" else ""))
        flags.append(f"-gencode=arch=compute_{real},code=sm_{real}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_folders(nvcc):
    """Include and library folders as nvcc itself uses them: right for wrapper scripts and odd layouts too."""
    done = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    lines = dict(re.findall(r"^#\$ (INCLUDES|LIBRARIES)=(.*)$", done.stderr, re.M))
    include, libraries = (
        [flag[2:] for flag in shlex.split(lines.get(kind, ""))] for kind in ("INCLUDES", "LIBRARIES")
    )
    if done.returncode or not include:
        raise BuildError(f"{nvcc} does not work: {done.stderr.strip().splitlines()[-1:] or 'no output'}")
    return include, libraries


def define(**macros):
    """-D flags; text becomes a C string."""
    return [f"-D{name}=" + (str(v) if isinstance(v, int) else f'"{v}"') for name, v in macros.items()]


def plan(root, version, torch, cuda, sources):
    """All compiler calls and the linker call (which lacks only its output)."""
    objects = root / "build" / "native"
    cxx = find_cxx() + sources["flags"] + shlex.split(os.environ.get("CXXFLAGS", ""))
    units, link = [], []

    def add(source, command, tag=""):
        name = source.relative_to(root / "csrc").as_posix().replace("/", "_") + (f".{tag}" if tag else "")
        units.append(Unit(source, objects / f"{name}.o", [*command, "-c", str(source)]))

    includes = [torch.path / "include", find_python_headers()]  # torch's folder brings pybind11 along
    if pybind11 := importlib.util.find_spec("pybind11"):
        includes.insert(0, Path(pybind11.origin).parent / "include")
    facts = define(
        RIVER_VERSION=version,
        RIVER_TORCH_VERSION=torch.version,
        RIVER_CPU_ISAS=";".join(sources["isa"]),
        RIVER_WITH_CUDA=int(cuda.on),
        RIVER_CUDA_ARCHS=cuda.archs,
        RIVER_CUDA_NOTE=cuda.note,
    )
    if cuda.on:
        cuda_include, cuda_libraries = cuda_folders(cuda.nvcc)
        includes += cuda_include
        nvcc = [cuda.nvcc, "-std=c++20", "-O3", "-lineinfo", "-Xptxas=-v", *gencode(cuda.archs)]
        nvcc += ["-ccbin", find_cxx()[-1], "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-g0"]
        for source in sources["cuda"]:  # first, as they take the longest by far
            add(source, nvcc)

    for source in sources["ops"]:
        add(source, [*cxx, *facts, *(flag for path in includes for flag in ("-isystem", str(path)))])
    for source in sources["plain"]:
        add(source, cxx)
    for source in sources["kernels"]:
        for isa, flags in sources["isa"].items():
            add(source, [*cxx, *flags, f"-DRIVER_ISA={isa}"], isa)
    if cuda.on:
        # The static runtime looks for no libcudart: the module also loads beside a torch without CUDA.
        link += [*(f"-L{path}" for path in cuda_libraries), "-lcudart_static", "-lrt", "-lpthread", "-ldl"]

    # Linked by name although torch is already loaded at import: the module then says itself what it needs.
    with_torch = [f"-L{torch.path}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
    link = [*find_cxx(), "-shared", *(str(unit.object) for unit in units), *with_torch, *link]
    return units, link + shlex.split(os.environ.get("LDFLAGS", ""))


# ---------------------------------------------------------------- building it


def dependencies(path):
    """The files named in a compiler's dependency file."""
    text = path.read_text().replace("\\\n", " ").partition(": ")[2]
    return [name.replace("\\ ", " ") for name in re.split(r"(?<!\\)\s+", text.strip()) if name]


def digest(unit):
    """Of the command and of every file that it read. Of contents, not times: a copied tree has new times."""
    found = hashlib.sha256(shlex.join(unit.command).encode())
    for name in dependencies(unit.object.with_suffix(".d")):
        found.update(content_digest(name, os.stat(name).st_mtime_ns))
    return found.hexdigest()


@functools.cache
def content_digest(name, changed):
    """Once for all units that read this file as it was when it changed."""
    return hashlib.sha256(Path(name).read_bytes()).digest()


def up_to_date(unit):
    """True if the object was made by this very command from files with the present contents."""
    try:
        return unit.object.with_suffix(".stamp").read_text() == digest(unit) and unit.object.exists()
    except OSError:
        return False


def compile_unit(unit, say):
    stamp, depends = unit.object.with_suffix(".stamp"), unit.object.with_suffix(".d")
    stamp.unlink(missing_ok=True)
    start = time.time()
    done = subprocess.run(
        [*unit.command, "-o", str(unit.object), "-MMD", "-MF", str(depends)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = unit.object.with_suffix(".log")  # for CUDA: registers and spills of every kernel
    log.write_text(done.stdout)
    if done.returncode:
        first = "\n".join(done.stdout.splitlines()[:40])
        command = shlex.join(unit.command)
        raise BuildError(f"{unit.source.name} did not compile (all messages: {log})\n{command}\n{first}")
    warnings = done.stdout if "warning" in done.stdout else ""
    end = time.time()  # times to come are those of another machine's clock
    if not any(start <= os.stat(name).st_mtime <= end for name in dependencies(depends)):
        stamp.write_text(digest(unit))  # else one changed while it was being compiled: once more
    say(f"  {unit.object.stem:32} {time.time() - start:5.1f} s" + ("\n" + warnings if warnings else ""))


@contextlib.contextmanager
def alone_in(folder):
    """Lets one process at a time build there; the others wait, and then find its work done."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # gone with the process, however it ends
        yield


def own_temporary(path):
    """Beside `path`, to be renamed to it: no other process, of any build, writes there."""
    return path.with_suffix(f".{os.getpid()}.tmp")


def job_count():
    """MAX_JOBS, else the cores at hand, fewer where memory is short."""
    if os.environ.get("MAX_JOBS"):
        try:
            return max(1, int(os.environ["MAX_JOBS"]))
        except ValueError:
            raise BuildError(f"MAX_JOBS={os.environ['MAX_JOBS']}: not a number") from None
    jobs = len(os.sched_getaffinity(0))
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return max(1, min(jobs, int(match[1]) * 1024 // BYTES_PER_JOB)) if match else jobs


def compile_all(units, say):
    """In parallel, longest first as listed; a failure stops what has not begun."""
    for unit in units:
        unit.object.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(job_count()) as pool:
        futures = [pool.submit(compile_unit, unit, say) for unit in units]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def build(root, version, target, say=lambda text: print(text, flush=True)):
    """Compiles and links river_ext._C into `target`. Raises BuildError."""
    if not sys.platform.startswith("linux"):
        raise BuildError(f"only Linux is supported, this is {sys.platform}")
    sources = read_sources(root)
    if not sources["ops"]:
        raise BuildError(f"csrc/ops is not in {root}: the source tree is incomplete")
    torch = find_torch()
    cuda = decide_cuda(sources, torch)
    units, link = plan(root, version, torch, cuda, sources)
    library = root / "build" / "native" / target.name
    with alone_in(library.parent):

        def compile_stale(stale):
            say(f"river_ext {version}: torch {torch.version} in {torch.path}")
            say(f"CPU kernels: {', '.join(sources['isa'])}")
            say(f"CUDA kernels: {cuda.note}")
            compile_all(stale, say)

        make_library(library, units, link, compile_stale)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = own_temporary(target)
        shutil.copyfile(library, temporary)
        os.replace(temporary, target)  # never a half-written module, nor one changed under a running process


def make_library(library, units, link, compile_stale):
    """Compiles what is stale of the units and links them by `link`, which lacks only its output."""
    stale, stamp = [unit for unit in units if not up_to_date(unit)], library.with_suffix(".stamp")

    def made():
        return "\n".join([shlex.join(link), *(digest(unit) for unit in units)])

    if not stale and library.exists() and stamp.exists() and stamp.read_text() == made():
        return
    compile_stale(stale)
    temporary = own_temporary(library)
    done = subprocess.run([*link, "-o", str(temporary)], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"linking {library.name} failed\n{shlex.join(link)}\n{done.stderr}")
    stamp.unlink(missing_ok=True)
    os.replace(temporary, library)
    stamp.write_text(made())
