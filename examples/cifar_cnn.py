"""How much pre-training is enough on CIFAR-10? Pre-trains, prunes on the way, and fine-tunes.

    python examples/cifar_cnn.py --data DIR --quick       # ResNet-20, some 20 minutes on two cores
    python examples/cifar_cnn.py --data DIR               # ResNet-34 and MobileNetV2, on a GPU

This is the second setting of arXiv:2108.00259. DIR has CIFAR-10's Python batches. Each network is
trained on a part of the training images, drawn evenly over the classes, by SGD with momentum and
batches of 128; the learning rate follows a cosine from 0.1. At several iterations a copy is pruned
and fine-tuned, with a learning rate along a cosine from 0.01. For comparison, "--prune none"
fine-tunes the dense network in the same way. An interrupted run resumes with the same command, and
results that are already in --out/cifar_cnn.csv are not computed again. Prints a table and writes a
figure.

examples/results/cifar_cnn_quick.csv has the results of --quick, of the same command with --prune
loss --prune-at 600 2400, and of --prune imitation at the sizes that --prune loss led to. The
machine had other work meanwhile, so the seconds say little.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from cifar import NETWORKS, accuracy, augmented, read_cifar
from mnist_mlp import evenly
from results_table import Cell
from three_steps import Data, Task, Training, options, run, start
from torch import nn

QUICK = {
    "networks": ["resnet20"], "images": [50000], "iterations": 2400, "every": 300,
    "prune_at": [0, 150, 300, 600, 1200, 2400], "tune": 200, "layer_tune": 20,
}  # fmt: skip


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/cifar_cnn"),
        help="folder; a new one for other options",
    )
    parser.add_argument("--quick", action="store_true", help="a ResNet-20, a few epochs")
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=["resnet34", "mobilenetv2"])
    add("--images", type=int, nargs="+", default=[10000, 30000, 50000], help="for training")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--iterations", type=int, default=80000, help="of pre-training")
    add("--prune-at", type=int, nargs="+", default=[20000, 40000, 60000, 80000],
        help="iterations of pre-training after which to prune")  # fmt: skip
    add("--tolerance", type=float,
        help="of --prune loss: 0.02 for MobileNetV2, 0.05 for the others")  # fmt: skip
    options(parser)
    if parser.parse_known_args(given)[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(given)
    if min(args.prune_at) < 0 or max(args.prune_at) > args.iterations:
        parser.error(
            f"--prune-at: found {args.prune_at}, expected 0 to --iterations {args.iterations}"
        )
    return args


def batches_of(data: Data, seed: int, size: int = 128) -> Callable[[int], Iterator[Data]]:
    """A function from a first iteration to the batches from there on; no two passes are alike."""
    images, labels = data
    size = min(size, len(images))

    def batches(first: int) -> Iterator[Data]:
        a_pass = len(images) // size
        for i in itertools.count(first):
            if i == first or i % a_pass == 0:
                rng = torch.Generator().manual_seed(seed * 10**6 + i // a_pass)
                order = torch.randperm(len(images), generator=rng).to(images.device)
            part = order[i % a_pass * size :][:size]
            yield augmented(images[part]), labels[part]

    return batches


def tasks_of(args: argparse.Namespace) -> Iterator[tuple[Cell, Task]]:
    device = start(args.device)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    images, labels = (part.to(device) for part in read_cifar(args.data, "train"))
    test_images, test_labels = read_cifar(args.data, "test")
    held_out = test_images.to(device), test_labels.to(device)
    for seed, count, network in itertools.product(args.seeds, args.images, args.networks):
        torch.manual_seed(seed)
        index = evenly(labels.cpu(), count).to(device)
        data = images[index], labels[index]
        some = torch.randperm(len(index))[: args.select_images].to(device)

        def dense(network: str = network, seed: int = seed) -> nn.Module:
            torch.manual_seed(seed)
            return NETWORKS[network]().to(device)

        name = f"{network}-{len(index)}-{args.iterations}-{seed}"
        training = Training(batches_of(data, seed), seed, 5e-4, args.every, compiled)
        task = Task(
            dense, (data[0][some], data[1][some]), training, lambda m: accuracy(m, held_out),
            args.layer_tune, args.out / name,
        )  # fmt: skip
        for at, prune in itertools.product(sorted(args.prune_at), args.prune):
            tolerance = args.tolerance
            if tolerance is None:
                tolerance = 0.02 if network == "mobilenetv2" else 0.05
            keep = {"none": 1.0, "imitation": args.size, "loss": tolerance}[prune]
            yield (
                Cell(network, len(index), seed, args.iterations, at, prune, keep, args.tune), task
            )  # fmt: skip


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    run(tasks_of(args), args.out / "cifar_cnn.csv")


if __name__ == "__main__":
    main()
