"""A monitor's history as a table and as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .figures import BLACK, BLUE, GREY, legend_below, panels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

    from .monitor import PretrainingMonitor


def summary(monitor: PretrainingMonitor, where: str) -> Table:
    """See `PretrainingMonitor.summary`; where: what losses and metrics were measured on."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    history, name = monitor.history, monitor.metric_name
    titles = {
        "dense_loss": "dense loss", "loss": "pruned loss", "dense_metric": f"dense {name}",
        "metric": f"pruned {name}", "gap": "gap", "bound": "bound",
    }  # fmt: skip
    known = [key for key in titles if any(getattr(check, key) is not None for check in history)]
    table = Table(
        title=f"pruned on trial: whole networks on {where}",
        caption="\n".join(_caption(monitor, "gap" in known)),
        box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1), min_width=64,
    )  # fmt: skip
    units = f" of {history[0].units}" if history else ""
    columns = {"iteration": [str(check.iteration) for check in history]}
    columns |= {titles[k]: [f"{getattr(check, k):.4g}" for check in history] for k in known}
    columns[f"kept{units}"] = [str(check.kept) for check in history]
    columns["s"] = [f"{check.seconds:.1f}" for check in history]
    for title, cells in columns.items():
        widest = max(map(len, [*title.split(), *cells]))  # titles may take more lines, numbers not
        table.add_column(title, justify="right", min_width=widest)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _caption(monitor: PretrainingMonitor, with_gap: bool) -> Iterator[str]:
    if with_gap:
        yield "gap and bound are the selection's, on data"
    else:
        yield "what each layer loses by itself: monitor.selection.summary()"
    spent = sum(check.seconds for check in monitor.history)
    share = f": {monitor.overhead:.1%}" if monitor.iteration else ""
    yield (
        f"checks: {len(monitor.history)}, left out: {monitor.skipped}; {spent:.1f} s beside "
        f"{monitor.training_seconds:.1f} s of training{share}"
    )
    yield f"stop: {monitor.reason}" if monitor.reason else f"iteration {monitor.iteration}: go on"


def plot(monitor: PretrainingMonitor, where: str) -> Figure:
    """See `PretrainingMonitor.plot`; where: what losses and metrics were measured on."""
    names = ["loss"]
    if any(check.metric is not None for check in monitor.history):
        names.append("metric")
    figure, panels = panels_of(len(names))
    for panel, name in zip(panels, names, strict=True):
        _curves(panel, monitor, name)
        panel.set_xlabel("iterations of pre-training")
        panel.set_ylabel(f"{monitor.metric_name if name == 'metric' else name} on {where}")
    legend_below(figure)
    title = f"stop: {monitor.reason}" if monitor.reason else "pre-training goes on"
    figure.suptitle(textwrap.fill(title, 60 * len(names)), fontsize="medium")
    return figure


def _curves(panel: Axes, monitor: PretrainingMonitor, name: str) -> None:
    history = monitor.history
    iterations = [check.iteration for check in history]
    dense = [getattr(check, f"dense_{name}") for check in history]
    pruned = [getattr(check, name) for check in history]
    units = f", {history[-1].kept} of {history[-1].units} units" if history else ""
    panel.plot(iterations, dense, "--", color=BLACK, linewidth=1, label="dense")
    panel.plot(iterations, pruned, marker="o", markersize=4, color=BLUE, label=f"pruned{units}")
    if monitor.reason:
        panel.axvline(iterations[-1], color=GREY, linestyle=":", label="stop")
    if name == "loss" and history and 0 < 10 * min(dense + pruned) < max(dense + pruned):
        panel.set_yscale("log")
