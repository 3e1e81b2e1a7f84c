"""Draws how the time grows; report.py calls it with the results of test_scaling.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

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
    "steps": "the greedy loop, features at hand",
    "threads": "one step's candidates",
    "select": "select, from inputs to Selection",
}
COLOURS = {
    "cross_entropy": "C0",
    "bce_with_logits": "C1",
    "mse": "C2",
    "mse, on the Gram matrix": "C3",
    "mse, 200 steps": "C2",
    "mse, half the units": "C3",
    "cross_entropy, 50 steps": "C0",
}


@dataclass(frozen=True)
class Point:
    """The seconds at size `x` of one sweep (a panel). fixed: the sizes that stay the same."""

    sweep: str
    line: str
    fixed: str
    x: float
    seconds: float


def draw(points: list[Point], path: Path) -> None:
    """A panel for each sweep, on logarithmic axes. A dotted line has slope 1 (-1 for threads)."""
    sweeps = [sweep for sweep in LABELS if any(point.sweep == sweep for point in points)]
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    grid = figure.subplots(-(-len(sweeps) // 3), 3, squeeze=False)
    for axes in grid.flat[len(sweeps) :]:
        axes.remove()
    for sweep, axes in zip(sweeps, grid.flat, strict=False):
        _panel(axes, sweep, [point for point in points if point.sweep == sweep])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _panel(axes: Axes, sweep: str, points: list[Point]) -> None:
    lines: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.x):
        lines.setdefault(point.line, []).append(point)
    for name, line in lines.items():
        axes.plot(
            [p.x for p in line], [1e3 * p.seconds for p in line], "o-", color=COLOURS.get(name),
            markersize=4, label=name,
        )  # fmt: skip
    # The dotted line begins at the first point of the slowest line.
    start = max((line[0] for line in lines.values()), key=lambda point: point.seconds)
    xs = sorted({point.x for point in points})
    slope = -1 if sweep == "threads" else 1
    guide = [1e3 * start.seconds * (x / start.x) ** slope for x in xs]
    axes.plot(xs, guide, ":", color="0.5", label=f"slope {slope}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(LABELS[sweep])
    axes.set_ylabel("ms")
    axes.set_title(f"{TITLES[sweep]}\n{points[0].fixed}", fontsize=9)
    axes.grid(color="0.9")
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7)
