"""The inputs of the benchmarks: random candidates, and networks trained on images of digits."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from baselines import Candidates, Layer
from mnist_mlp import binary, evenly, read_mnist
from torch import Tensor, nn
from torch.nn import functional
from training import train

BATCH = 1024  # samples per batch of the dense forward pass that selections are compared with
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": functional.mse_loss,
    "cross_entropy": functional.cross_entropy,
}


@dataclass(frozen=True)
class Network:
    """A two-layer network and its data; source: where the data are from."""

    kind: str
    model: nn.Sequential
    inputs: Tensor
    targets: Tensor
    source: str

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return self.inputs, self.targets

    def forward(self) -> Tensor:
        """The dense model's outputs (m, C)."""
        with torch.no_grad():
            return torch.cat([self.model(part) for part in self.inputs.split(BATCH)])

    def loss(self) -> float:
        return float(LOSSES[self.kind](self.forward(), self.targets))

    def layer(self) -> Layer:
        """The hidden layer and its features, for the baselines."""
        consumer = self.model[2]
        assert isinstance(consumer, nn.Linear)
        features = torch.empty(consumer.in_features, len(self.inputs))
        with torch.no_grad():
            for i in range(0, len(self.inputs), BATCH):
                features[:, i : i + BATCH] = self.model[:2](self.inputs[i : i + BATCH]).T
        outgoing = consumer.weight.detach().double().T * consumer.in_features
        return Layer(self.kind, features, outgoing, consumer.bias.detach(), self.targets)


def candidates(kind: str, m: int, n: int, c: int) -> Candidates:
    """Random features of a ReLU layer, and outputs of the same magnitude as their contributions."""
    torch.manual_seed(0)
    features, outgoing, base = torch.randn(n, m).relu_(), torch.randn(n, c), torch.randn(m, c)
    targets = {
        "mse": lambda: torch.randn(m, c),
        "bce_with_logits": lambda: torch.rand(m, c),
        "cross_entropy": lambda: torch.randint(c, (m,)),
    }[kind]()
    return Candidates(kind, features, outgoing, base, targets)


def network(kind: str, units: int, samples: int, iterations: int = 300) -> Network:
    """A network 784 -> units -> 1 for binary labels (mse), or -> 10 for digits (cross_entropy)."""
    images, digits, source = _digits()
    torch.manual_seed(0)
    at = evenly(digits, samples)
    targets = binary(digits) if kind == "mse" else digits
    model = _trained(kind, units, iterations)
    return Network(kind, model, images[at], targets[at], source)


@lru_cache(maxsize=2)
def _trained(kind: str, units: int, iterations: int) -> nn.Sequential:
    """A network trained on all data, for this many batches of 128."""
    images, digits, _ = _digits()
    torch.manual_seed(0)
    outputs, targets = (1, binary(digits)) if kind == "mse" else (10, digits)
    model = nn.Sequential(nn.Linear(784, units), nn.ReLU(), nn.Linear(units, outputs))
    # A step changes the outputs in proportion to the number of units; hence the smaller rate.
    lr = min(0.01, 40 / units)
    train(model, (images, targets), LOSSES[kind], iterations, lr, momentum=0.9)
    return model


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor, str]:
    """Images (60000, 784) in [0, 1], digits (60000,), and where they are from."""
    folder = Path(os.environ.get("GREEDYPRUNE_DATA", "")) / "MNIST" / "raw"
    if "GREEDYPRUNE_DATA" in os.environ and folder.is_dir():
        return *read_mnist(folder, "train"), "MNIST"
    torch.manual_seed(0)
    digits = torch.randint(10, (60_000,))
    centres = torch.rand(10, 784) * (torch.rand(10, 784) < 0.3)
    images = torch.empty(60_000, 784).normal_(std=0.3)
    for digit, centre in enumerate(centres):
        images[digits == digit] += centre
    return images.clamp_(0, 1), digits, "generated data of MNIST's shape"
