"""Latency budgets on trained CIFAR networks: the latency that was asked for, and the measured one.

    python benchmarks/latency_budgets.py --data DIR

DIR has the standard Python batches (cifar-10-batches-py). Selects on 512 training images in batches
of 128, prunes, and times the pruned network against the dense one again. Alone on the machine.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from pathlib import Path

import torch
from torch import nn

import greedyprune
from greedyprune import Budget
from greedyprune.data.batches import Batch
from greedyprune.latency import medians

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar import NETWORKS, kept, read_cifar

BATCH, IMAGES = 128, 512


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet20", "vgg"])
    parser.add_argument("--latency", type=float, nargs="+", default=[0.8, 0.6])
    args = parser.parse_args()
    images = read_cifar(args.data, "train")[0][:IMAGES]
    batch = Batch((images[:BATCH],), {}, None)
    print("| network | runs | asked | reached | measured again | FLOPs left |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for network, deploy, share in itertools.product(
        args.networks, (None, channels_last), args.latency
    ):
        model = kept(network)
        inner = [name for name, _ in model.named_modules() if name.endswith("conv1")] or None
        budget = Budget(latency=share, deploy=deploy)
        selection = greedyprune.select(
            model, list(images.split(BATCH)), layers=inner, size=budget, progress=False
        )
        models = [copy.deepcopy(model).eval(), greedyprune.prune(model, selection).eval()]
        with torch.no_grad():
            before, after = (times[""] for times in medians(models, batch, deploy=deploy))
        dense, left = selection.change("flops") or (1, 1)
        assert selection.budget is not None
        print(
            f"| {network} | {'channels_last' if deploy else 'as it is'} | {share:g} | "
            f"{selection.budget.reached:.3f} | {after / before:.3f} | {left / dense:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
