"""The trained ResNet-20 pruned by Torch-Pruning, with its importances and with ours, not tuned.

    python examples/torch_pruning_resnet20.py --data DIR [--images 1024] [--ratio 0.25 0.5]

DIR has CIFAR-10's Python batches. All methods remove the same number of channels: of the inner
layers of the blocks, or of every layer, with the residual stream. Needs torch-pruning.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich
import torch
import torch_pruning as tp
from cifar import accuracy, kept_resnet20, read_cifar
from rich.table import Table
from torch import Tensor, nn

import greedyprune
from greedyprune.integrations.torch_pruning import GreedyImportance

IMPORTANCES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "magnitude": lambda model, images: tp.importance.MagnitudeImportance(),
    "BN scale": lambda model, images: tp.importance.BNScaleImportance(),
    "greedy": GreedyImportance,
}


def pruned(name: str, layers: str, ratio: float, images: Tensor) -> nn.Module:
    """The network without so many of the channels of its "inner" or "all" layers."""
    model = kept_resnet20()
    ignored = [
        module for at, module in model.named_modules()
        if isinstance(module, nn.Linear)
        or (layers == "inner" and isinstance(module, nn.Conv2d) and not at.endswith("conv1"))
    ]  # fmt: skip
    tp.pruner.BasePruner(
        model, images[:1], IMPORTANCES[name](model, images), pruning_ratio=ratio,
        ignored_layers=ignored,
    ).step()  # fmt: skip
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1024, help="training images to score on")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    images, held_out = read_cifar(args.data, "train")[0], read_cifar(args.data, "test")
    images = images[torch.randperm(len(images))[: args.images]]
    table = Table(title="ResNet-20 on CIFAR-10, pruned by Torch-Pruning, test accuracy")
    for column in ("layers", "removed", "importance", "parameters", "pruned", "and recalibrated"):
        table.add_column(column, justify="left" if column in ("layers", "importance") else "right")
    for layers, ratio, name in itertools.product(("inner", "all"), args.ratio, IMPORTANCES):
        model = pruned(name, layers, ratio, images)
        before = accuracy(model, held_out)
        after = accuracy(greedyprune.recalibrate(model, (images,)), held_out)
        count = sum(p.numel() for p in model.parameters())
        table.add_row(layers, f"{ratio:g}", name, f"{count:,}", f"{before:.2%}", f"{after:.2%}")
    rich.print(table)


if __name__ == "__main__":
    main()
