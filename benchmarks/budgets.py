"""Sizes for a budget against one share of all layers, at equal FLOPs, on trained CIFAR networks.

    python benchmarks/budgets.py --data DIR [--networks resnet20 vgg] [--keep 0.5 0.25]
        [--seeds 0 1 2]

DIR has the standard Python batches (cifar-10-batches-py). For each share of the channels that
`--keep` names, the other sizes are chosen for the FLOPs that it leaves: by the layers' own errors,
and by what the network's outputs lose (`Budget(trials=)`, five trials for each layer). "Resized"
sizes are cut from whole paths by `Selection.resize`. Prints the test accuracy after `select` and
after `refit` for each draw of 1024 training images, and the time of `select` or `resize`, each row
as soon as it is known.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import greedyprune
from greedyprune import Budget

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar import NETWORKS, accuracy, kept, read_cifar

IMAGES, TRIALS = 1024, 5  # TRIALS: for each layer
Data = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet20", "vgg"])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    held_out = read_cifar(args.data, "test")
    print("| network | channels kept | draw | sizes | FLOPs left | select | then refit | seconds |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for network, model, inner, seed, data in draws(args.data, args.networks, args.seeds):
        rows = Rows(network, model, data, held_out, seed, inner)
        for keep in args.keep:
            selection = rows.selected(keep, "one share", keep)
            dense, left = selection.change("flops") or (1, 1)
            for name, trials in (("own", 0), ("trials", TRIALS * len(selection.layers))):
                rows.selected(keep, name, Budget(flops=left / dense, trials=trials))
                rows.resized(keep, name, Budget(flops=left / dense), trials)


def draws(
    folder: Path, networks: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[str, nn.Module, list[str] | None, int, Data]]:
    """A network's name, the network, its inner layers (None: all), a seed and its images."""
    images, labels = read_cifar(folder, "train")
    for network in networks:
        model = kept(network)
        inner = [name for name, _ in model.named_modules() if name.endswith("conv1")] or None
        for seed in seeds:
            torch.manual_seed(seed)
            some = torch.randperm(len(images))[:IMAGES]
            yield network, model, inner, seed, (images[some], labels[some])


class Rows:
    """Prints the rows of one draw of images."""

    def __init__(
        self, network: str, model: nn.Module, data: Data, held_out: Data, seed: int,
        layers: list[str] | None,
    ) -> None:  # fmt: skip
        self.network, self.model, self.seed = network, model, seed
        self.data, self.held_out, self.layers = data, held_out, layers
        self.whole = dict[str, greedyprune.Selection]()

    def selected(self, keep: float, name: str, size: float | Budget) -> greedyprune.Selection:
        start = time.perf_counter()
        selection = greedyprune.select(
            self.model, self.data, layers=self.layers, size=size, progress=False
        )
        self.show(keep, name, selection, time.perf_counter() - start)
        return selection

    def resized(self, keep: float, name: str, budget: Budget, trials: int) -> None:
        """Whole paths, from which every budget of this draw is cut."""
        if name not in self.whole:
            self.whole[name] = greedyprune.select(
                self.model, self.data, layers=self.layers,
                size=Budget(flops=1.0, trials=trials), progress=False,
            )  # fmt: skip
        start = time.perf_counter()
        selection = self.whole[name].resize(budget)
        self.show(keep, f"{name}, resized", selection, time.perf_counter() - start)

    def show(
        self, keep: float, name: str, selection: greedyprune.Selection, seconds: float
    ) -> None:
        dense, left = selection.change("flops") or (1, 1)
        small = greedyprune.prune(self.model, selection)
        refitted = greedyprune.refit(self.model, selection, self.data, progress=False)
        print(
            f"| {self.network} | {keep:g} | {self.seed} | {name} | {left / dense:.4f} | "
            f"{accuracy(small, self.held_out):.2%} | {accuracy(refitted, self.held_out):.2%} | "
            f"{seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
