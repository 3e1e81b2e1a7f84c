"""Prunes the trained ResNet-20 by Torch-Pruning, with its importances and with ours, and by select.

    python examples/torch_pruning_resnet20.py --data DIR [--images 1024] [--ratio 0.25 0.5]

DIR has CIFAR-10's Python batches. All methods remove the same number of channels, either from the
inner layers of the blocks or from every layer, the residual stream included. "magnitude, refit" is
greedyprune.refit of what Torch-Pruning's magnitude has cut. Prints the test accuracies after
pruning, after computing the batch norm statistics again, and then after the same
few iterations of SGD. Needs torch-pruning.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich
import torch
import torch_pruning as tp
from cifar import accuracy, augmented, kept, read_cifar
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import greedyprune
from greedyprune.integrations.torch_pruning import GreedyImportance

Data = tuple[Tensor, Tensor]


def taylor(model: nn.Module, data: Data) -> Any:
    functional.cross_entropy(model(data[0]), data[1]).backward()
    return tp.importance.TaylorImportance()


def hessian(model: nn.Module, data: Data) -> Any:
    importance = tp.importance.HessianImportance()
    for image, label in zip(data[0].split(1), data[1].split(1), strict=True):
        model.zero_grad()
        functional.cross_entropy(model(image), label).backward()
        importance.accumulate_grad(model)
    return importance


IMPORTANCES: dict[str, Callable[[nn.Module, Data], Any]] = {
    "random": lambda model, data: tp.importance.RandomImportance(),
    "magnitude": lambda model, data: tp.importance.MagnitudeImportance(),
    "BN scale": lambda model, data: tp.importance.BNScaleImportance(),
    "Taylor": taylor,
    "Hessian": hessian,
    "greedy": lambda model, data: GreedyImportance(model, data[0]),
}
OURS = {"select, prune": greedyprune.prune, "select, refit": greedyprune.refit}
METHODS = [*IMPORTANCES, "magnitude, refit", *OURS]


def pruned(name: str, layers: str, ratio: float, data: Data) -> nn.Module:
    """The network without the share `ratio` of the channels in its "inner" or "all" layers."""
    model = kept()
    inner = [at for at, _ in model.named_modules() if at.endswith("conv1")]
    if name in OURS:
        chosen = inner if layers == "inner" else "all"
        selection = greedyprune.select(
            model, data, layers=chosen, size=1 - ratio, objective="imitation"
        )
        if name == "select, refit":
            return greedyprune.refit(model, selection, data)
        return greedyprune.prune(model, selection)
    importance, _, refits = name.partition(", ")
    ignored = [
        module for at, module in model.named_modules()
        if isinstance(module, nn.Linear)
        or (layers == "inner" and isinstance(module, nn.Conv2d) and at not in inner)
    ]  # fmt: skip
    tp.pruner.BasePruner(
        model, data[0][:1], IMPORTANCES[importance](model, data), pruning_ratio=ratio,
        ignored_layers=ignored,
    ).step()  # fmt: skip
    model.zero_grad()
    return greedyprune.refit(kept(), model, data[0]) if refits else model


def tuned(model: nn.Module, data: Data, iterations: int) -> nn.Module:
    """A copy of the model after some iterations of SGD; every model gets the same batches."""
    model = copy.deepcopy(model).train()
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # for the random shifts of the images
    optimiser = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    for _ in range(iterations):
        some = torch.randint(len(data[0]), (128,), generator=rng)
        loss = functional.cross_entropy(model(augmented(data[0][some])), data[1][some])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1024, help="training images to score on")
    parser.add_argument("--layers", choices=("inner", "all"), nargs="+", default=["inner", "all"])
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--iterations", type=int, default=100, help="of tuning, 128 images each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    images, held_out = read_cifar(args.data, "train"), read_cifar(args.data, "test")
    some = torch.randperm(len(images[0]))[: args.images]
    data = images[0][some], images[1][some]
    table = Table(title="ResNet-20 on CIFAR-10, test accuracy")
    for column in ("layers", "removed", "how", "parameters", "pruned", "BN again", "tuned"):
        table.add_column(column, justify="left" if column in ("layers", "how") else "right")
    for layers, ratio in itertools.product(args.layers, args.ratio):
        for name in args.methods:
            model = pruned(name, layers, ratio, data)
            count = sum(p.numel() for p in model.parameters())
            found = [accuracy(model, held_out)]
            # Refitted weights assume the old batch norm statistics; fine-tuning changes both.
            greedyprune.recalibrate(model, data[:1])
            found.append(accuracy(model, held_out))
            found.append(accuracy(tuned(model, images, args.iterations), held_out))
            shown = (f"{each:.2%}" for each in found)
            table.add_row(layers, f"{ratio:g}", name, f"{count:,}", *shown)
    rich.print(table)


if __name__ == "__main__":
    main()
