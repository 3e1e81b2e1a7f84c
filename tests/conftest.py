"""What the tests share: backends, instruction sets, tolerances, data."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import emulated
import pytest
import torch
from torch import Tensor

from greedyprune.data.losses import Target
from greedyprune.kernels import backend as _backend
from greedyprune.kernels import ops
from greedyprune.kernels.path import Moments, Rule
from greedyprune.kernels.path import Path as GreedyPath

# Relative: how far a kernel computing in a dtype may be from the float64 reference. Losses are
# means over samples, so that rounding mostly cancels; this is what one sample may be off by.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
INSTRUCTION_SETS = _backend.extension().instruction_sets() if _backend.has_extension() else []


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with every instruction set that this processor has."""
    extension = _backend.extension()
    before = extension.active_instruction_set()
    extension.use_instruction_set(request.param)
    yield request.param
    extension.use_instruction_set(before)


@pytest.fixture(scope="session")
def emulated_extension() -> ModuleType:
    """The extension whose CUDA kernels run on the host."""
    return emulated.load()


@pytest.fixture
def emulated_cuda(emulated_extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="cuda" on the CPU's memory."""
    monkeypatch.setattr(_backend, "_extension", emulated_extension)
    monkeypatch.setattr(_backend, "has_cuda", lambda: True)
    monkeypatch.setattr(_backend, "cuda_device", lambda device: device)


ON_GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not _backend.has_cuda(), reason="no GPU, or built without CUDA"),
    ],
)
BACKENDS = ["cpu", "reference", "emulated", ON_GPU]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """A name for `select(backend=...)`; "emulated" is "cuda" on the host."""
    if request.param != "emulated":
        return str(request.param)
    request.getfixturevalue("emulated_cuda")
    return "cuda"


class Kernels:
    """The functions of `ops` on some device, for tensors on the CPU and with results there."""

    def __init__(self, backend: str, device: str) -> None:
        self.backend, self.device = backend, torch.device(device)

    def few(self, rule: Rule, steps: int = 20) -> Rule:
        """The rule with fewer steps where each takes some milliseconds: emulated."""
        emulated = self.backend == "cuda" and self.device.type == "cpu"
        return replace(rule, steps=min(rule.steps, steps)) if emulated else rule

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._call, getattr(ops, name))

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        there = [self._there(value) for value in args]
        named = {key: self._there(value) for key, value in kwargs.items() if key != "step"}
        steps = {"step": kwargs["step"]} if "step" in kwargs else {}
        found = function(*there, **named, **steps, backend=self.backend)
        return found if isinstance(found, GreedyPath) else found.cpu()

    def _there(self, value: Any) -> Any:
        if isinstance(value, (Tensor, Target)):
            return value.to(self.device)
        if isinstance(value, Moments):
            return replace(value, norm=value.norm.to(self.device), beta=value.beta.to(self.device))
        if callable(value) and self.device.type != "cpu":  # columns(units, out)

            def columns(units: Tensor, out: Tensor) -> None:
                here = torch.empty(out.shape, dtype=out.dtype)
                value(units.cpu(), here)
                out.copy_(here)

            return columns
        return value


@pytest.fixture(params=[*INSTRUCTION_SETS, "emulated", ON_GPU])
def on(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """Runs the test with every instruction set that this processor has, and with CUDA."""
    if request.param == "cuda":
        yield Kernels("cuda", "cuda")
        return
    if request.param == "emulated":
        request.getfixturevalue("emulated_cuda")
        yield Kernels("cuda", "cpu")
        return
    extension = _backend.extension()
    before = extension.active_instruction_set()
    extension.use_instruction_set(request.param)
    yield Kernels("cpu", "cpu")
    extension.use_instruction_set(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves torch's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny problems, where threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    """The folder with MNIST's IDX files, $GREEDYPRUNE_DATA/MNIST/raw."""
    folder = Path(os.environ.get("GREEDYPRUNE_DATA", "")) / "MNIST" / "raw"
    if "GREEDYPRUNE_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("no MNIST in $GREEDYPRUNE_DATA")
    return folder
