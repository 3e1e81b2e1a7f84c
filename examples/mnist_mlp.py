"""The first setting of arXiv:2108.00259: a two-layer network on MNIST, pruned in 200 greedy steps.

    python examples/mnist_mlp.py --data DIR [--units 10000] [--samples 60000]

DIR or DIR/MNIST/raw has MNIST's IDX files (train-images-idx3-ubyte.gz and so on). As in the paper,
the labels are binary (-1 for the digits 0-4, 1 for 5-9) and the loss is the squared error. Smaller
training sets are drawn evenly over the ten digits. Prints a table and writes a figure.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import rich
import torch
from torch import Tensor, nn
from training import Row, compare, picture, show, sign_accuracy, train


def read_idx(folder: Path, name: str) -> Tensor:
    """The content of one of MNIST's files, compressed or not: (count, ...) uint8."""
    for path, opened in ((folder / f"{name}.gz", gzip.open), (folder / name, open)):
        if path.is_file():
            with opened(path, "rb") as file:
                content = file.read()
            dims = content[3]
            shape = np.frombuffer(content, ">i4", dims, 4)
            return torch.from_numpy(
                np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape).copy()
            )
    raise SystemExit(f"--data: no {name}.gz or {name} in {folder}")


def read_mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images (m, 784) in [0, 1] and digits (m,)."""
    if (folder / "MNIST" / "raw").is_dir():
        folder = folder / "MNIST" / "raw"
    images = read_idx(folder, f"{part}-images-idx3-ubyte").flatten(1).float() / 255
    return images, read_idx(folder, f"{part}-labels-idx1-ubyte").long()


def binary(digits: Tensor) -> Tensor:
    return torch.where(digits < 5, -1.0, 1.0)[:, None]


def evenly(digits: Tensor, samples: int) -> Tensor:
    """The indices (samples,) of random samples, drawn evenly over the digits."""
    if samples >= len(digits):
        return torch.arange(len(digits))
    share = -(-samples // 10)
    drawn = []
    for digit in range(10):
        at = (digits == digit).nonzero().flatten()
        drawn.append(at[torch.randperm(len(at))[:share]])
    index = torch.cat(drawn)
    return index[torch.randperm(len(index))[:samples]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's IDX files")
    parser.add_argument("--units", type=int, default=10000, help="hidden units (paper: 5000-20000)")
    parser.add_argument("--samples", type=int, default=60000, help="of the training set")
    parser.add_argument("--iterations", type=int, default=2000, help="of training, batches of 128")
    parser.add_argument("--steps", type=int, default=200, help="greedy steps")
    parser.add_argument("--tune", type=int, default=1000, help="iterations of fine-tuning")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, digits = read_mnist(args.data, "train")
    index = evenly(digits, args.samples)
    data = images[index], binary(digits[index])
    test_images, test_digits = read_mnist(args.data, "t10k")
    held_out = test_images, binary(test_digits)
    loss = nn.functional.mse_loss

    model = nn.Sequential(nn.Linear(784, args.units), nn.ReLU(), nn.Linear(args.units, 1))
    seconds = train(model, data, loss, args.iterations, args.lr)
    selection, rows = compare(
        model, data, loss, args.steps, lambda m: train(m, data, loss, args.tune, args.lr)
    )
    rows.insert(0, Row("dense", model, seconds))
    show(rows, data, held_out, loss, sign_accuracy)
    rich.print(selection.summary())
    picture(selection, rows, data, loss, args.out / "mnist_mlp.png")
