"""Builds and loads the extension with its CUDA kernels on the host (see cuda_runtime.h)."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load() -> ModuleType:
    """The extension as the module emulated._C. Raises RuntimeError with the compiler's output."""
    import pybind11

    build = ROOT / "build" / f"emulated-{sys.implementation.cache_tag}"
    build.mkdir(parents=True, exist_ok=True)
    settings = {
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": build / "out",
        "GREEDYPRUNE_CUDA": "emulated",
        "GREEDYPRUNE_WERROR": os.environ.get("GREEDYPRUNE_WERROR", "OFF"),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    tools = Path(sys.executable).parent  # where pip puts cmake and ninja
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several test processes builds, the others wait
        for command in (["cmake", "-G", "Ninja", str(ROOT), *options], ["cmake", "--build", "."]):
            done = subprocess.run(
                command, cwd=build, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(done.stdout + done.stderr)
    (path,) = (build / "out").glob("_C*.so")
    spec = importlib.util.spec_from_file_location("emulated._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
