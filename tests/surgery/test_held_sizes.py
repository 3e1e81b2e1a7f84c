"""Sizes that modules hold in attributes: which ones pruning sets, and which it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from biased_attention import Biased
from torch import Tensor, nn
from torch.nn import functional

import greedyprune


class PlainNorm(nn.Module):
    """OLMo's norm: it has no tensors, and its size in a tuple."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.normalized_shape = (size,)

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape)


def test_a_size_in_a_tuple_is_set() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), PlainNorm(12), nn.Linear(12, 3))
    x = torch.randn(20, 5)
    selection = greedyprune.select(model, x, layers="all", size=4, objective="imitation")
    small = greedyprune.prune(model, selection)
    assert small[1].normalized_shape == (4,)
    assert model[1].normalized_shape == (12,)
    assert small(x).isfinite().all()


@pytest.mark.parametrize("kind", [tuple, list, torch.Size])
@pytest.mark.parametrize("area", [4, 6])
def test_a_size_in_a_shape_is_set(area: int, kind: type, tmp_path: Path) -> None:
    """With 4 heads and windows of 4, two more entries have the number of heads."""

    def factory() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Biased(area, 4, kind), nn.Tanh(), Biased(area, 4, kind))

    model, x = factory(), torch.randn(20, area, 5)
    selection = greedyprune.select(model, x, size=3, objective="imitation")
    assert list(selection.layers) == ["0.qkv", "2.qkv"]
    small = greedyprune.prune(model, selection)
    for module in (small[0], small[2]):
        assert module.num_heads == 3
        assert module.bias.shape == kind((area, area, 3))
        assert type(module.bias.shape) is kind
        assert module.bias.area == area
    assert model[0].bias.shape == kind((area, area, 4))
    greedyprune.save_pruned(small, tmp_path / "small")
    loaded = greedyprune.load_pruned(tmp_path / "small", factory)
    assert type(loaded[0].bias.shape) is kind
    assert loaded(x).equal(small(x))


class Parted(nn.Module):
    """RAFT's: the parts of a split have a size that another module holds, and the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.last = nn.Linear(5, 14), nn.Linear(8, 8), nn.Linear(14, 3)
        self.cell.hidden_size = 8

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        one, other = torch.split(x, [self.cell.hidden_size, x.shape[-1] - self.cell.hidden_size], 1)
        return self.last(torch.cat([self.cell(one.tanh()), other.relu()], 1))


def test_a_size_of_a_module_inside() -> None:
    torch.manual_seed(0)
    model, x = Parted(), torch.randn(20, 5)
    selection = greedyprune.select(model, x, size=3, objective="imitation")
    assert list(selection.layers) == ["first", "cell"]
    small = greedyprune.prune(model, selection)
    assert small.cell.hidden_size == 3
    assert (small.first.out_features, small.cell.weight.shape) == (9, (3, 3))


class ByChance(nn.Module):
    """Other sizes than the one that a view reads have its value by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.width = nn.Linear(4, 8), nn.Linear(8, 2), 8
        self.window, self.pad, self.repeats = (8, 2), [8, 0], [8]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu().view(len(x), -1, self.width)
        if x.shape[1] > 16:
            x = functional.avg_pool1d(x.mT, *self.window).mT
        x = x.repeat(self.repeats[0] // 8, 1, 1)
        return self.last(functional.pad(x, (0, 0, self.pad[0] // 8, self.pad[1]))).mean(1)


@pytest.mark.parametrize("name", ["block", "block[0]"])
def test_only_the_size_that_is_read_is_set(name: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: ByChance()})
    model.forward = lambda x: model[name](x)
    selection = greedyprune.select(model, torch.randn(16, 8, 4), objective="imitation")
    block = greedyprune.prune(model, selection)[name]
    assert block.width == 4
    assert (block.window, block.pad, block.repeats) == ((8, 2), [8, 0], [8])


class Sides(NamedTuple):
    height: int
    width: int


class WithSides(nn.Module):
    """Tuples and lists under the names of sizes, which pruning does not change."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.channels, self.hidden_dim = Sides(3, 4), [8, 8]
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x * self.scale).relu())


def test_named_tuples_stay(tmp_path: Path) -> None:
    model, x = WithSides(), torch.randn(16, 4)
    small = greedyprune.prune(model, greedyprune.select(model, x, objective="imitation"))
    greedyprune.save_pruned(small, tmp_path / "small")
    loaded = greedyprune.load_pruned(tmp_path / "small", WithSides)
    assert loaded.channels.width == 4
    assert loaded.hidden_dim == [8, 8]
