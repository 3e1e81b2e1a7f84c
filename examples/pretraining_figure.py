"""Evaluates and draws the results of mnist_pretraining.py: when goals were reached, and growth."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import numpy as np
import rich
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from rich.box import SIMPLE_HEAD
from rich.table import Table

from greedyprune.pretraining.theory import Growth, crossing, growth


class Curve(NamedTuple):
    """The training accuracies of one network and of its pruned copies, one for each iteration."""

    samples: int
    iterations: list[int]
    dense: list[float]
    pruned: list[float]

    def reaches(self, goal: float) -> float | None:
        """The first iteration at which the pruned network has the accuracy `goal`; None: never."""
        return crossing(self.iterations, self.pruned, goal)

    @property
    def caught_up(self) -> float | None:
        """The first iteration at which the dense network is as accurate as the pruned one.

        None: never.
        """
        return crossing(self.iterations, self.dense, self.pruned)


class Line(NamedTuple):
    """When the pruned networks reached a goal: a point (m, iteration) for each that did."""

    label: str
    color: str
    points: list[tuple[int, float]]

    @property
    def fit(self) -> Growth | None:
        """The fit to the points after iteration 0; None for fewer than three sizes m."""
        later = [point for point in self.points if point[1] > 0]
        return growth(*zip(*later, strict=True)) if len({m for m, _ in later}) > 2 else None


class Panel(NamedTuple):
    """All trainings of one kind of network at one width, for several sizes m and seeds.

    wanted: the accuracy of the first line. None: the highest accuracy, in steps of half a percent,
        that every pruned network reaches
    """

    title: str
    curves: list[Curve]
    wanted: float | None = None

    @property
    def samples(self) -> list[int]:
        return sorted({curve.samples for curve in self.curves})

    def of_size(self, samples: int) -> list[Curve]:
        return [curve for curve in self.curves if curve.samples == samples]

    @property
    def level(self) -> float:
        lowest = min(max(curve.pruned) for curve in self.curves)
        return float(np.floor(200 * lowest) / 200) if self.wanted is None else self.wanted

    @property
    def lines(self) -> list[Line]:
        """When the pruned networks reach the level, and when they pass the dense network's best."""
        level = self.level
        best = [max(curve.dense) for curve in self.curves]
        return [
            self._line(f"pruned reaches {level:.1%}", "black", [level] * len(self.curves)),
            self._line("pruned passes the dense network's best", "C3", best),
        ]

    def _line(self, label: str, color: str, goals: list[float]) -> Line:
        reached = [
            (curve.samples, curve.reaches(goal))
            for curve, goal in zip(self.curves, goals, strict=True)
        ]
        return Line(label, color, [(m, at) for m, at in reached if at is not None])

    def mean(self, samples: int, points: list[tuple[int, float]]) -> float:
        """The mean iteration over the seeds of a size; NaN unless every seed has a point."""
        found = [at for m, at in points if m == samples]
        return float(np.mean(found)) if len(found) == len(self.of_size(samples)) else float("nan")


def _heat_map(axes: Axes, panel: Panel) -> QuadMesh:
    """The pruned networks' accuracies, averaged over the seeds, with a row for each size."""
    accuracy = np.array([
        np.mean([curve.pruned for curve in panel.of_size(m)], axis=0) for m in panel.samples
    ])  # fmt: skip
    iterations, rows = panel.curves[0].iterations, range(len(panel.samples))
    mesh = axes.pcolormesh(iterations, rows, accuracy, vmin=np.quantile(accuracy, 0.1))
    for line in panel.lines:
        axes.plot(
            [panel.mean(m, line.points) for m in panel.samples], rows, "o-", color=line.color,
            markersize=4, label=f"{line.label} ({len(line.points)} of {len(panel.curves)})",
            path_effects=[withStroke(linewidth=4, foreground="white")],
        )  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_yticks(rows, [f"{m:,}" for m in panel.samples])
    axes.set_xlabel("iterations of pre-training")
    axes.set_ylabel("training images m")
    axes.legend(title=panel.title, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    return mesh


def _curves(axes: Axes, panel: Panel) -> None:
    """The accuracies of the dense and the pruned network for some sizes, for the first seed."""
    some = np.unique(np.linspace(0, len(panel.samples) - 1, 4).round().astype(int))
    for i, color in zip(some, ("C0", "C1", "C2", "C4"), strict=False):
        curve = panel.of_size(panel.samples[i])[0]
        axes.plot(curve.iterations, curve.pruned, color=color, label=f"m = {curve.samples:,}")
        axes.plot(curve.iterations, curve.dense, ":", color=color)
    axes.plot([], [], color="black", label="pruned")
    axes.plot([], [], ":", color="black", label="dense")
    axes.set_xlim(left=0)
    axes.set_ylim(np.quantile([c.pruned for c in panel.curves], 0.1), 1.002)
    axes.set_xlabel("iterations of pre-training")
    axes.set_ylabel("training accuracy")
    axes.grid(color="0.9")
    axes.legend(fontsize=8, loc="lower right")


def _growth(axes: Axes, panel: Panel) -> None:
    """The iterations of each line over m, a point for each seed, with both fitted laws."""
    m = np.geomspace(panel.samples[0], panel.samples[-1], 100)
    for line in panel.lines:
        axes.plot(*np.reshape(line.points, (-1, 2)).T, "o", color=line.color, markersize=4)
        if line.fit is None:
            continue
        log, power = line.fit.log, line.fit.power
        axes.plot(
            m, log.a + log.b * np.log(m), color=line.color,
            label=f"a + b log m: b = {log.b:.0f} ± {log.b_error:.0f}, residual {log.residual:.0f}",
        )  # fmt: skip
        axes.plot(
            m, power.a * m**power.b, "--", color=line.color,
            label=f"a m^b: b = {power.b:.2f} ± {power.b_error:.2f}, residual {power.residual:.0f}",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(panel.samples, [f"{size:,}" for size in panel.samples], rotation=45)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training images m")
    axes.set_ylabel("iterations of pre-training")
    axes.grid(color="0.9")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def draw(panels: list[Panel], title: str, path: Path) -> None:
    figure = Figure(figsize=(5.4 * len(panels), 11), layout="constrained")
    grid = figure.subplots(3, len(panels), squeeze=False)
    for panel, top, middle, bottom in zip(panels, *grid, strict=True):
        mesh = _heat_map(top, panel)
        figure.colorbar(mesh, ax=top, label="training accuracy, pruned", extend="min")
        _curves(middle, panel)
        _growth(bottom, panel)
    figure.suptitle("\n".join(wrap(title, 48 * len(panels))))
    figure.savefig(path, dpi=100)


def show(panel: Panel) -> None:
    """Prints a table of means over the seeds, and the fits."""
    table = Table(title=panel.title, box=SIMPLE_HEAD, pad_edge=False)
    caught = [(c.samples, at) for c in panel.curves if (at := c.caught_up) is not None]
    columns = {line.label: line.points for line in panel.lines} | {"dense catches up": caught}
    for column in ("m", "dense, best", "pruned, best", *columns):
        table.add_column(column, justify="right")
    for m in panel.samples:
        curves = panel.of_size(m)
        means = [panel.mean(m, points) for points in columns.values()]
        table.add_row(
            f"{m:,}", f"{np.mean([max(curve.dense) for curve in curves]):.2%}",
            f"{np.mean([max(curve.pruned) for curve in curves]):.2%}",
            *("-" if np.isnan(mean) else f"{mean:.0f}" for mean in means),
        )  # fmt: skip
    rich.print(table)
    for line in panel.lines:
        print(f"{line.label}: {len(line.points)} of {len(panel.curves)} networks")
        if line.fit is not None:
            print(f"  {line.fit.log}\n  {line.fit.power}\n  better: {line.fit.better}")
