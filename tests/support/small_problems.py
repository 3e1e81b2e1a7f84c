"""Small networks with their data, to select from with any options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import greedyprune
from greedyprune import Selection


class Problem:
    """A small network, its data, and the options of `select` that every case shares."""

    def __init__(self, model: nn.Module, targets: str, **options: Any) -> None:
        torch.manual_seed(0)
        inputs = torch.randn(120, 6)
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        with torch.no_grad():  # so that every class is the largest output of some samples
            last.weight *= 3
            last.bias -= model(inputs).mean(0)
        numbers = model(inputs).detach() + 0.3 * torch.randn(120, 3)
        self.model, self.options = model, options
        self.data = inputs, numbers if targets == "numbers" else numbers.argmax(1)

    def select(self, **options: Any) -> Selection:
        return greedyprune.select(self.model, self.data, **(self.options | options), progress=False)


def one_layer(targets: str = "classes", **options: Any) -> Problem:
    """One hidden layer, whose consumer gives the model's output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    return Problem(model, targets, **({"size": 8} | options))


def inner(targets: str = "classes", **options: Any) -> Problem:
    """Two hidden layers; the first one's consumer is inside the network."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    return Problem(model, targets, **({"size": 6, "layers": "0"} | options))


def both(targets: str = "classes", **options: Any) -> Problem:
    return inner(targets, **({"layers": None} | options))


def images(targets: str = "classes", **options: Any) -> Problem:
    """Convolutions, of which the first feeds another."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    return Problem(model, targets, **({"size": 4} | options))


def same(one: Selection, other: Selection) -> bool:
    """Do both keep the same units with the same weights, and say the same of them?"""
    assert list(one.layers) == list(other.layers)
    for name, layer in one.layers.items():
        second = other.layers[name]
        if not (layer.order.equal(second.order) and layer.losses.equal(second.losses)):
            return False
        if not layer.weights.equal(second.weights):
            return False
    return True


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(1) == targets).double().mean())
