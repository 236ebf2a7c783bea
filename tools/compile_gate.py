"""Compiles every CUDA kernel for every supported architecture and fails on what would make it slow or wrong.

    python tools/compile_gate.py [--archs 80,90a] [file.cu ...]

No kernel may spill registers or use local memory, and each must contain the dependency wait (sm_90), as a
kernel without one races with its predecessor. Before an atomicInc, by which a block says that its sums are
there, a fence must release them: no emulation can show that. A comment above a kernel sets a budget:

    // Budget: 288 threads, 112 registers, 11264 shared, mma

checks the registers per thread, that two such blocks fit an SM (32768 registers each), the bytes of static
shared memory, and that the tensor cores are used; the last two may be left out. Needs nvcc, no GPU; without
nvcc it says so and passes. Nothing is compiled twice.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_backend"))

import river_native  # noqa: E402

BUILD = ROOT / "build" / "gate"
ARCHS = "80,86,89,90a"
REGISTERS_PER_BLOCK = 32768  # half of an SM's, so that two consecutive kernels are resident together


@dataclass
class Budget:
    threads: int
    registers: int
    shared: int | None
    mma: bool


@dataclass
class Kernel:
    """What one compilation of one kernel uses."""

    name: str
    registers: int = 0
    shared: int = 0
    spills: int = 0
    stack: int = 0
    mma: int = 0
    waits: bool = False
    unfenced: int = 0  # atomicInc without a fence before


def budgets(sources):
    """{kernel: Budget} from the comments above kernels, in the sources and the headers that they share."""
    found = {}
    pattern = r"// Budget: (\d+) threads, (\d+) registers(?:, (\d+) shared)?(, mma)?\n"
    pattern += r"(?:(?!__global__)[^\n]*\n)?__global__[^(]*?(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\("
    for path in [*sources, *sorted((ROOT / "csrc" / "cuda" / "device").glob("*.cuh"))]:
        text = path.read_text()
        matches = re.findall(pattern, text)
        if len(matches) != text.count("// Budget:"):
            sys.exit(
                f"gate: {path.name}: a budget is not followed by its kernel, or not in the form of {__file__}"
            )
        for threads, registers, shared, mma, name in matches:
            found[name] = Budget(int(threads), int(registers), int(shared) if shared else None, bool(mma))
    return found


def plan(nvcc, sources, archs):
    flags = ["-std=c++20", "-O3", "-Xptxas=-v", "-Xcompiler=-Wall", "--keep", "-cubin"]
    flags += ["-ccbin", river_native.find_cxx()[-1]]
    units = {}
    for source in sources:
        for arch in archs:
            folder = BUILD / f"sm_{arch}"
            folder.mkdir(parents=True, exist_ok=True)
            command = [nvcc, f"-arch=sm_{arch}", *flags, "--keep-dir", str(folder), str(source)]
            units[source, arch] = river_native.Unit(source, folder / f"{source.stem}.cubin", command)
    return units


def read(unit):
    """The kernels of one compilation: ptxas's messages, and what the PTX holds."""
    kernels = {}
    kernel = None
    for line in unit.object.with_suffix(".log").read_text().splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = kernels.setdefault(match[1], Kernel(match[1]))
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            if kernel:
                kernel.stack, kernel.spills = int(match[1]), int(match[2]) + int(match[3])
        elif kernel and (match := re.search(r"Used (\d+) registers", line)):
            kernel.registers = int(match[1])
            kernel.shared = int(match[1]) if (match := re.search(r"(\d+) bytes smem", line)) else 0
            kernel = None
    ptx = unit.object.with_name(unit.source.stem + ".ptx").read_text()
    for part in re.split(r"\.entry\s+", ptx)[1:]:
        if kernel := kernels.get(re.match(r"\w+", part)[0]):
            kernel.mma, kernel.waits = part.count("mma.sync"), "griddepcontrol.wait" in part
            kernel.unfenced = unfenced(part)
    return kernels


def unfenced(ptx):
    """How many atomicInc have no fence before them, with nothing in between that it would not cover."""
    count, fenced = 0, False
    for line in ptx.splitlines():
        instruction = re.sub(r"^\s*(@\S+\s+)?", "", line)
        if instruction.startswith("fence.acq_rel.gpu"):
            fenced = True
        elif re.match(r"atom\.\S*inc\.", instruction):
            count += not fenced
            fenced = False
        elif re.match(r"\$|bra|st\.|red\.|atom\.|bar", instruction):  # $: a label
            fenced = False
    return count


def readable(names):
    """{mangled: kernel<arguments>}."""
    if not shutil.which("c++filt"):
        return {name: name for name in names}
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    plain = {}
    for mangled, name in zip(names, done.stdout.splitlines(), strict=True):
        name = re.sub(
            r"\(anonymous namespace\)::|\b_GLOBAL__N__\w+::|river::|cuda::|device::|^void ", "", name
        )
        plain[mangled] = re.sub(r"\((?!anonymous)[^()]*(?:\([^()]*\)[^()]*)*\)$", "", name)
    return plain


def complaints(kernel, name, arch, budget):
    if kernel.spills or kernel.stack:
        yield f"spills {kernel.spills} bytes, {kernel.stack} bytes of local memory"
    if arch >= "90" and not kernel.waits:
        yield "has no dependency_wait()"
    if kernel.unfenced:
        yield f"has {kernel.unfenced} atomicInc without a gpu_fence() before"
    if budget:
        if kernel.registers > budget.registers:
            yield f"uses {kernel.registers} registers, its budget is {budget.registers}"
        allocated = -(-kernel.registers // 8) * 8 * budget.threads  # registers come in units of 8
        if allocated > REGISTERS_PER_BLOCK:
            yield f"uses {allocated} registers per block, two blocks per SM allow {REGISTERS_PER_BLOCK}"
        if budget.shared is not None and kernel.shared > budget.shared:
            yield f"uses {kernel.shared} bytes of static shared memory, its budget is {budget.shared}"
        if budget.mma and not kernel.mma:
            yield "does not use the tensor cores"


def tabulate(units):
    """{(source, kernel<arguments>): {arch: Kernel}}."""
    table = {}
    for (source, arch), unit in units.items():
        kernels = read(unit)
        for mangled, name in readable(list(kernels)).items():
            table.setdefault((source.name, name), {})[arch] = kernels[mangled]
    return table


def print_table(table, archs):
    width = max((len(name) for _, name in table), default=0)
    print(f"{'kernel':{width}}  " + "  ".join(f"sm_{arch:3}" for arch in archs) + "  shared  spills  mma")
    for (_, name), by_arch in table.items():
        kernels = list(by_arch.values())
        registers = "  ".join(f"{by_arch[a].registers if a in by_arch else '-':>6}" for a in archs)
        spills = max(k.spills + k.stack for k in kernels)
        print(f"{name:{width}}  {registers}  {kernels[-1].shared:6}  {spills:6}  {kernels[-1].mma:3}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, help="default: csrc/cuda/*.cu")
    parser.add_argument("--archs", default=ARCHS, help=f"default: {ARCHS}")
    options = parser.parse_args(arguments)
    sources = [path.resolve() for path in options.sources] or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    archs = options.archs.split(",")
    nvcc = river_native.find_nvcc()
    if not nvcc:
        print("compile gate: skipped, no nvcc")
        return 0
    limits = budgets(sources)
    units = plan(nvcc, sources, archs)
    with river_native.alone_in(BUILD):
        river_native.compile_all([u for u in units.values() if not river_native.up_to_date(u)], print)

    table = tabulate(units)
    print_table(table, archs)
    failures = []
    for (source, name), by_arch in table.items():
        budget = limits.get(name.partition("<")[0])
        for arch, kernel in by_arch.items():
            failures += [f"{source}: {name}, sm_{arch}: {c}" for c in complaints(kernel, name, arch, budget)]
    print(f"{len(table)} kernels, registers per thread, {len(limits)} budgets; {shlex.join([nvcc])}")
    for failure in failures:
        print(f"FAILED {failure}")
    return bool(failures)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except river_native.BuildError as error:
        sys.exit(f"compile gate: {error}")
