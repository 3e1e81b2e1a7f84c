"""A monitor's history as a table and as a figure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..runtime.figures import BLACK, BLUE, GREY, legend_below, panels_of
from .stopping import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table


def summary(history: History, metric_name: str, measured_on: str, notes: Iterable[str]) -> Table:
    """A table of the history, with a row for each check; see `PretrainingMonitor.summary`.

    Args:
        history: the checks
        metric_name: the name for the metric in the column titles
        measured_on: the data of the losses and metrics, in words
        notes: lines for below the table
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    titles = {
        "dense_loss": "dense loss", "loss": "pruned loss", "dense_metric": f"dense {metric_name}",
        "metric": f"pruned {metric_name}", "gap": "gap", "bound": "bound",
    }  # fmt: skip
    known = [key for key in titles if any(getattr(check, key) is not None for check in history)]
    losses_note = "what each layer loses by itself: monitor.selection.summary()"
    if "gap" in known:
        losses_note = "gap and bound are the selection's, on data"
    table = Table(
        title=f"pruned on trial: whole networks on {measured_on}",
        caption="\n".join([losses_note, *notes]),
        box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1), min_width=64,
    )  # fmt: skip
    units = f" of {history[0].units}" if history else ""
    columns = {"iteration": [str(check.iteration) for check in history]}
    columns |= {titles[k]: [f"{getattr(check, k):.4g}" for check in history] for k in known}
    columns[f"kept{units}"] = [str(check.kept) for check in history]
    columns["s"] = [f"{check.seconds:.1f}" for check in history]
    for title, cells in columns.items():
        # A title may wrap between words; a number may not wrap.
        widest = max(map(len, [*title.split(), *cells]))
        table.add_column(title, justify="right", min_width=widest)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def plot(history: History, metric_name: str, measured_on: str, reason: str | None) -> Figure:
    """Curves of the history: a panel for the loss, and one for the metric where there is one.

    See `PretrainingMonitor.plot`.

    Args:
        history: the checks
        metric_name: the name for the metric on its axis
        measured_on: the data of the losses and metrics, in words
        reason: why pre-training should stop; None while it should go on
    """
    names = ["loss"]
    if any(check.metric is not None for check in history):
        names.append("metric")
    figure, panels = panels_of(len(names))
    for panel, name in zip(panels, names, strict=True):
        _curves(panel, history, name, stopped=reason is not None)
        panel.set_xlabel("iterations of pre-training")
        panel.set_ylabel(f"{metric_name if name == 'metric' else name} on {measured_on}")
    legend_below(figure)
    title = f"stop: {reason}" if reason else "pre-training goes on"
    figure.suptitle(textwrap.fill(title, 60 * len(names)), fontsize="medium")
    return figure


def _curves(panel: Axes, history: History, name: str, stopped: bool) -> None:
    """Draws the dense and the pruned network's `name` ("loss" or "metric") over the iterations."""
    iterations = [check.iteration for check in history]
    dense = [getattr(check, f"dense_{name}") for check in history]
    pruned = [getattr(check, name) for check in history]
    units = f", {history[-1].kept} of {history[-1].units} units" if history else ""
    panel.plot(iterations, dense, "--", color=BLACK, linewidth=1, label="dense")
    panel.plot(iterations, pruned, marker="o", markersize=4, color=BLUE, label=f"pruned{units}")
    if stopped:
        panel.axvline(iterations[-1], color=GREY, linestyle=":", label="stop")
    if name == "loss" and history and 0 < 10 * min(dense + pruned) < max(dense + pruned):
        panel.set_yscale("log")
