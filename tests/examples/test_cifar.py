"""The kept ResNet-20 on CIFAR-10: what pruning leaves of a trained deep network."""

import os
import sys
from pathlib import Path

import pytest
import torch

import greedyprune
from greedyprune import Imitation

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from cifar import accuracy, kept, read_cifar


def test_some_of_a_resnet20() -> None:
    folder = Path(os.environ.get("GREEDYPRUNE_DATA", "")) / "cifar-10-batches-py"
    if "GREEDYPRUNE_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("no CIFAR-10 in $GREEDYPRUNE_DATA")
    images, labels = read_cifar(folder, "train")
    torch.manual_seed(0)
    chosen = torch.randperm(len(images))[:512]
    data = images[chosen], labels[chosen]
    held_out = tuple(part[:2000] for part in read_cifar(folder, "test"))
    model = kept()
    dense = accuracy(model, held_out)
    assert dense > 0.84
    layers = [name for name, _ in model.named_modules() if name.endswith("conv1")]
    accuracies = {}
    for how, options in {
        "counts": {"weights": "counts", "objective": Imitation(sequential=False)},
        "refit": {"objective": Imitation(sequential=False)},
        "in sequence": {},
    }.items():
        selection = greedyprune.select(model, data, layers=layers, **options)
        accuracies[how] = accuracy(greedyprune.prune(model, selection), held_out)
    assert accuracies["in sequence"] > dense - 0.08
    assert accuracies["in sequence"] > accuracies["refit"] > accuracies["counts"] + 0.1
    quarter = greedyprune.select(model, data, layers=layers, size=0.25)
    pruned = accuracy(greedyprune.prune(model, quarter), held_out)
    assert accuracy(greedyprune.refit(model, quarter, data), held_out) > pruned + 0.03
