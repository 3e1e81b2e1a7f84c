"""The files of selections and pruned models: paths that can't be written or read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import greedyprune

MODEL = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
DATA = torch.randn(20, 4), torch.randn(20, 2)
WRITERS: dict[str, Callable[[object], object]] = {
    "selection": lambda path: greedyprune.select(MODEL, DATA, size=2).save(path),
    "pruned model": lambda path: greedyprune.save_pruned(MODEL, path),
}
READERS: dict[str, Callable[[object], object]] = {
    "selection": greedyprune.Selection.load,
    "pruned model": lambda path: greedyprune.load_pruned(path, lambda: MODEL),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_missing_folder_is_named(write: Callable, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "small.safetensors"
    with pytest.raises(FileNotFoundError, match=r"^path: found '.*small.safetensors' in a folder"):
        write(path)
    path.parent.mkdir()
    write(path)
    assert [file.name for file in path.parent.iterdir()] == ["small.safetensors"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_folder_is_no_file(write: Callable, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=r"^path: found the folder"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("use", [*WRITERS.values(), *READERS.values()])
def test_a_number_is_no_path(use: Callable) -> None:
    with pytest.raises(TypeError, match=r"^path: found 5, expected a str or a path"):
        use(5)
