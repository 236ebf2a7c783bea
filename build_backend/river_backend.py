"""PEP 517 backend: setuptools, but against the packages that are already installed.

pip builds in an empty environment. A fixed `requires = ["torch"]` would download gigabytes there although
torch is installed, and might compile against another one. So `requires` is empty, this backend puts the
packages of the environment that pip runs in back on the path, and asks only for what is missing.
"""

import importlib.metadata
import os
import re
import site
import sys
import sysconfig
from pathlib import Path

NEEDED = {"torch": (2, 11), "setuptools": (64,), "wheel": ()}  # minimum versions


def expose_environment():
    """Appends the environment's own site-packages, behind whatever pip put in front for this build."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    config = Path(sys.prefix, "pyvenv.cfg")
    venv = config.exists()
    if not venv or re.search(r"include-system-site-packages\s*=\s*true", config.read_text(), re.I):
        folders += site.getsitepackages([sys.base_prefix]) + [site.getusersitepackages()]
    for folder in dict.fromkeys(folders):
        if folder not in sys.path and os.path.isdir(folder):
            site.addsitedir(folder)  # not a plain append: .pth files lead to further folders


def version_of(name):
    try:
        return tuple(int(n) for n in re.findall(r"\d+", importlib.metadata.version(name))[:2])
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(names):
    """Requirements, of NEEDED's `names`, that the environment does not meet."""
    lacking = []
    for name in names:
        found = version_of(name)
        if name == "wheel" and (version_of("setuptools") or (99,)) >= (70, 1):
            continue  # setuptools makes wheels itself since then
        if found is None or found < NEEDED[name]:
            lacking.append(name + (">=" + ".".join(map(str, NEEDED[name])) if NEEDED[name] else ""))
    return lacking


def setuptools_backend(*names):
    """setuptools' own backend, once everything in `names` is there; else one sentence."""
    expose_environment()
    if lacking := missing(names):
        command = "pip install " + " ".join(f'"{name}"' for name in lacking)
        sys.exit(
            f"river_ext: building needs {', '.join(lacking)}, not found here: "
            f"run `{command}` first, or leave out --no-build-isolation"
        )
    from setuptools import build_meta

    return build_meta


def get_requires_for_build_wheel(config_settings=None):
    expose_environment()
    return missing(NEEDED)


def get_requires_for_build_sdist(config_settings=None):
    expose_environment()
    return missing(["setuptools"])


get_requires_for_build_editable = get_requires_for_build_wheel


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    backend = setuptools_backend(*NEEDED)
    return backend.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    backend = setuptools_backend(*NEEDED)
    return backend.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    return setuptools_backend(*NEEDED).build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return setuptools_backend(*NEEDED).build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    return setuptools_backend("setuptools").build_sdist(sdist_directory, config_settings)
