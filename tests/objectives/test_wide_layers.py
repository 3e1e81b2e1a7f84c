"""Layers that keep their columns, against the same layers with sums of products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import greedyprune
from greedyprune.data import positions
from greedyprune.data.positions import is_wide
from greedyprune.kernels.dual import DualFit
from greedyprune.kernels.path import NestedFit
from greedyprune.runtime import resume

NO_SWAPS = greedyprune.Imitation(swaps=0)


@pytest.fixture
def all_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "MOST_FEATURES", 0)


class Flat(nn.Module):
    """A convolution that a convolution takes, and one that a Linear takes after flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.after = nn.BatchNorm2d(5)
        self.third = nn.Linear(5 * 4 * 4, 7)
        self.last = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = nn.functional.max_pool2d(self.after(self.second(x)).relu(), 2)
        return self.last(self.third(x.flatten(1)).relu())


class Twice(nn.Module):
    """Two layers take the same units, one at all positions and one after flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 6, 3)
        self.one, self.other = nn.Conv1d(6, 3, 3), nn.Linear(6 * 6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x).relu()
        return self.one(x), self.other(x.flatten(1))


def model_and_images(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = Flat().to(dtype)
    images = torch.randn(24, 2, 8, 8, dtype=dtype)
    model(images)  # sets the norms' statistics
    return model.eval(), list(images.split(8))


def same(found: greedyprune.Selection, expected: greedyprune.Selection, **near: float) -> None:
    for name, layer in found.layers.items():
        other = expected.layers[name]
        assert layer.order.equal(other.order), name
        torch.testing.assert_close(layer.losses, other.losses, **near)
        torch.testing.assert_close(layer.weights, other.weights, **near)
        torch.testing.assert_close(layer.dense_loss, other.dense_loss)
        for consumer in layer.outputs:
            new, old = layer.new_weights(consumer), other.new_weights(consumer)
            assert (new is None) == (old is None)
            if new is not None and old is not None:
                torch.testing.assert_close(new, old, **near)


@pytest.mark.parametrize("options", [
    {}, {"objective": greedyprune.Imitation(swaps=0, sequential=False)},
    {"objective": greedyprune.Imitation(swaps=0, metric="fisher"), "loss": "mse"},
    {"weights": "none"}, {"weights": "uniform"}, {"weights": "counts", "steps": 4},
    {"size": 1.0}, {"tolerance": 0.5},
])  # fmt: skip
def test_selections_are_those_of_sums(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = model_and_images()
    data = [(x, torch.randn(len(x), 4).double()) for x in images]
    options = {"objective": NO_SWAPS, "layers": ["first", "second"], **options}
    expected = greedyprune.select(model, data, **options)
    monkeypatch.setattr(positions, "MOST_FEATURES", 0)
    found = greedyprune.select(model, data, **options)
    same(found, expected, rtol=1e-6, atol=1e-8)
    if expected.layers["first"].fitted:
        for layer in found.layers.values():
            assert all(isinstance(fit, DualFit) for fit in (layer.fitted or {}).values())
        for layer in expected.layers.values():
            assert all(isinstance(fit, NestedFit) for fit in (layer.fitted or {}).values())


def test_several_consumers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, signals = Twice().double().eval(), [torch.randn(16, 2, 8).double() for _ in range(2)]
    expected = greedyprune.select(model, signals, objective=NO_SWAPS, size=4)
    monkeypatch.setattr(positions, "MOST_FEATURES", 20)  # of the flattened one alone
    found = greedyprune.select(model, signals, objective=NO_SWAPS, size=4)
    same(found, expected, rtol=1e-6, atol=1e-8)
    assert all(isinstance(fit, DualFit) for fit in (found.layers["first"].fitted or {}).values())


def test_a_sample_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 24 images with 64 positions 384 columns are kept, each for four positions."""
    model, images = model_and_images()
    whole = greedyprune.select(model, images, objective=NO_SWAPS, layers=["first"])
    monkeypatch.setattr(positions, "MOST_FEATURES", 0)
    monkeypatch.setattr(positions, "KEPT_ROWS", 300)
    sampled = greedyprune.select(model, images, objective=NO_SWAPS, layers=["first"])
    [fit] = (sampled.layers["first"].fitted or {}).values()
    assert isinstance(fit, DualFit)
    assert len(fit.rows) == 24 * 64 // 4
    new, old = sampled.layers["first"].losses, whole.layers["first"].losses
    assert not new.equal(old)
    torch.testing.assert_close(new, old, rtol=0.3, atol=0)
    exact = greedyprune.Imitation(swaps=0, exact_losses=True)
    same(greedyprune.select(model, images, objective=exact, layers=["first"]), whole)


@pytest.mark.usefixtures("all_wide")
def test_files_and_shorter_paths(tmp_path: Path) -> None:
    model, images = model_and_images(torch.float32)
    selection = greedyprune.select(model, images, objective=NO_SWAPS, layers=["first", "second"])
    selection.save(tmp_path / "selection.safetensors")
    loaded = greedyprune.Selection.load(tmp_path / "selection.safetensors")
    same(loaded, selection, rtol=0.0, atol=0.0)
    same(loaded.at(2), selection.at(2), rtol=0.0, atol=0.0)
    assert selection.layers["second"].at(2).weights.shape == (7, 2, 16)
    small = greedyprune.prune(model, loaded)
    assert small(images[0]).shape == (8, 4)


class Stopping(list[Tensor]):
    """Batches of which the third can't be read in the first three passes."""

    passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        for i in range(len(self)):
            if i == 2 and self.passes <= 3:
                raise InterruptedError("stop")
            yield self[i]


@pytest.mark.usefixtures("all_wide")
def test_an_interrupted_pass_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    monkeypatch.setattr(resume, "SHARE", 0)
    model, images = model_and_images(torch.float32)
    expected = greedyprune.select(model, images, layers=["first"])
    data, folder = Stopping(images), tmp_path / "folder"
    for _ in range(9):
        with suppress(InterruptedError):
            found = greedyprune.select(model, data, layers=["first"], checkpoint=folder)
            break
    assert data.passes > 3
    same(found, expected, rtol=0.0, atol=0.0)


@pytest.mark.usefixtures("all_wide")
def test_budgets_and_nested_data() -> None:
    model, images = model_and_images(torch.float32)
    budget = greedyprune.Budget(flops=0.5)
    selection = greedyprune.select(model, images, size=budget, layers=["first", "second"])
    assert selection.budget is not None
    before, after = selection.change("flops")
    assert after <= before / 2


@pytest.mark.parametrize("layers", [["first"], ["first", "second", "third"]])
def test_refits_are_those_of_sums(layers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bias, with the bias of a norm, and in the rounds before a ReLU."""
    model, images = model_and_images()
    selection = greedyprune.select(model, images, objective=NO_SWAPS, layers=layers)
    monkeypatch.setattr(positions, "FEW_FEATURES", 10**6)
    expected = greedyprune.refit(model, selection, images)
    monkeypatch.setattr(positions, "MOST_FEATURES", 0)
    found = greedyprune.refit(model, selection, images)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-6, atol=1e-8)
    assert any(
        not value.equal(greedyprune.prune(model, selection).state_dict()[name])
        for name, value in expected.state_dict().items()
    )


def test_the_rule() -> None:
    """A Gram matrix of 12288 features has 1.2 GB. Up to 8192 features nothing is wide."""
    assert not is_wide(8192, 10)
    assert is_wide(9216, 2304)
    assert not is_wide(9216, 2305)
    assert not is_wide(9216, 0)  # it is unknown
    assert not is_wide(12288, 10**6)
    assert is_wide(12289, 10**6)


def flattened(channels: int, size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(channels * size * size, 3), nn.ReLU(), nn.Linear(3, 2),
    ).eval()  # fmt: skip


def test_exchanges_are_refused_for_wide_layers() -> None:
    model, images = flattened(16, 28), [torch.randn(8, 1, 28, 28)]
    with pytest.raises(ValueError, match="swaps: found 3, but '3' takes 12544 features of layer"):
        greedyprune.select(model, images, objective=greedyprune.Imitation(swaps=3), layers=["0"])


def test_exchanges_that_are_asked_for_get_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are few positions, but not more features than sums may have."""
    monkeypatch.setattr(positions, "FEW_FEATURES", 100)
    model, images = flattened(8, 8), [torch.randn(8, 1, 8, 8)]
    for objective, kind in (("auto", DualFit), (greedyprune.Imitation(swaps=3), NestedFit)):
        selection = greedyprune.select(model, images, objective=objective, layers=["0"])
        [fit] = (selection.layers["0"].fitted or {}).values()
        assert isinstance(fit, kind)


def test_memory_is_that_of_the_columns() -> None:
    """A Gram matrix of 25088 features alone has 5 GB."""
    model, images = flattened(32, 28), [torch.randn(8, 1, 28, 28) for _ in range(4)]
    options = {"layers": ["0"], "size": 4}
    expected = greedyprune.select(model, images, **options)
    limited = greedyprune.select(model, images, memory_limit=500 << 20, **options)
    same(limited, expected, rtol=0.0, atol=0.0)
    with pytest.raises(ValueError, match="memory_limit: found 1000000 bytes, but layer '0' needs"):
        greedyprune.select(model, images, memory_limit=10**6, **options)
