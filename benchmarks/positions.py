"""How many positions of its feature maps a layer's sums need, on trained CIFAR networks.

    python benchmarks/positions.py --data DIR [--networks resnet20 vgg] [--size 0.5]
        [--rows 4 16 64] [--seeds 0 1 2]

DIR has the standard Python batches (cifar-10-batches-py). `--rows` are positions for each feature
of a layer; all positions come first. Prints the test accuracy after `select` and after `refit` for
each draw of 1024 training images, the kept units that `select` has in common with that on all
positions, and the seconds that both take.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch

import greedyprune
from greedyprune.data import positions

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from budgets import draws
from cifar import NETWORKS, accuracy, read_cifar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet20", "vgg"])
    parser.add_argument("--size", type=float, default=0.5)
    parser.add_argument("--rows", type=float, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    held_out = read_cifar(args.data, "test")
    positions.CHEAP = 0  # also in layers whose sums take little time
    print("| network | draw | rows | select | then refit | units in common | select | refit |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for network, model, inner, seed, data in draws(args.data, args.networks, args.seeds):
        whole = None
        for rows in (math.inf, *args.rows):
            positions.ROWS = rows
            start = time.perf_counter()
            selection = greedyprune.select(
                model, data, layers=inner, size=args.size, progress=False
            )
            middle = time.perf_counter()
            refitted = greedyprune.refit(model, selection, data, progress=False)
            end = time.perf_counter()
            whole = whole or selection
            small = greedyprune.prune(model, selection)
            print(
                f"| {network} | {seed} | {rows:g} | {accuracy(small, held_out):.2%} | "
                f"{accuracy(refitted, held_out):.2%} | {in_common(whole, selection):.1%} | "
                f"{middle - start:.1f} | {end - middle:.1f} |",
                flush=True,
            )


def in_common(whole: greedyprune.Selection, other: greedyprune.Selection) -> float:
    """The share of the kept units of one selection that another one keeps, too."""
    same = sum(
        int(torch.isin(layer.kept, other.layers[name].kept).sum())
        for name, layer in whole.layers.items()
    )
    return same / sum(len(layer.kept) for layer in whole.layers.values())


if __name__ == "__main__":
    main()
