"""Metadata: pyproject.toml. What is compiled: csrc/sources.txt. How: build_backend/river_native.py."""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import river_native  # noqa: E402


class NativeBuild(build_ext):
    def build_extension(self, ext):
        try:
            target = Path(self.get_ext_fullpath(ext.name)).absolute()
            river_native.build(ROOT, self.distribution.get_version(), target)
        except river_native.BuildError as error:
            sys.exit(f"river_ext: {error}")


class FreshModules(build_py):
    def run(self):
        if not self.editable_mode:  # a module that has gone since the last build must not be in the wheel
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


# All that a build writes is in build/, where the objects wait for the next one.
METADATA = ROOT / "build" / "metadata"
METADATA.mkdir(parents=True, exist_ok=True)

setup(
    license="Apache-2.0",
    ext_modules=[Extension("river_ext._C", sources=[])],
    cmdclass={"build_ext": NativeBuild, "build_py": FreshModules},
    options={"egg_info": {"egg_base": str(METADATA)}},
)
