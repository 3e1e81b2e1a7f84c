"""Data from every source, as batches on the device."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import greedyprune
from greedyprune.data.batches import Batches

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 3)).eval()
X = torch.randn(2500, 6)
Y = torch.randint(3, (2500,))
T = torch.randn(2500, 3)


class Rows(Dataset):
    def __len__(self) -> int:
        return 2500

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i], Y[i]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X[i], Y[i]) for i in range(2500)])


def mapped(tensor: Tensor) -> np.ndarray:
    """A file that is read where it is looked at."""
    path = Path(tempfile.mkdtemp()) / "numbers.npy"
    np.save(path, tensor.numpy())
    return np.load(path, mmap_mode="r")


def rows() -> Any:
    """From a Parquet file."""
    datasets = pytest.importorskip("datasets")
    folder = Path(tempfile.mkdtemp())
    table = datasets.Dataset.from_dict({"input": X.tolist(), "label": Y.tolist()})
    table.to_parquet(folder / "rows.parquet")
    cache = str(folder / "cache")
    return datasets.Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=cache)


SOURCES = {
    "tensors": lambda: (X, Y),
    "numpy": lambda: (X.numpy(), Y.numpy()),
    "TensorDataset": lambda: TensorDataset(X, Y),
    "Dataset": Rows,
    "IterableDataset": Stream,
    "DataLoader": lambda: DataLoader(Rows(), batch_size=33),
    "shuffled": lambda: DataLoader(TensorDataset(X, Y), batch_size=500, shuffle=True),
    "list": lambda: [(X[:999], Y[:999]), (X[999:], Y[999:])],
    "generator": lambda: ((X[i : i + 100], Y[i : i + 100]) for i in range(0, 2500, 100)),
    "dicts": lambda: [{"input": X, "labels": Y}],
    "memory-mapped": lambda: tuple(map(mapped, (X, Y))),
    "Hugging Face, on disk": lambda: rows(),
    "Hugging Face, a stream": lambda: rows().to_iterable_dataset(),
    "Hugging Face, a DataLoader": lambda: DataLoader(rows().with_format("torch"), batch_size=100),
    "empty batches between": lambda: [(X[:0], Y[:0]), (X, Y), (X[:0], Y[:0])],
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("limit", [2**30, 30 * 4 * 600])
def test_every_source_gives_one_answer(source: object, limit: int) -> None:
    once = source is SOURCES["generator"] and limit < 2**30
    expected = greedyprune.select(MODEL, (X, Y), steps=6)
    if once:  # cross-entropy takes a pass a step
        with pytest.raises(ValueError, match="data: found an iterator, which can be read only"):
            greedyprune.select(MODEL, source(), steps=6, memory_limit=limit)
        assert not MODEL[2]._forward_pre_hooks
        return
    selection = greedyprune.select(MODEL, source(), steps=6, memory_limit=limit)
    assert selection.order.equal(expected.order)
    torch.testing.assert_close(selection.losses, expected.losses, rtol=1e-9, atol=0)


def test_a_later_batch_that_does_not_fit() -> None:
    data = [(X[:100], Y[:100]), (X[100:200, :5], Y[100:200])]
    with pytest.raises(ValueError, match="data: the model can't run on a batch"):
        greedyprune.select(MODEL, data, steps=5)


def test_numpy_integers_count() -> None:
    import numpy as np

    selection = greedyprune.select(MODEL, (X, Y), size=np.int64(4), memory_limit=1e9)
    assert len(selection.at(np.int64(2)).order) == 2


class FakeStream:
    """Of a GPU: what it was given to do, in order."""

    def __init__(self, *_: object) -> None:
        self.log: list[str] = []

    def record_event(self) -> str:
        self.log.append("copied")
        return f"copy {len(self.log)}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"wait for {event}")


def test_batches_are_copied_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is on its way when a batch is handed out, and that one's own copy is waited for."""
    copies, now, taken = FakeStream(), FakeStream(), list[int]()
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: copies)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: now)

    def source() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(4):
            taken.append(i)
            yield X[i : i + 2], Y[i : i + 2]

    taken_inputs = []
    for i, batch in enumerate(Batches(source(), MODEL)._ahead()):
        taken_inputs.append(batch.args[0])
        assert len(taken) == min(4, i + 2) == len(copies.log)
        assert now.log[-1] == f"wait for copy {i + 1}"
    assert all(torch.equal(inputs, X[i : i + 2]) for i, inputs in enumerate(taken_inputs))
    assert len(taken_inputs) == 4


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("pinned", [False, True])
def test_copies_to_a_gpu(pinned: bool) -> None:
    """Many batches, computed on while others are copied: all arrive whole."""
    model = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 3)).cuda()
    torch.manual_seed(0)
    data = [(torch.randn(4096, 512), torch.randint(3, (4096,))) for _ in range(20)]
    loader = DataLoader(data, batch_size=None, pin_memory=pinned)
    seen = [float(batch.args[0].double().sum()) for batch in Batches(loader, model)]
    assert seen == pytest.approx([float(x.double().sum()) for x, _ in data])
