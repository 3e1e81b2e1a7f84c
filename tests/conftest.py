"""Fixtures that all tests share."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import emulated
import numpy as np
import pytest
import torch
from backends import INSTRUCTION_SETS, ON_GPU, Kernels

from greedyprune.kernels import backend as _backend
from greedyprune.objectives import layer_products
from greedyprune.runtime import resume
from greedyprune.surgery import weight_change

os.environ["MPLBACKEND"] = "agg"  # pictures without a screen
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the processors
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers do not depend on which tests ran before."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture
def least_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """All least squares get the least ridge, whatever held-out samples say."""

    def least(problems: object, damping: float) -> tuple[float, float]:
        return damping, 1.0

    for module in (weight_change, layer_products):
        monkeypatch.setattr(module, "chosen_damping", least)


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


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """A name for `select(backend=...)`; "emulated" is "cuda" on the host."""
    if request.param != "emulated":
        return str(request.param)
    request.getfixturevalue("emulated_cuda")
    return "cuda"


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


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint writes everything when it is known."""
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    monkeypatch.setattr(resume, "SHARE", 0)


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    """The folder with MNIST's IDX files, $GREEDYPRUNE_DATA/MNIST/raw."""
    folder = Path(os.environ.get("GREEDYPRUNE_DATA", "")) / "MNIST" / "raw"
    if "GREEDYPRUNE_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("no MNIST in $GREEDYPRUNE_DATA")
    return folder
