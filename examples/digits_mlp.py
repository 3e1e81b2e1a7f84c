"""Train, prune and fine-tune a network with one hidden layer on scikit-learn's digits.

    python examples/digits_mlp.py

Prints a table of the dense network and of greedy, random and magnitude pruning at the same size,
before and after the same fine-tuning. Writes a figure of their losses. `make demo` runs it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rich
import torch
from sklearn.datasets import load_digits
from torch import nn
from training import Row, class_accuracy, compare, picture, show, train

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--units", type=int, default=1024, help="hidden units before pruning")
    parser.add_argument("--steps", type=int, default=40, help="greedy steps")
    parser.add_argument("--iterations", type=int, default=2000, help="of training")
    parser.add_argument("--tune", type=int, default=500, help="iterations of fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images).float() / 16, torch.tensor(labels)
    order = torch.randperm(len(inputs))
    data = inputs[order[:1400]], targets[order[:1400]]
    held_out = inputs[order[1400:]], targets[order[1400:]]
    loss = nn.functional.cross_entropy

    model = nn.Sequential(nn.Linear(64, args.units), nn.ReLU(), nn.Linear(args.units, 10))
    seconds = train(model, data, loss, args.iterations, lr=0.1)
    selection, rows = compare(
        model, data, loss, args.steps, lambda m: train(m, data, loss, args.tune, lr=0.05)
    )
    rows.insert(0, Row("dense", model, seconds))
    show(rows, data, held_out, loss, class_accuracy)
    rich.print(selection.summary())
    picture(selection, rows, data, loss, args.out / "digits_mlp.png")
