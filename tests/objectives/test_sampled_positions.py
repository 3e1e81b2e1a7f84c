"""Sums over a sample of the positions: where they are used, and what they are close to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import check_same
from stops import stopped
from torch import Tensor, nn

import greedyprune
from greedyprune import Imitation
from greedyprune.data import positions
from greedyprune.data.positions import Draws
from greedyprune.graph.groups import Group
from greedyprune.graph.slices import Slice
from greedyprune.kernels import products
from greedyprune.objectives.products import ConsumerProducts
from greedyprune.runtime.distributed import ALONE

IMAGES = 96


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers are sampled as large ones are, with products that round no inputs."""
    monkeypatch.setattr(products, "has_fast_products", lambda: False)
    monkeypatch.setattr(positions, "CHEAP", 0)
    monkeypatch.setattr(positions, "ROWS", 8)


def images(count: int = IMAGES, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, size, size, generator=generator)
    return nn.functional.avg_pool2d(noise, 3, 1, 1) * 3


class Residual(nn.Module):
    """Two blocks with shortcuts, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 12, 1)
        self.fourth = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.second(self.first(x).relu())).relu()
        x = (x + self.fourth(self.third(x).relu())).relu()
        return self.head(x.mean((2, 3)))


def residual() -> Residual:
    torch.manual_seed(0)
    return Residual().eval()


def same(one: greedyprune.Selection, other: greedyprune.Selection) -> None:
    assert one.layers.keys() == other.layers.keys()
    for name, layer in one.layers.items():
        assert layer.order.equal(other.layers[name].order)
        torch.testing.assert_close(layer.losses, other.layers[name].losses)


def consumer(samples: int, weight: Tensor, *, halves: bool = True) -> ConsumerProducts:
    """The products of a convolution that takes as many units as `weight` has inputs."""
    model = nn.Sequential(nn.Conv2d(weight.shape[1], len(weight), 3, padding=1, stride=2))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    at = Slice.regular(1, weight.shape[1])
    group = Group(("inside",), ("0",), weight.shape[1], {"0.weight": at}, output=False)
    return ConsumerProducts(model, group, "0", halves=halves, samples=samples)


@pytest.mark.usefixtures("few_rows")
def test_sums_are_those_of_the_sample_times_the_stride() -> None:
    torch.manual_seed(0)
    inputs, weight = torch.randn(40, 4, 16, 16), torch.randn(2, 4, 3, 3)
    draws = Draws(torch.arange(40) % 2 == 1, torch.rand(40).double())
    sampled = consumer(40, weight)
    sampled.add(inputs, draws)
    assert (
        sampled.sampling is not None and sampled.sampling.stride == 8
    )  # 64 positions of 40 images, 36 features
    columns = nn.functional.unfold(inputs, 3, padding=1, stride=2)  # (40, 36, 64)
    at = positions.places(draws.starts, 40 * 64, 8, None)
    chosen = columns.transpose(1, 2).reshape(-1, 36)[at].double()
    in_second = draws.second_half[at // 64]
    sampled.finish(ALONE)
    for sums, half in zip(sampled.sums, (~in_second, in_second), strict=True):
        torch.testing.assert_close(
            sums.gram, 8 * chosen[half].T @ chosen[half], rtol=1e-5, atol=1e-4
        )
        assert sums.positions == 8 * int(half.sum())


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("sequential", [True, False])
def test_a_sample_gives_about_the_same(sequential: bool) -> None:
    """Its losses are close to those of all positions, and its units nearly as good."""
    model, data = residual(), images(256)
    sampled = greedyprune.select(model, data, objective=Imitation(sequential=sequential))
    exact = greedyprune.select(
        model, data, objective=Imitation(sequential=sequential, exact_losses=True)
    )
    for name, layer in exact.layers.items():
        assert not layer.losses.equal(sampled.layers[name].losses)
        torch.testing.assert_close(sampled.layers[name].losses, layer.losses, rtol=0.25, atol=0)
    outputs = model(data)
    errors = [
        float((greedyprune.prune(model, one)(data) - outputs).square().mean())
        for one in (exact, sampled)
    ]
    assert errors[1] < 1.3 * errors[0]


def test_exact_losses_are_the_default_where_their_sums_take_little_time(
    monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    model, data = residual(), images()
    selection = greedyprune.select(model, data)
    monkeypatch.setattr(positions, "CHEAP", 0)
    monkeypatch.setattr(positions, "ROWS", 8)
    same(greedyprune.select(model, data, objective=Imitation(exact_losses=True)), selection)
    sampled = greedyprune.select(model, data)
    assert any(
        not layer.losses.equal(selection.layers[name].losses)
        for name, layer in sampled.layers.items()
    )


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("sequential", [True, False])
def test_batches_make_no_difference(sequential: bool) -> None:
    model, data = residual(), images()
    objective = Imitation(sequential=sequential)
    whole = greedyprune.select(model, data, objective=objective)
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(1))
    shuffled = list(data[order].split(13))
    same(greedyprune.select(model, shuffled, objective=objective), whole)
    same(greedyprune.select(model, data, objective=objective), whole)


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("sequential", [True, False])
def test_an_iterator_has_all_positions(sequential: bool) -> None:
    """Their number is unknown."""
    model, data = residual(), images()
    objective = Imitation(sequential=False)
    once = greedyprune.select(model, iter(data.split(32)), objective=objective, layers=["first"])
    exact = greedyprune.select(
        model, data, objective=Imitation(sequential=sequential, exact_losses=True),
        layers=["first"],
    )  # fmt: skip
    same(once, exact)


@pytest.mark.usefixtures("few_rows")
def test_refit_on_a_sample_is_nearly_as_good() -> None:
    model, data = residual(), images(256)
    selection = greedyprune.select(model, data, objective=Imitation(exact_losses=True))
    outputs, errors = model(data), []
    for rows in (32, 10**9):
        positions.ROWS = rows
        small = greedyprune.refit(model, selection, data)
        errors.append(float((small(data) - outputs).square().mean()))
    assert errors[0] != errors[1] and errors[0] < 1.3 * errors[1]


@pytest.mark.usefixtures("few_rows", "at_once")
@pytest.mark.parametrize("sequential", [True, False])
def test_a_resumed_selection_has_the_same_positions(tmp_path: Path, sequential: bool) -> None:
    """Also where the batch that would decide their share differs from the first one."""
    model, objective = residual(), Imitation(sequential=sequential)
    data = [images(size=16), images(size=24), images(size=16)]
    expected, at = greedyprune.select(model, data, objective=objective), 2

    def run() -> greedyprune.Selection:
        return greedyprune.select(
            model, data, objective=objective, checkpoint=tmp_path / f"{at}"
        )  # fmt: skip

    while stopped(at, run):
        check_same(run(), expected, exactly=True)
        at += 1 if at < 8 else 7
    assert at > 4
