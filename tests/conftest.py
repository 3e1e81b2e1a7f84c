"""What the tests share: backends, instruction sets, tolerances, data."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from greedyprune import _backend

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
