"""The results of pruning at several points of a training: rows of a CSV, a table, a figure."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from greedyprune.runtime.figures import BLACK, MARKS, legend_below, panels_of

METHODS = ("none", "imitation", "loss")  # of pruning


@dataclass(frozen=True)
class Cell:
    """What identifies one result.

    schedule: the iterations over which the learning rate of pre-training falls to 0
    pretrained: the iterations of pre-training before pruning
    prune: the method; keep: its share of units, or its tolerance
    tune: the iterations of fine-tuning
    """

    network: str
    images: int
    seed: int
    schedule: int
    pretrained: int
    prune: str
    keep: float
    tune: int


@dataclass(frozen=True)
class Result:
    """The accuracy before and after fine-tuning, the costs of the network, and seconds.

    train_s: for pre-training; test_s: for running the network on the held-out images
    """

    accuracy: float
    tuned: float
    params: int
    flops: int
    train_s: float
    select_s: float
    tune_s: float
    test_s: float


def read_results(file: Path) -> dict[Cell, Result]:
    def parsed(kind: Any, row: dict[str, str]) -> Any:
        types = {"str": str, "int": int, "float": float}
        return kind(**{f.name: types[str(f.type)](row[f.name]) for f in fields(kind)})

    if not file.is_file():
        return {}
    with file.open(newline="") as lines:
        return {parsed(Cell, row): parsed(Result, row) for row in csv.DictReader(lines)}


def append_result(file: Path, cell: Cell, result: Result) -> None:
    row = asdict(cell) | {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in asdict(result).items()
    }
    fresh = not file.is_file()
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, list(row), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def tables(results: Mapping[Cell, Result]) -> Iterator[Table]:
    """A table for each network, number of images and seed, with a row for each cell."""
    cells = sorted(results, key=order)
    for (network, images, seed), group in itertools.groupby(cells, lambda cell: order(cell)[:3]):
        table = Table(
            title=f"{network}, {images:,} images, seed {seed}: held-out accuracy; seconds",
            box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
        )  # fmt: skip
        table.add_column("trained", justify="right")
        table.add_column("network", no_wrap=True)
        for column in ("pruned", "tuned", "params", "MFLOPs", "select", "tune", "test"):
            table.add_column(column, justify="right", no_wrap=True)
        for cell in group:
            each = results[cell]
            table.add_row(
                f"{cell.pretrained}", label(cell), f"{each.accuracy:.2%}", f"{each.tuned:.2%}",
                f"{each.params:,}", f"{each.flops / 1e6:.1f}", f"{each.select_s:.1f}",
                f"{each.tune_s:.0f}", f"{each.test_s:.1f}",
            )  # fmt: skip
        yield table


def how(cell: Cell) -> tuple[int, float]:
    return METHODS.index(cell.prune), -cell.keep


def order(cell: Cell) -> tuple[Any, ...]:
    return cell.network, cell.images, cell.seed, cell.pretrained, how(cell)


def label(cell: Cell) -> str:
    return "dense" if cell.prune == "none" else f"{cell.prune} {cell.keep:g}"


def picture(results: Mapping[Cell, Result]) -> Figure:
    """A figure of the accuracy over the iterations of pre-training, averaged over the seeds.

    It has a panel for each network and number of images. Dashed lines are before fine-tuning, solid
    lines after it. Methods with fewer points than others are only in the table.
    """
    panels = sorted({(cell.network, cell.images) for cell in results})
    figure, axes = panels_of(len(panels))
    for panel in axes[1:]:
        panel.sharey(axes[0])
    styles = {"dense": (BLACK, "x")}  # of each method, in all panels
    for panel, key in zip(axes, panels, strict=True):
        curves: dict[str, dict[int, list[Result]]] = {}
        for cell in sorted(results, key=lambda cell: (how(cell), cell.pretrained)):
            if (cell.network, cell.images) == key:
                points = curves.setdefault(label(cell), {})
                points.setdefault(cell.pretrained, []).append(results[cell])
        longest = max(len(points) for points in curves.values())
        for name, points in curves.items():
            if len(points) < longest:
                continue
            colour, mark = styles.setdefault(name, MARKS[(len(styles) - 1) % len(MARKS)])
            for field, dash, what in (("accuracy", "--", ""), ("tuned", "-", ", fine-tuned")):
                means = [100 * mean(getattr(r, field) for r in each) for each in points.values()]
                panel.plot(
                    list(points), means, dash, marker=mark, markersize=5, color=colour,
                    label=name + what, zorder=3 if name == "dense" else 2,
                )  # fmt: skip
        panel.set_title(f"{key[0]}, {key[1]:,} images", fontsize="medium")
        panel.set_xlabel("iterations of pre-training")
        panel.set_ylabel("held-out accuracy, %")
        panel.grid(color="0.9")
    legend_below(figure, 2)
    return figure
