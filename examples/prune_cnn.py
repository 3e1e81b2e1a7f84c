"""Prunes the channels of a trained network on CIFAR-10 in several ways, without fine-tuning.

    python examples/prune_cnn.py --data DIR [--network resnet20 | vgg] [--images 1024] [--seed 0]

DIR has the standard Python batches (cifar-10-batches-py). In the ResNet-20 the inner channels of
all blocks are pruned, in the VGG all channels. Prints the test accuracies for
- the theory's weights and for refitted weights, selecting each layer by itself or in sequence,
- exchanges of kept channels for others (the default), also in the Fisher metric,
- selection by gates, and by the true loss,
- all layers refitted together afterwards, with and without epochs of training.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import rich
import torch
from cifar import NETWORKS, accuracy, kept, read_cifar
from rich.table import Table
from torch import Tensor, nn

import greedyprune
from greedyprune import Imitation, Loss

HOW: dict[str, dict[str, Any]] = {
    "counts, by itself": {"weights": "counts", "objective": Imitation(sequential=False)},
    "counts, in sequence": {"weights": "counts", "objective": "imitation"},
    "refit, by itself": {"objective": Imitation(sequential=False, swaps=0)},
    "refit, in sequence": {"objective": Imitation(swaps=0)},
    "refit, in sequence, exchanges": {"objective": "imitation"},
    "the same, metric='fisher'": {"objective": Imitation(metric="fisher")},
    "gates": {"objective": "fisher"},
    "true loss": {
        "objective": Loss(candidates=8, draw="gradient", batch_size=128), "weights": "none"
    },
}  # fmt: skip
REFIT = {name: [0] for name in list(HOW)[-4:]}  # epochs of greedyprune.refit after the selection
REFIT["refit, in sequence, exchanges"] += [20]


def row(
    table: Table, keep: float, name: str, small: nn.Module, held_out: tuple[Tensor, Tensor],
    seconds: float,
) -> None:  # fmt: skip
    count = sum(p.numel() for p in small.parameters())
    table.add_row(
        f"{keep:g}", name, f"{count:,}", f"{accuracy(small, held_out):.2%}", f"{seconds:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--images", type=int, default=1024, help="training images to select on")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    images, labels = read_cifar(args.data, "train")
    some = torch.randperm(len(images))[: args.images]
    data, held_out = (images[some], labels[some]), read_cifar(args.data, "test")
    model = kept(args.network)
    inner = [name for name, _ in model.named_modules() if name.endswith("conv1")] or None
    table = Table(title=f"{args.network} on CIFAR-10, dense {accuracy(model, held_out):.2%}")
    for column in ("channels kept", "selection", "parameters", "test accuracy", "s"):
        table.add_column(column, justify="left" if column == "selection" else "right")
    for keep in args.keep:
        for name, options in HOW.items():
            start = time.perf_counter()
            selection = greedyprune.select(model, data, layers=inner, size=keep, **options)
            seconds = time.perf_counter() - start
            row(table, keep, name, greedyprune.prune(model, selection), held_out, seconds)
            for epochs in REFIT.get(name, []):
                what = f"all layers and {epochs} epochs" if epochs else "all layers"
                start = time.perf_counter()
                small = greedyprune.refit(model, selection, data, epochs=epochs)
                whole = seconds + time.perf_counter() - start
                row(table, keep, f"{name}, then {what}", small, held_out, whole)
    rich.print(table)


if __name__ == "__main__":
    main()
