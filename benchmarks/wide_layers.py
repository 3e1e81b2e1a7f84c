"""A layer of 8192 features on a trained CIFAR network: sums of products, columns, coarser sums.

    python benchmarks/wide_layers.py --data DIR [--images 256 1024] [--sizes 64 32] [--seeds 0 1 2]

Trains a network whose last convolution (128 channels of 8 x 8) goes flattened into a Linear layer,
which takes some minutes, and selects that convolution's channels. Prints the test accuracy, the
squared error of the Linear layer's outputs on unseen images as a share of their squares, and the
seconds of `select`, for each draw of training images and

    sums:       the Gram matrix of the features, with exchanges
    no swaps:   the same without exchanges
    columns:    the images' features themselves, in the dual form
    channels:   the picks of "sums"; the weights mix channels in the same way at all pixels, by
                least squares of each channel from the kept ones
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import greedyprune
from greedyprune.data import positions
from greedyprune.kernels.least_squares import ridge

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from cifar import accuracy, read_cifar, train

CONVOLUTION, LINEAR, PIXELS = 8, 12, 64


def network() -> nn.Sequential:
    layers, inputs = list[nn.Module](), 3
    for width in (32, 64, 128):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    layers.insert(3, nn.MaxPool2d(2))
    layers.insert(7, nn.MaxPool2d(2))
    linear = nn.Linear(128 * PIXELS, 256)
    return nn.Sequential(*layers, nn.Flatten(), linear, nn.ReLU(), nn.Linear(256, 10))


@torch.no_grad()
def mixed(model: nn.Sequential, selection: greedyprune.Selection, data: list[Tensor]) -> nn.Module:
    """The smaller model whose Linear weights come from one mixing of channels for all pixels."""
    features = torch.cat([model[:LINEAR](batch).unflatten(1, (-1, PIXELS)) for batch in data])
    rows, kept = features.double().transpose(0, 1).flatten(1), selection.kept
    gram = rows @ rows.T
    gram.diagonal().add_(ridge(gram.diagonal(), 1e-4))
    mixing = torch.linalg.solve(gram[kept][:, kept], gram[kept])  # (kept, channels)
    dense = model.get_parameter(f"{LINEAR}.weight")
    weight = dense.double().unflatten(1, (-1, PIXELS))
    small = greedyprune.prune(model, selection)
    new = torch.einsum("oct,kc->okt", weight, mixing)
    small.get_parameter(f"{LINEAR}.weight").copy_(new.flatten(1))
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    training, held_out = read_cifar(args.data, "train"), read_cifar(args.data, "test")
    model = network()
    train(model, training, args.epochs, lr=0.05)
    print(f"test accuracy {accuracy(model, held_out):.2%}")
    print("| images | draw | kept | how | accuracy | unseen error | select, s |")
    print("| ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    for images in args.images:
        for seed in args.seeds:
            order = torch.randperm(len(training[0]), generator=torch.Generator().manual_seed(seed))
            data = list(training[0][order[:images]].split(256))
            for size in args.sizes:
                for how in ("no swaps", "columns", "sums", "channels"):
                    positions.FEW_FEATURES = 4096 if how == "columns" else 128 * PIXELS
                    start = time.perf_counter()
                    if how != "channels":
                        objective = "auto" if how == "sums" else greedyprune.Imitation(swaps=0)
                        selection = greedyprune.select(
                            model, data, layers=[str(CONVOLUTION)], size=size, objective=objective,
                            progress=False,
                        )  # fmt: skip
                        small = greedyprune.prune(model, selection)
                    else:
                        small = mixed(model, selection, data)
                    seconds = time.perf_counter() - start
                    error = unseen_error(model, small, held_out[0][:2000])
                    print(
                        f"| {images} | {seed} | {size} | {how} | {accuracy(small, held_out):.2%} | "
                        f"{error:.4f} | {seconds:.1f} |",
                        flush=True,
                    )


@torch.no_grad()
def unseen_error(model: nn.Sequential, small: nn.Module, images: Tensor) -> float:
    assert isinstance(small, nn.Sequential)
    lost = whole = 0.0
    for batch in images.split(500):
        dense = model[: LINEAR + 1](batch)
        lost += float((small[: LINEAR + 1](batch) - dense).square().sum())
        whole += float(dense.square().sum())
    return lost / whole


if __name__ == "__main__":
    main()
