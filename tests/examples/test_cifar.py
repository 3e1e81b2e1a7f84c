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
    some = torch.randperm(len(images))[:512]
    data = images[some], labels[some]
    held_out = tuple(part[:2000] for part in read_cifar(folder, "test"))
    model = kept()
    dense = accuracy(model, held_out)
    assert dense > 0.84
    layers = [name for name, _ in model.named_modules() if name.endswith("conv1")]
    found = {}
    for how, options in {
        "counts": {"weights": "counts", "objective": Imitation(sequential=False)},
        "refit": {"objective": Imitation(sequential=False)},
        "in sequence": {},
    }.items():
        selection = greedyprune.select(model, data, layers=layers, **options)
        found[how] = accuracy(greedyprune.prune(model, selection), held_out)
    assert found["in sequence"] > dense - 0.08
    assert found["in sequence"] > found["refit"] > found["counts"] + 0.1
    quarter = greedyprune.select(model, data, layers=layers, size=0.25)
    pruned = accuracy(greedyprune.prune(model, quarter), held_out)
    assert accuracy(greedyprune.refit(model, quarter, data), held_out) > pruned + 0.03
