"""Several processes select what one does on all their data: contract, invariant 5."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from processes import Raised, Team, group_of
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune import Selection

pytestmark = pytest.mark.filterwarnings("ignore:loss. a function of your own")

PARTS = {2: [150, 90], 4: [37, 0, 150, 53]}  # samples on each rank: uneven, none
BATCHES = [64, 40, 32, 25]  # samples a batch there
SAMPLES = 240


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    team = Team(4)
    yield team
    team.close()


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    targets: str
    options: dict[str, Any]


def mlp(outputs: int = 5, hidden: int = 48) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5)
    )


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 10, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(40, 5),
    )  # fmt: skip


def absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    """No mean over samples: the root of one."""
    return (outputs - targets).square().mean().sqrt()


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(1) == targets).double().mean())


CASES = {
    "cross-entropy": Case(mlp, "classes", {"steps": 30}),
    "cross-entropy, sizes": Case(mlp, "classes", {"size": 20}),
    "cross-entropy, candidates": Case(mlp, "classes", {"steps": 20, "candidates": 9}),
    "cross-entropy, mini-batches": Case(
        mlp, "classes", {"steps": 20, "batch_size": 50, "shortlist": 4}
    ),
    "cross-entropy, one sample a step": Case(mlp, "classes", {"steps": 9, "batch_size": 1}),
    "cross-entropy, streamed": Case(mlp, "classes", {"steps": 9, "memory_limit": 5000}),
    "cross-entropy, tolerance": Case(mlp, "classes", {"tolerance": 0.05, "weights": "uniform"}),
    "smoothed labels": Case(
        mlp, "classes", {"steps": 9, "loss": nn.CrossEntropyLoss(label_smoothing=0.1)}
    ),
    "class weights, ignored labels": Case(
        mlp, "classes",
        {"steps": 9, "loss": nn.CrossEntropyLoss(torch.arange(5) / 4 + 0.5, ignore_index=3)},
    ),
    "logistic": Case(mlp, "shares", {"steps": 12, "loss": "bce_with_logits"}),
    "squared error": Case(mlp, "numbers", {"steps": 60}),
    "squared error, columns": Case(lambda: mlp(hidden=400), "numbers", {"steps": 12}),
    "squared error, streamed": Case(mlp, "numbers", {"steps": 40, "memory_limit": 30_000}),
    "squared error, streamed columns": Case(
        mlp, "numbers", {"steps": 9, "memory_limit": 9_000}
    ),
    "squared error, refit": Case(mlp, "numbers", {"size": 12, "weights": "refit"}),
    "squared error, candidates": Case(mlp, "numbers", {"steps": 20, "candidates": 9}),
    "reference": Case(mlp, "classes", {"steps": 9, "backend": "reference"}),
    "a loss of one's own": Case(mlp, "numbers", {"steps": 5, "loss": absolute}),
    "imitation": Case(mlp, "classes", {"size": 12, "objective": "imitation"}),
    "imitation, mini-batches": Case(
        mlp, "classes", {"size": 12, "objective": "imitation", "batch_size": 32}
    ),
    "in sequence": Case(cnn, "classes", {"size": 0.5}),
    "in sequence, all layers": Case(two_layers, "classes", {"size": 0.5, "swaps": 0}),
    "by themselves": Case(cnn, "classes", {"size": 0.5, "sequential": False}),
    "counts": Case(cnn, "classes", {"steps": 9, "weights": "counts"}),
    "gates": Case(cnn, "classes", {"size": 0.5, "objective": "fisher"}),
    "gates, a loss of one's own": Case(
        two_layers, "numbers", {"size": 0.5, "objective": "fisher", "loss": functional.l1_loss}
    ),
    "budget": Case(cnn, "classes", {"budget": {"flops": 0.5}}),
    "budget, gates": Case(cnn, "classes", {"budget": {"params": 0.6}, "objective": "fisher"}),
    "the network's loss": Case(cnn, "classes", {"size": 3, "objective": "loss"}),
    "the network's loss, refit": Case(
        cnn, "classes", {"size": 3, "objective": "loss", "weights": "refit"}
    ),
    "the network's loss, mini-batches": Case(
        cnn, "classes", {"size": 3, "objective": "loss", "batch_size": 40, "candidates": 5}
    ),
    "the network's loss, screened": Case(
        cnn, "classes", {"size": 3, "objective": "loss", "screen": 3}
    ),
    "the network's loss, one's own": Case(
        two_layers, "numbers", {"size": 2, "objective": "loss", "loss": absolute, "screen": 4}
    ),
    "the network's loss, a metric": Case(
        cnn, "classes", {"tolerance": 0.3, "objective": "loss", "metric": accuracy}
    ),
}  # fmt: skip


def tensors(kind: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    inputs = torch.randn(SAMPLES, 12)
    classes = inputs[:, :5].argmax(1)
    if kind == "classes":
        return inputs, classes
    if kind == "shares":
        return inputs, (inputs[:, :5] > 0.3).float()
    return inputs, inputs[:, :5] + inputs[:, 5:10] ** 2


def batches_of(data: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    inputs, targets = data
    return list(zip(inputs.split(size), targets.split(size), strict=True)) if len(inputs) else []


def select(rank: int, size: int, name: str, parallel: str = "data") -> Selection:
    case = CASES[name]
    inputs, targets = tensors(case.targets)
    data: object = batches_of((inputs, targets), 60)
    if parallel == "data":
        start = sum(PARTS[size][:rank])
        own = slice(start, start + PARTS[size][rank])
        data = batches_of((inputs[own], targets[own]), BATCHES[rank])
    return greedyprune.select(
        case.model(), data, process_group=group_of(size), parallel=parallel, **case.options
    )


def alone(name: str) -> Selection:
    case = CASES[name]
    data = batches_of(tensors(case.targets), 60)
    return greedyprune.select(case.model(), data, **case.options)


def check_same(found: Selection, expected: Selection, exactly: bool = False) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 2e-6, "atol": 1e-8}
    assert list(found.layers) == list(expected.layers)
    for name, layer in expected.layers.items():
        other = found.layers[name]
        assert other.order.tolist() == layer.order.tolist(), name
        assert (other.weighting, other.objective) == (layer.weighting, layer.objective)
        for key in ("counts", "kept", "distinct"):
            assert torch.equal(getattr(other, key), getattr(layer, key))
        for key in ("losses", "dense_loss", "bound", "gap"):
            one, two = getattr(other, key), getattr(layer, key)
            assert (one is None) == (two is None), key
            if one is not None:
                torch.testing.assert_close(one, two, **tolerance)
        torch.testing.assert_close(
            other.weights, layer.weights, rtol=0 if exactly else 1e-3, atol=0 if exactly else 1e-5
        )
    assert found.change("flops") is not None and found.change("params") is not None


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_parts_of_the_data(team: Team, name: str, size: int) -> None:
    found = team.results(size, select, size, name)
    for each in found[1:]:
        check_same(each, found[0], exactly=True)
    check_same(found[0], alone(name))


@pytest.mark.parametrize("name", CASES)
def test_parts_of_the_work(team: Team, name: str) -> None:
    found = team.results(4, select, 4, name, "units")
    for each in found[1:]:
        check_same(each, found[0], exactly=True)
    check_same(found[0], alone(name))


def test_one_by_itself(team: Team) -> None:
    """No other rank is waited for."""
    found = team.results(2, by_itself)
    check_same(found[0], alone("cross-entropy"))
    assert found[1] is None


def by_itself(rank: int) -> Selection | None:
    case = CASES["cross-entropy"]
    if rank == 1:
        return None
    data = batches_of(tensors(case.targets), 60)
    return greedyprune.select(case.model(), data, parallel="none", **case.options)


assert Raised
