"""Sizes for a budget against one share of all layers, at equal FLOPs, on trained CIFAR networks.

    python benchmarks/budgets.py --data DIR [--networks resnet20 vgg] [--keep 0.5 0.25]
        [--seeds 0 1 2]

DIR has the standard Python batches (cifar-10-batches-py). For each share of the channels that
`--keep` names, the other sizes are chosen for the FLOPs that it leaves: by the layers' own errors,
and by what the network's outputs lose (`Budget(trials=)`, five trials for each layer). Prints the
test accuracy after `select` and after `refit` for each draw of 1024 training images, and the time
of `select`, each row as soon as it is known.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

import greedyprune
from greedyprune import Budget

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar import NETWORKS, accuracy, kept, read_cifar

IMAGES, TRIALS = 1024, 5  # TRIALS: for each layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet20", "vgg"])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    images, labels = read_cifar(args.data, "train")
    held_out = read_cifar(args.data, "test")
    print("| network | channels kept | draw | sizes | FLOPs left | select | then refit | seconds |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for network in args.networks:
        model = kept(network)
        inner = [name for name, _ in model.named_modules() if name.endswith("conv1")] or None
        for keep in args.keep:
            for seed in args.seeds:
                torch.manual_seed(seed)
                some = torch.randperm(len(images))[:IMAGES]
                data = images[some], labels[some]
                share, count = 0.0, 0
                for sizes in ("one share", "own errors", "trials"):
                    size: float | Budget = keep
                    if sizes != "one share":
                        trials = TRIALS * count if sizes == "trials" else 0
                        size = Budget(flops=share, trials=trials)
                    start = time.perf_counter()
                    selection = greedyprune.select(
                        model, data, layers=inner, size=size, progress=False
                    )
                    seconds = time.perf_counter() - start
                    dense, left = selection.change("flops") or (1, 1)
                    if sizes == "one share":
                        share, count = left / dense, len(selection.layers)
                    small = greedyprune.prune(model, selection)
                    refitted = greedyprune.refit(model, selection, data, progress=False)
                    print(
                        f"| {network} | {keep:g} | {seed} | {sizes} | {left / dense:.4f} | "
                        f"{accuracy(small, held_out):.2%} | {accuracy(refitted, held_out):.2%} | "
                        f"{seconds:.1f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
