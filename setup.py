"""Metadata: pyproject.toml. What is compiled: csrc/sources.txt. How: build_backend/river_native.py."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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


setup(
    license="Apache-2.0",
    ext_modules=[Extension("river_ext._C", sources=[])],
    cmdclass={"build_ext": NativeBuild},
)
