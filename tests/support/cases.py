"""Calls of `select` for tests of several processes and of checkpoints, and their comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from processes import group_of
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune import Budget, Imitation, Loss, Selection

PARTS = {2: [150, 90], 4: [37, 0, 150, 53]}  # samples on each rank: uneven, none

BATCHES = [64, 40, 32, 25]  # samples a batch there

SAMPLES = 240


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    targets: str
    options: dict[str, Any]


def mlp(outputs: int = 5, hidden: int = 48) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def twins(hidden: int = 48) -> nn.Module:
    """Units in pairs that float32 sums can't tell apart, and float64 can."""
    model, half = mlp(hidden=hidden), hidden // 2
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias, model[2].weight.T):
            tensor[half:] = tensor[:half] * (1 + 1e-6 * torch.randn(tensor[:half].shape))
    return model


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
    "cross-entropy, candidates": Case(
        mlp, "classes", {"steps": 20, "objective": Loss(candidates=9)}
    ),
    "cross-entropy, mini-batches": Case(
        mlp, "classes", {"steps": 20, "objective": Loss(batch_size=50, shortlist=4)}
    ),
    "cross-entropy, one sample a step": Case(
        mlp, "classes", {"steps": 9, "objective": Loss(batch_size=1)}
    ),
    "cross-entropy, streamed": Case(mlp, "classes", {"steps": 9, "memory_limit": 5000}),
    "cross-entropy, tolerance": Case(mlp, "classes", {"tolerance": 0.05, "weights": "uniform"}),
    "smoothed labels": Case(
        mlp, "classes", {"steps": 9, "loss": nn.CrossEntropyLoss(label_smoothing=0.1)}
    ),
    "smoothed labels, some parts ignored": Case(
        mlp, "few classes", {"steps": 9, "loss": nn.CrossEntropyLoss(label_smoothing=0.1)}
    ),
    "shares of classes, some parts whole": Case(
        mlp, "shares of classes", {"steps": 9, "loss": "cross_entropy"}
    ),
    "class weights, ignored labels": Case(
        mlp, "classes",
        {"steps": 9, "loss": nn.CrossEntropyLoss(torch.arange(5) / 4 + 0.5, ignore_index=3)},
    ),
    "cross-entropy, many units": Case(lambda: mlp(hidden=1300), "classes", {"steps": 12}),
    "cross-entropy, twins": Case(lambda: twins(), "classes", {"steps": 30}),
    "squared error, twins": Case(lambda: twins(), "numbers", {"steps": 60}),
    "squared error, twins in columns": Case(lambda: twins(400), "numbers", {"steps": 12}),
    "logistic": Case(mlp, "shares", {"steps": 12, "loss": "bce_with_logits"}),
    "squared error": Case(mlp, "numbers", {"steps": 60}),
    "squared error, columns": Case(lambda: mlp(hidden=400), "numbers", {"steps": 12}),
    "squared error, streamed": Case(mlp, "numbers", {"steps": 40, "memory_limit": 30_000}),
    "squared error, streamed columns": Case(
        mlp, "numbers", {"steps": 9, "memory_limit": 9_000}
    ),
    "squared error, refit": Case(mlp, "numbers", {"size": 12, "weights": "refit"}),
    "squared error, candidates": Case(
        mlp, "numbers", {"steps": 20, "objective": Loss(candidates=9)}
    ),
    "reference": Case(mlp, "classes", {"steps": 9, "backend": "reference"}),
    "a loss of one's own": Case(mlp, "numbers", {"steps": 5, "loss": absolute}),
    "a loss of one's own, mini-batches": Case(
        mlp, "numbers",
        {"steps": 5, "loss": absolute, "objective": Loss(batch_size=20, shortlist=3)},
    ),
    "imitation": Case(mlp, "classes", {"size": 12, "objective": "imitation"}),
    "imitation, columns": Case(
        lambda: mlp(hidden=300), "classes",
        {"steps": 12, "objective": "imitation", "weights": "counts", "memory_limit": 600_000},
    ),
    "in sequence": Case(cnn, "classes", {"size": 0.5}),
    "in sequence, all layers": Case(
        two_layers, "classes", {"size": 0.5, "objective": Imitation(swaps=0)}
    ),
    "by themselves": Case(
        cnn, "classes", {"size": 0.5, "objective": Imitation(sequential=False)}
    ),
    "counts": Case(cnn, "classes", {"steps": 9, "weights": "counts"}),
    "gates": Case(cnn, "classes", {"size": 0.5, "objective": "fisher"}),
    "gates, a loss of one's own": Case(
        two_layers, "numbers", {"size": 0.5, "objective": "fisher", "loss": functional.l1_loss}
    ),
    "budget": Case(cnn, "classes", {"size": Budget(flops=0.5)}),
    "budget, trials": Case(cnn, "classes", {"size": Budget(flops=0.5, trials=8)}),
    "budget, gates": Case(cnn, "classes", {"size": Budget(params=0.6), "objective": "fisher"}),
    "the network's loss": Case(cnn, "classes", {"size": 3, "objective": "loss"}),
    "the network's loss, refit": Case(
        cnn, "classes", {"size": 3, "objective": "loss", "weights": "refit"}
    ),
    "the network's loss, mini-batches": Case(
        cnn, "classes", {"size": 3, "objective": Loss(batch_size=40, candidates=5)}
    ),
    "the network's loss, by the gradient": Case(
        cnn, "classes", {"size": 3, "objective": Loss(candidates=3, draw="gradient")}
    ),
    "the network's loss, one's own": Case(
        two_layers, "numbers",
        {"size": 2, "loss": absolute, "objective": Loss(candidates=4, draw="gradient")},
    ),
    "the network's loss, a metric": Case(
        cnn, "classes", {"tolerance": 0.3, "objective": Loss(metric=accuracy)}
    ),
}  # fmt: skip


def tensors(kind: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    inputs = torch.randn(SAMPLES, 12)
    classes = inputs[:, :5].argmax(1)
    if kind == "classes":
        return inputs, classes
    known = PARTS[4][0] + PARTS[4][1]  # samples of the first ranks, or of some of the first of two
    if kind == "few classes":
        return inputs, classes.index_fill(0, torch.arange(known, SAMPLES), -100)
    if kind == "shares of classes":
        shares = functional.one_hot(classes, 5).float()
        shares[:known] = inputs[:known, :5].softmax(1)
        return inputs, shares
    if kind == "shares":
        return inputs, (inputs[:, :5] > 0.3).float()
    return inputs, inputs[:, :5] + inputs[:, 5:10] ** 2


def batches_of(data: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    inputs, targets = data
    return list(zip(inputs.split(size), targets.split(size), strict=True)) if len(inputs) else []


def part(rank: int, size: int, kind: str) -> list[tuple[Tensor, Tensor]]:
    inputs, targets = tensors(kind)
    start = sum(PARTS[size][:rank])
    samples = slice(start, start + PARTS[size][rank])
    return batches_of((inputs[samples], targets[samples]), BATCHES[rank])


def select(rank: int, size: int, name: str) -> Selection:
    case = CASES[name]
    outside = rank >= size
    data = batches_of(tensors(case.targets), 60) if outside else part(rank, size, case.targets)
    return greedyprune.select(case.model(), data, process_group=group_of(size), **case.options)


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


def kept_select(
    name: str, folder: Path | None = None, data: object = None, **more: Any
) -> Selection:
    """One process's call of a case, with a checkpoint."""
    case = CASES[name]
    data = batches_of(tensors(case.targets), 60) if data is None else data
    return greedyprune.select(case.model(), data, checkpoint=folder, **case.options | more)
