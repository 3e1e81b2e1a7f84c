"""What the examples share: plain torch training, other ways to choose units, tables and figures."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import rich
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

import greedyprune
from greedyprune import LayerSelection, Selection
from greedyprune.runtime.figures import BLACK, BLUE, MARKS, legend_below, panels_of

Data = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Accuracy = Callable[[Tensor, Tensor], float]


@dataclass
class Row:
    """A network in the table, and the seconds that it took to make it."""

    name: str
    model: nn.Module
    seconds: float


def train(
    model: nn.Module, data: Data, loss: Loss, iterations: int, lr: float, batch: int = 128,
    momentum: float = 0.0,
) -> float:  # fmt: skip
    """Plain SGD; returns the seconds."""
    start = time.perf_counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    inputs, targets = data
    model.train()
    for _ in range(iterations):
        at = torch.randint(len(inputs), (batch,))
        optimizer.zero_grad()
        loss(model(inputs[at]), targets[at]).backward()
        optimizer.step()
    model.eval()
    return time.perf_counter() - start


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([model(part) for part in inputs.split(4096)])


def class_accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(1) == targets).double().mean())


def sign_accuracy(outputs: Tensor, targets: Tensor) -> float:
    """The accuracy for two classes with the targets -1 and 1."""
    return float((outputs.sign() == targets).double().mean())


def choose(selection: Selection, kept: Tensor, weights: str) -> Selection:
    """A selection of the units `kept`. weights: "none" or "uniform", as for `select`."""
    (name, layer), = selection.layers.items()  # fmt: skip
    other = LayerSelection.of_path(
        len(layer.counts), kept, weights, None,
        losses=torch.full((len(kept),), torch.nan, dtype=torch.float64), gap=None, bound=None,
        dense_loss=layer.dense_loss, outputs=layer.outputs, slices=layer.slices,
        loss=layer.loss, objective=layer.objective,
    )  # fmt: skip
    return Selection({name: other})


def largest(model: nn.Module, selection: Selection, size: int) -> Tensor:
    """The units with the largest product of incoming and outgoing weight norms."""
    (name, layer), = selection.layers.items()  # fmt: skip
    weights = dict(model.named_parameters())
    incoming = weights[f"{name}.weight"].detach().norm(dim=1)
    (consumer,) = layer.outputs
    outgoing = weights[f"{consumer}.weight"].detach().norm(dim=0)
    return (incoming * outgoing).topk(size).indices


def compare(
    model: nn.Module, data: Data, loss: Loss, steps: int, tune: Callable[[nn.Module], float]
) -> tuple[Selection, list[Row]]:
    """Compares greedy, random and magnitude selection at one size, before and after fine-tuning.

    For random and magnitude selection, the weights of the kept units stay as they are or are scaled
    by N / kept, whichever gives the lower loss.
    """
    start = time.perf_counter()
    selection = greedyprune.select(model, data, steps=steps)
    rows = [Row("greedy", greedyprune.prune(model, selection), time.perf_counter() - start)]
    size = len(selection.kept)
    for name in ("random", "magnitude"):
        start = time.perf_counter()
        kept = torch.randperm(len(selection.counts))[:size]
        if name == "magnitude":
            kept = largest(model, selection, size)
        others = [greedyprune.prune(model, choose(selection, kept, w)) for w in ("none", "uniform")]
        best = min(others, key=lambda m: float(loss(outputs_of(m, data[0]), data[1])))
        rows.append(Row(name, best, time.perf_counter() - start))
    tuned = [(row.name, copy.deepcopy(row.model)) for row in rows]
    tuned_rows = [Row(f"{name} + tuning", m, tune(m)) for name, m in tuned]
    return selection, rows + tuned_rows


def show(rows: list[Row], data: Data, held_out: Data, loss: Loss, accuracy: Accuracy) -> None:
    """Prints the table."""
    table = Table(title="one hidden layer, pruned and fine-tuned", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("network", "units", "params", "loss", "accuracy", "held out", "s"):
        table.add_column(column, justify="left" if column == "network" else "right", no_wrap=True)
    for row in rows:
        model = row.model
        outputs, unseen = outputs_of(model, data[0]), outputs_of(model, held_out[0])
        units = next(m.out_features for m in model.modules() if isinstance(m, nn.Linear))
        table.add_row(
            row.name, f"{units}", f"{sum(p.numel() for p in model.parameters()):,}",
            f"{float(loss(outputs, data[1])):.4f}", f"{accuracy(outputs, data[1]):.2%}",
            f"{accuracy(unseen, held_out[1]):.2%}", f"{row.seconds:.2f}",
        )  # fmt: skip
    table.caption = (
        "held out: accuracy on samples that were not trained on; s: seconds to train the dense "
        "network, to choose the units and prune, or to fine-tune"
    )
    rich.print(table)


def picture(selection: Selection, rows: list[Row], data: Data, loss: Loss, path: Path) -> None:
    """Draws the loss along the greedy path, and that of all networks in the table at its end.

    The bound is left out: it lies far above, and would leave no room for the rest.
    """
    figure, (panel,) = panels_of(1)
    (layer,) = selection.layers.values()
    panel.plot(layer.distinct, layer.losses, color=BLUE, label="greedy")
    losses = {row.name: float(loss(outputs_of(row.model, data[0]), data[1])) for row in rows}
    dense = losses.pop("dense")
    panel.axhline(dense, linestyle="--", color=BLACK, linewidth=1, label="dense")
    for method, (color, mark) in zip(("greedy", "random", "magnitude"), MARKS, strict=False):
        for name in (method, f"{method} + tuning"):
            filled = color if name == method else "white"
            panel.plot(
                len(layer.kept), losses[name], mark, color=color, mfc=filled, clip_on=False,
                label=None if name == "greedy" else name, zorder=3,
            )  # fmt: skip
    panel.set_yscale("log")
    panel.set_xlabel(f"units kept, of {len(layer.counts)}")
    panel.set_ylabel("training loss")
    legend_below(figure, columns=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")
