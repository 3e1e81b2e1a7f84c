"""Draws how the time grows; report.py calls it with the results of test_scaling.py."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from greedyprune.runtime.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, legend_above

LABELS = {
    "m": "samples m",
    "N": "units N",
    "C": "outputs C",
    "steps": "greedy steps",
    "threads": "threads",
    "select": "samples m",
}
TITLES = {
    "m": "one step's candidates",
    "N": "one step's candidates",
    "C": "one step's candidates",
    "steps": "greedy loop, features at hand",
    "threads": "one step's candidates",
    "select": "select, from inputs to Selection",
}
STYLES = {  # a colour for each loss, a mark for each way to compute with it
    "cross_entropy": (BLUE, "o"),
    "bce_with_logits": (ORANGE, "s"),
    "mse": (GREEN, "^"),
    "mse, on the Gram matrix": (GREEN, "v"),
    "mse, 200 steps": (GREEN, "^"),
    "mse, half the units": (PURPLE, "D"),
    "cross_entropy, 50 steps": (BLUE, "o"),
}


@dataclass(frozen=True)
class Point:
    """The seconds at size `x` of one sweep (a panel). fixed: the sizes that stay the same."""

    sweep: str
    line: str
    fixed: str
    x: float
    seconds: float


def picture(points: list[Point]) -> Figure:
    """A panel for each sweep, on logarithmic axes. A dotted line has slope 1 (-1 for threads)."""
    sweeps = [sweep for sweep in LABELS if any(point.sweep == sweep for point in points)]
    figure = Figure(figsize=(9, 3.3 * -(-len(sweeps) // 2)), layout="constrained")
    grid = figure.subplots(-(-len(sweeps) // 2), 2, squeeze=False)
    for axes in grid.flat[len(sweeps) :]:
        axes.remove()
    for sweep, axes in zip(sweeps, grid.flat, strict=False):
        _panel(axes, sweep, [point for point in points if point.sweep == sweep])
    return figure


def _panel(axes: Axes, sweep: str, points: list[Point]) -> None:
    lines: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.x):
        lines.setdefault(point.line, []).append(point)
    for name, line in lines.items():
        colour, mark = STYLES[name]
        axes.plot(
            [p.x for p in line], [1e3 * p.seconds for p in line], f"{mark}-", color=colour,
            markersize=5, label=name,
        )  # fmt: skip
    # The dotted line begins at the first point of the slowest line.
    start = max((line[0] for line in lines.values()), key=lambda point: point.seconds)
    xs = sorted({point.x for point in points})
    slope = -1 if sweep == "threads" else 1
    guide = [1e3 * start.seconds * (x / start.x) ** slope for x in xs]
    axes.plot(xs, guide, ":", color=GREY, label=f"slope {slope}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(LABELS[sweep])
    axes.set_ylabel("ms")
    axes.grid(color="0.9")
    title = f"{TITLES[sweep]}, {points[0].fixed}"
    legend_above(axes, title=title, title_fontsize=9, alignment="left", ncols=2)
