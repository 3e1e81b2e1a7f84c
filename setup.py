"""Builds greedyprune._C with CMake and ninja; everything else is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures and builds in a folder of its own, so that nothing is left beside the sources."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        settings = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "GREEDYPRUNE_VERSION": self.distribution.get_version(),
            "GREEDYPRUNE_CUDA": os.environ.get("GREEDYPRUNE_CUDA", "auto"),
            "GREEDYPRUNE_WERROR": os.environ.get("GREEDYPRUNE_WERROR", "OFF"),
        }
        options = [f"-D{name}={value}" for name, value in settings.items()]
        subprocess.check_call(["cmake", "-G", "Ninja", str(ROOT), *options], cwd=build)
        subprocess.check_call(["cmake", "--build", str(build)])


# The sources are CMake's affair; none are listed here.
setup(
    ext_modules=[Extension("greedyprune._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
