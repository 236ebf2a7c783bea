"""Makes .venv ready for `make demo`, with --dev for `make test`. Standard library only; safe to run again.

A python3 that has torch >= 2.11 lends its packages to .venv, so that a prepared machine needs no network.
Elsewhere torch is installed first, as a CPU build where the machine has no NVIDIA driver and such a build can
be had. pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are obeyed throughout.
"""

import argparse
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "river_setup.txt"
TORCH = "torch>=2.11,<2.14"
CPU_TORCH = "torch==2.13.0+cpu"  # the local version that torch's CPU builds carry
PIP = [str(PYTHON), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]

sys.path.insert(0, str(ROOT / "build_backend"))


def say(text):
    print(f"setup: {text}", flush=True)


def fail(text):
    sys.exit(f"setup: {text}")


def run(command, quiet=False):
    """True if it succeeded. What it says is shown, unless a failure is one of the expected outcomes."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} if quiet else {}
    return subprocess.run([str(part) for part in command], cwd=ROOT, **silent).returncode == 0


def ask(code):
    """What `code` prints in .venv's Python."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "build_backend")}
    return subprocess.run(
        [PYTHON, "-c", code], env=environment, check=True, capture_output=True, text=True
    ).stdout


def check_machine():
    found = f"{sys.executable} is {sys.version.split()[0]}"
    if sys.version_info < (3, 10):  # noqa: UP036 (nothing has checked it yet)
        fail(f"Python >= 3.10 is needed, {found}: name another one, as in make PYTHON=python3.12")
    import river_native

    try:
        river_native.find_cxx()
        river_native.find_python_headers()
    except river_native.BuildError as error:
        fail(str(error))


def lent_packages():
    """The package folders of this python3 if it has a suitable torch, else none."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return []
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < (2, 11):
        return []
    say(f"using torch {version} of {sys.executable}")
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


def make_venv():
    if PYTHON.exists() and run([PYTHON, "-c", ""], quiet=True):
        return
    say(f"creating .venv with {sys.executable}")
    lent = lent_packages()
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    made = run(command, quiet=True) or run([*command, "--without-pip"], quiet=True)
    if made and lent:
        # Not --system-site-packages: where python3 is itself in a virtual environment, that shows another's.
        folder = ask("import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        Path(folder, "lent_packages.pth").write_text("\n".join(lent) + "\n")
        if any(Path(path, "setuptools").exists() for path in lent):
            for path in Path(folder).glob("setuptools*"):  # the one that venv brings is old, and would win
                shutil.rmtree(path)
    if not made or not run([PYTHON, "-m", "pip", "--version"], quiet=True):
        shutil.rmtree(VENV, ignore_errors=True)
        fail(
            f"{sys.executable} can make no virtual environment with pip: install python3-venv, or set PYTHON"
        )


def install_torch():
    driver = os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi")
    if not driver:
        say("installing torch (a CPU build: there is no NVIDIA driver)")
        if run([*PIP, CPU_TORCH], quiet=True):
            return
        # uv knows where torch's CPU builds are published; pip has to be told by the user.
        uv = [VENV / "bin" / "uv", "pip", "install", "--python", PYTHON, "--torch-backend", "cpu", TORCH]
        if run([*PIP, "uv"], quiet=True) and run(uv, quiet=True):
            return
        say("no CPU build could be had: this takes the default build, several gigabytes on Linux")
    if not run([*PIP, TORCH]):
        fail(f'`pip install "{TORCH}"` failed, see above (a python3 that has torch needs no network)')


def install_build_tools():
    lacking = ask("import river_backend as b; print(*b.get_requires_for_build_wheel())").split()
    if any(name.startswith("torch") for name in lacking):
        install_torch()
    rest = [name for name in lacking if not name.startswith("torch")]
    if rest and not run([*PIP, *rest]):
        fail(f"installing {', '.join(rest)} failed: see above")


def build():
    """Every time: what is up to date costs a fraction of a second."""
    if not run([PYTHON, "-W", "ignore", "setup.py", "-q", "build_ext", "--inplace"]):
        fail("building river_ext failed: see above")


def install_package():
    say("installing river_ext into .venv, editable")
    # --no-deps: pip would also follow what lent packages say that they need, and so look for the network.
    if not run([*PIP, "--no-deps", "--no-build-isolation", "-e", "."]):
        fail("installing river_ext failed: see above")
    lacking = lacking_requirements()
    if lacking and not run([*PIP, *lacking]):
        fail(f"installing {', '.join(lacking)} failed: see above")


def lacking_requirements(extra=""):
    """The requirements of river_ext, or of one of its extras, that .venv does not have."""
    return ask(f"""
import importlib.metadata as metadata, re
for line in metadata.requires("river_ext"):
    requirement, _, marker = line.partition(";")
    if (marker.split()[-1].strip("'\\"") if marker else "") == {extra!r}:
        try:
            metadata.version(re.match(r"[\\w.-]+", requirement)[0])
        except metadata.PackageNotFoundError:
            print(requirement.replace(" ", ""))
""").split()


def install_dev(strict):
    """What tests can do without, except where `strict`: CI must not pass because something was missing."""
    refused = []
    for name in lacking_requirements("dev"):
        say(f"installing {name}")
        if not run([*PIP, "--retries", "1", name], quiet=not strict):
            refused.append(name)
    if refused and (strict or "pytest" in refused):
        fail(f"could not install {', '.join(refused)}")
    if refused:
        say(f"not to be had here: {', '.join(refused)}; what needs them is skipped")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dev", action="store_true", help="also what the tests need")
    dev = parser.parse_args().dev
    check_machine()
    make_venv()

    # What was installed, for which metadata: the same again means that only the build needs a look.
    inputs = [ROOT / "pyproject.toml", ROOT / "setup.py", Path(__file__)]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in inputs)).hexdigest()
    done = STAMP.read_text().split() if STAMP.exists() else []
    if key not in done:
        install_build_tools()
    build()
    if key not in done:
        install_package()
        done = [key]
    if dev and "dev" not in done:
        install_dev(strict=bool(os.environ.get("CI")))
        done.append("dev")
    STAMP.write_text("\n".join(done) + "\n")


if __name__ == "__main__":
    main()
