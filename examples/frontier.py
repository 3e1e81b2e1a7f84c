"""One selection, every budget: accuracy against FLOPs of a network trained on CIFAR-10.

    python examples/frontier.py --data DIR [--network resnet20 | vgg] [--trials 5] [--seed 0]

DIR has the standard Python batches (cifar-10-batches-py). `select` runs once, on 1024 training
images, with whole paths (`Budget(flops=1.0)`). `resize` cuts the paths for each budget, and `refit`
solves for the weights. Prints the test accuracies and draws them beside what `frontier()` foresees,
in examples/results/frontier_NETWORK.png.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import rich
import torch
from cifar import NETWORKS, accuracy, kept, read_cifar
from rich.table import Table

import greedyprune
from greedyprune import Budget
from greedyprune.runtime.figures import BLACK, BLUE, legend_below, panels_of

IMAGES, SHARES = 1024, (0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1)
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--trials", type=int, default=5, help="trials for each layer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = kept(args.network)
    images, labels = read_cifar(args.data, "train")
    held_out = read_cifar(args.data, "test")
    some = torch.randperm(len(images))[:IMAGES]
    data = images[some], labels[some]
    inner = [name for name, _ in model.named_modules() if name.endswith("conv1")] or None
    count = len(inner or [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)])

    start = time.perf_counter()
    whole = greedyprune.select(
        model, data, layers=inner, size=Budget(flops=1.0, trials=args.trials * count)
    )
    table = Table(title=f"{args.network}, one selection of {time.perf_counter() - start:.0f} s")
    for column in ("FLOPs left", "test accuracy", "seconds of resize", "seconds of refit"):
        table.add_column(column, justify="right")
    dense = accuracy(model, held_out)
    table.add_row("100.0%", f"{dense:.2%}", "", "")
    left, accuracies = [1.0], [dense]
    for share in SHARES:
        times = [time.perf_counter()]
        selection = whole.resize(Budget(flops=share))
        times.append(time.perf_counter())
        small = greedyprune.refit(model, selection, data, progress=False)
        times.append(time.perf_counter())
        assert selection.budget is not None
        left.append(selection.budget.left["flops"])
        accuracies.append(accuracy(small, held_out))
        table.add_row(
            f"{left[-1]:.1%}", f"{accuracies[-1]:.2%}",
            *(f"{after - before:.2f}" for before, after in itertools.pairwise(times)),
        )  # fmt: skip
    rich.print(table)

    figure, (foreseen, measured) = panels_of(2)
    frontier = whole.frontier()
    foreseen.plot(100 * frontier.shares, frontier.losses, ".-", color=BLUE)
    foreseen.set_ylabel("loss of the sizes, nats")
    foreseen.set_yscale("log", nonpositive="mask")
    foreseen.set_ylim(bottom=float(frontier.losses.max()) * 1e-4)
    measured.plot(
        [100 * share for share in left], [100 * share for share in accuracies], "o-", color=BLUE,
        label="after resize and refit",
    )  # fmt: skip
    measured.axhline(100 * dense, linestyle="--", linewidth=1, color=BLACK, label="dense network")
    measured.set_ylabel("test accuracy, %")
    for panel in (foreseen, measured):
        panel.set_xlabel("FLOPs left, %")
        panel.grid(color="0.9")
    legend_below(figure)
    figure.savefig(RESULTS / f"frontier_{args.network}.png", dpi=110)


if __name__ == "__main__":
    main()
