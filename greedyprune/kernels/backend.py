"""Loads the compiled extension, which no other file does, and says which backends there are."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch

BUILD_HINT = "build it with `pip install .` in a checkout (needs a C++ compiler)"


def _load() -> tuple[ModuleType | None, str]:
    try:
        # By name: `from .. import _C` would count as an import of the whole package.
        _C = import_module("greedyprune._C")
    except ImportError as error:
        reason = "not built" if isinstance(error, ModuleNotFoundError) else str(error)
        print(
            f"greedyprune: the compiled extension is missing ({reason}); only "
            f"backend='reference' works; {BUILD_HINT}",
            file=sys.stderr,
        )
        return None, reason
    wanted = os.environ.get("GREEDYPRUNE_ISA")
    if wanted:
        if wanted not in _C.instruction_sets():
            sets = ", ".join(_C.instruction_sets())
            raise ValueError(f"GREEDYPRUNE_ISA: found {wanted!r}, expected one of {sets}")
        _C.use_instruction_set(wanted)
    return _C, ""


_extension, missing = _load()


def extension() -> ModuleType:
    """The compiled extension. Raises RuntimeError, which says how to build it, if it is missing."""
    if _extension is None:
        raise RuntimeError(f"greedyprune's compiled extension is missing ({missing}); {BUILD_HINT}")
    return _extension


def has_extension() -> bool:
    """Is the extension built?"""
    return _extension is not None


def has_cuda() -> bool:
    """Is the extension built with CUDA, and is a GPU available?"""
    return _extension is not None and _extension.cuda is not None and torch.cuda.is_available()


def cuda_device(device: torch.device) -> torch.device:
    """The device that backend "cuda" computes on: the model's `device`, or else the current GPU."""
    return device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())


def resolve(backend: str, on_gpu: bool) -> str:
    """The backend that the argument `backend` of `select` means.

    Args:
        on_gpu: is the model or some of the data on a GPU?

    Raises:
        ValueError: the name is unknown, or the backend needs a GPU or an extension that is missing
    """
    if backend not in ("auto", "cpu", "cuda", "reference"):
        raise ValueError(
            f"backend: found {backend!r}, expected one of 'auto', 'cpu', 'cuda', 'reference'"
        )
    if backend == "cuda" and not has_cuda():
        why = (
            "no GPU is available" if not torch.cuda.is_available() else "it was built without CUDA"
        )
        raise ValueError(f"backend: found 'cuda', but {why}; expected 'auto', 'cpu' or 'reference'")
    if backend == "cpu" and not has_extension():
        raise ValueError(
            f"backend: found 'cpu', but the compiled extension is missing ({missing}); {BUILD_HINT}"
        )
    if backend != "auto":
        return backend
    if on_gpu and has_cuda():
        return "cuda"
    return "cpu" if has_extension() else "reference"


def instruction_set(backend: str) -> str:
    """The instruction set that the kernels use: empty unless the backend is "cpu"."""
    return str(extension().active_instruction_set()) if backend == "cpu" else ""


def show_config() -> None:
    """Prints version, compiler, instruction sets, CUDA, threads and torch, for bug reports.

    Example:
        >>> import greedyprune
        >>> greedyprune.show_config()  # doctest: +ELLIPSIS
        greedyprune ...
    """
    lines = {
        "greedyprune": _version(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    if _extension is None:
        lines["extension"] = f"missing ({missing}); {BUILD_HINT}"
    else:
        sets = ", ".join(_extension.instruction_sets())
        lines |= {
            "extension": f"built for {_extension.version} with {_extension.compiler}",
            "instruction sets": f"{sets} (in use: {_extension.active_instruction_set()})",
            "threads": f"{torch.get_num_threads()}"
            + ("" if _extension.openmp else " (no OpenMP: 1)"),
            "CUDA": f"compiled with {_extension.cuda}" if _extension.cuda else "not compiled",
        }
    if torch.cuda.is_available():
        lines["GPU"] = torch.cuda.get_device_name()
    else:
        lines["GPU"] = "none available"
    width = max(map(len, lines))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in lines.items()))


def _version() -> str:
    try:
        return version("greedyprune")
    except PackageNotFoundError:  # a checkout on the path, not installed
        return "unknown"
