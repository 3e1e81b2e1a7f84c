"""Evaluates and draws the results of mnist_pretraining.py: when goals were reached, and growth."""

from __future__ import annotations

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
from greedyprune.runtime.figures import BLACK, MARKS, VERMILLION, legend_above


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

    goal: str
    color: str
    mark: str
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
    def lowest(self) -> float:
        """Where the pictures' scales begin: nearly all is above, but for untrained networks."""
        return float(np.quantile([c.pruned[1:] or c.pruned for c in self.curves], 0.05))

    @property
    def lines(self) -> list[Line]:
        """When the pruned networks reach the level, and when they pass the dense network's best."""
        level = self.level
        best = [max(curve.dense) for curve in self.curves]
        return [
            self._line(f"reaches {level:.1%}", BLACK, "o", [level] * len(self.curves)),
            self._line("passes the dense network's best", VERMILLION, "s", best),
        ]

    def _line(self, goal: str, color: str, mark: str, accuracies: list[float]) -> Line:
        reached = [
            (curve.samples, curve.reaches(accuracy))
            for curve, accuracy in zip(self.curves, accuracies, strict=True)
        ]
        return Line(goal, color, mark, [(m, at) for m, at in reached if at is not None])

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
    mesh = axes.pcolormesh(iterations, rows, accuracy, vmin=panel.lowest)
    for line in panel.lines:
        axes.plot(
            [panel.mean(m, line.points) for m in panel.samples], rows, f"{line.mark}-",
            color=line.color,
            label=f"{line.goal} ({len(line.points)} of {len(panel.curves)})", clip_on=False,
            path_effects=[withStroke(linewidth=4, foreground="white")], zorder=3,
        )  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_yticks(rows, [f"{m:,}" for m in panel.samples])
    axes.set_xlabel("iterations of pre-training")
    axes.set_ylabel("training images m")
    legend_above(axes, title=f"{panel.title}, pruned:", alignment="left")
    return mesh


def _curves(axes: Axes, panel: Panel) -> None:
    """The accuracies of the dense and the pruned network for some sizes, for the first seed."""
    some = np.unique(np.linspace(0, len(panel.samples) - 1, 4).round().astype(int))
    for i, (color, mark) in zip(some, MARKS, strict=False):
        curve = panel.of_size(panel.samples[i])[0]
        axes.plot(
            curve.iterations, curve.pruned, f"{mark}-", color=color, markersize=4,
            label=f"m = {curve.samples:,}",
        )  # fmt: skip
        axes.plot(curve.iterations, curve.dense, f"{mark}:", color=color, markersize=4, mfc="white")
    axes.plot([], [], color=BLACK, label="pruned")
    axes.plot([], [], ":", color=BLACK, label="dense")
    axes.set_xlim(left=-0.02 * panel.curves[0].iterations[-1])  # a mark at 0 is whole
    margin = 0.05 * (1 - panel.lowest)
    axes.set_ylim(panel.lowest - margin, 1 + margin)
    axes.set_xlabel("iterations of pre-training")
    axes.set_ylabel("training accuracy")
    axes.grid(color="0.9")
    legend_above(axes, ncols=3)


def _growth(axes: Axes, panel: Panel) -> None:
    """The iterations of each line over m, a point for each seed, with both fitted laws.

    The legend has the laws of a goal below the goal.
    """
    m = np.geomspace(panel.samples[0], panel.samples[-1], 100)
    for line in panel.lines:
        if not line.points:
            continue
        axes.plot(
            *np.transpose(line.points), line.mark, color=line.color, markersize=5, clip_on=False,
            zorder=3, label=f"{line.goal}:",
        )  # fmt: skip
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
        legend_above(axes, handlelength=3)


def picture(panels: list[Panel], title: str) -> Figure:
    figure = Figure(figsize=(4.5 * len(panels), 12), layout="constrained")
    grid = figure.subplots(3, len(panels), squeeze=False)
    for panel, top, middle, bottom in zip(panels, *grid, strict=True):
        mesh = _heat_map(top, panel)
        figure.colorbar(
            mesh, ax=top, location="bottom", aspect=40, extend="min",
            label="training accuracy of the pruned network",
        )  # fmt: skip
        _curves(middle, panel)
        _growth(bottom, panel)
    figure.suptitle("\n".join(wrap(title, 40 * len(panels))))
    return figure


def show(panel: Panel) -> None:
    """Prints a table of means over the seeds, and the fits."""
    table = Table(title=panel.title, box=SIMPLE_HEAD, pad_edge=False)
    caught = [(c.samples, at) for c in panel.curves if (at := c.caught_up) is not None]
    columns = {f"pruned {line.goal}": line.points for line in panel.lines} | {
        "dense catches up": caught
    }
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
        print(f"pruned {line.goal}: {len(line.points)} of {len(panel.curves)} networks")
        if line.fit is not None:
            print(f"  {line.fit.log}\n  {line.fit.power}\n  better: {line.fit.better}")
