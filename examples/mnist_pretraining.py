"""How much pre-training is enough? The first figure of arXiv:2108.00259: two-layer nets on MNIST.

    python examples/mnist_pretraining.py --data DIR --quick   # minutes, on two cores
    python examples/mnist_pretraining.py --data DIR           # the paper's grid: one call on a GPU

DIR has MNIST's IDX files, as for mnist_mlp.py. Each network is trained on m of the images, drawn
evenly over the digits where there are enough, by plain SGD on the squared error of binary labels.
Every --every iterations a copy is pruned by greedy steps. The "mean-field" networks are the
paper's: the mean of N units with weights of order 1. The "standard" networks have torch's initial
weights.

The figure shows the pruned networks' training accuracy over iterations and m, with two lines: the
iterations at which it reaches a level, and those at which it passes the best accuracy of the dense
network in all iterations of this call. Below are the accuracies of the dense networks, and how the
two lines grow with m.

Every row of OUT/mnist_pretraining.csv is written as soon as it is known. An interrupted run resumes
with the same command: it trains the current network again from the same seed, and prunes it only at
the iterations that are missing. A call for fewer sizes, seeds or iterations draws what is there.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from mnist_mlp import binary, evenly, read_mnist
from pretraining_figure import Curve, Panel, picture, show
from torch import Tensor, nn
from tqdm import tqdm
from training import Data, outputs_of, sign_accuracy, train

import greedyprune

NETWORKS = ("mean-field", "standard")
BATCH = 128
FULL = {
    "network": ["mean-field"], "units": [5000, 10000, 20000],
    "samples": [1000, *range(5000, 60001, 5000)], "iterations": 8000, "every": 250,
    "seeds": [0, 1, 2],
}  # fmt: skip
QUICK = {
    "network": list(NETWORKS), "units": [2048], "samples": [1000, 5000, 20000],
    "iterations": 1500, "every": 100, "seeds": [0, 1],
}  # fmt: skip


class Training(NamedTuple):
    """Everything that a trained network and the networks pruned from it depend on."""

    network: str
    units: int
    samples: int
    seed: int
    lr: float
    batch: int
    steps: int


class Check(NamedTuple):
    """The measurements at one iteration; losses and accuracies are on the training data.

    kept: the number of units of the pruned network; seconds: for selecting and pruning
    """

    iteration: int
    dense_loss: float
    dense_accuracy: float
    pruned_loss: float
    pruned_accuracy: float
    kept: int
    seconds: float


class Results:
    """The CSV file and its rows: checks[training][iteration]."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checks: dict[Training, dict[int, Check]] = {}
        columns = ",".join((*Training._fields, *Check._fields))
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(columns + "\n")
        elif len(whole) < len(content):  # a run was killed while it wrote the last line
            os.truncate(path, len(whole))
        header, *lines = whole.decode().splitlines() or [columns]
        if header != columns:
            raise SystemExit(f"--out: found {path} with the columns {header}, expected {columns}")
        kinds = (*get_type_hints(Training).values(), *get_type_hints(Check).values())
        for line in csv.reader(lines):
            values = [kind(text) for kind, text in zip(kinds, line, strict=True)]
            check = Check(*values[len(Training._fields) :])
            self._of(Training(*values[: len(Training._fields)]))[check.iteration] = check

    def _of(self, training: Training) -> dict[int, Check]:
        return self.checks.setdefault(training, {})

    def missing(self, training: Training, iterations: range) -> list[int]:
        return [at for at in iterations if at not in self._of(training)]

    def curve(self, training: Training, iterations: range) -> Curve:
        checks = [self._of(training)[at] for at in iterations]
        return Curve(
            training.samples, list(iterations), [check.dense_accuracy for check in checks],
            [check.pruned_accuracy for check in checks],
        )  # fmt: skip

    def add(self, training: Training, check: Check) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow((*training, *check))
        self._of(training)[check.iteration] = check


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def learning_rate(network: str, units: int) -> float:
    """A learning rate that suits the width N.

    In a mean of N units, the gradient of a unit is of order 1/N, so the rate grows with N. In a
    standard network, a step changes the outputs in proportion to N, so the rate falls with N: 0.01
    suits 2048 units, but makes the loss of 10000 units jump.
    """
    return 0.05 * units if network == "mean-field" else 20.48 / units


def dense_network(network: str, units: int) -> nn.Sequential:
    """A network with one hidden layer of ReLU units and one output.

    "mean-field": the output is the mean of the units with outgoing weights of order 1, as in the
    paper. "standard": torch's initial weights; the outgoing ones are of order 1/sqrt(N).
    """
    hidden = nn.Linear(784, units)
    if network == "standard":
        return nn.Sequential(hidden, nn.ReLU(), nn.Linear(units, 1))
    output = nn.Linear(units, 1, bias=False)
    nn.init.uniform_(output.weight, -1, 1)
    return nn.Sequential(hidden, nn.ReLU(), Scale(1 / units), output)


def measure(model: nn.Module, data: Data, steps: int, iteration: int) -> Check:
    start = time.perf_counter()
    selection = greedyprune.select(model, data, steps=steps, progress=False)
    small = greedyprune.prune(model, selection)
    seconds = time.perf_counter() - start
    dense, pruned = (sign_accuracy(outputs_of(net, data[0]), data[1]) for net in (model, small))
    return Check(
        iteration, float(selection.dense_loss), dense, float(selection.losses[-1]), pruned,
        len(selection.kept), round(seconds, 3),
    )  # fmt: skip


def pretrain(
    training: Training, iterations: range, images: Tensor, digits: Tensor, results: Results,
    bar: Any,
) -> None:  # fmt: skip
    """Trains one network, and prunes it at every iteration without a result."""
    missing = results.missing(training, iterations)
    if not missing:
        return
    network, units, samples, seed, lr, batch, steps = training
    bar.set_description(f"{network}, N = {units}, m = {samples}, seed {seed}")
    torch.manual_seed(seed)  # the same weights for every m
    model = dense_network(network, units).to(images.device)
    index = evenly(digits, samples)
    data = images[index], binary(digits[index]).to(images.device)
    now = 0
    for at in missing:
        train(model, data, nn.functional.mse_loss, at - now, lr, batch)
        now = at
        results.add(training, measure(model, data, steps, at))
        bar.update()


def trainings_of(args: argparse.Namespace, seed: int) -> list[Training]:
    grid = product(args.network, args.units, args.samples)
    return [
        Training(network, units, samples, seed, learning_rate(network, units), BATCH, args.steps)
        for network, units, samples in grid
    ]


def panels_of(
    results: Results, trainings: list[Training], iterations: range, level: float | None
) -> list[Panel]:
    """A panel for each kind of network and each width."""
    curves: dict[str, list[Curve]] = {}
    for training in trainings:
        title = f"{training.network} network, N = {training.units}"
        curves.setdefault(title, []).append(results.curve(training, iterations))
    return [Panel(*each, level) for each in curves.items()]


def count(text: str) -> int:
    if int(text) < 1:
        raise ValueError  # argparse names the option
    return int(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"defaults: {FULL}\nwith --quick: {QUICK}",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's IDX files")
    parser.add_argument("--quick", action="store_true", help="other defaults, see below")
    parser.add_argument("--network", choices=NETWORKS, nargs="+")
    parser.add_argument("--units", type=count, nargs="+", help="hidden units before pruning")
    parser.add_argument("--samples", type=count, nargs="+", help="sizes m of the data sets")
    parser.add_argument("--iterations", type=count, help="of pre-training, in batches of 128")
    parser.add_argument("--every", type=count, help="iterations from one pruning to the next")
    parser.add_argument("--steps", type=count, default=200, help="greedy steps")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--level", type=float, help="of accuracy; default: one that all reach")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for CSV and PNG")
    parser.set_defaults(**FULL)
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: found cuda, but torch sees no GPU")
    return args


def title_of(steps: int, seeds: list[int]) -> str:
    *most, last = map(str, seeds)
    named = f"seeds {', '.join(most)} and {last}" if most else f"seed {last}"
    return f"MNIST, labels binarised: pruned to {steps} greedy steps ({named})"


def main() -> None:
    args = arguments()
    images, digits = read_mnist(args.data, "train")
    if max(args.samples) > len(images):
        raise SystemExit(f"--samples: found {max(args.samples)}, there are {len(images)} images")
    images = images.to(args.device)
    results = Results(args.out / "mnist_pretraining.csv")
    path = args.out / f"mnist_pretraining{'_quick' if args.quick else ''}.png"
    iterations = range(0, args.iterations + 1, args.every)
    trainings = [each for seed in args.seeds for each in trainings_of(args, seed)]
    left = sum(len(results.missing(training, iterations)) for training in trainings)
    with tqdm(total=left, disable=not left) as bar:
        for training in trainings:
            pretrain(training, iterations, images, digits, results, bar)
    panels = panels_of(results, trainings, iterations, args.level)
    for panel in panels:
        show(panel)
    picture(panels, title_of(args.steps, args.seeds)).savefig(path, dpi=120)
    print(f"picture: {path}, results: {results.path}")


if __name__ == "__main__":
    main()
