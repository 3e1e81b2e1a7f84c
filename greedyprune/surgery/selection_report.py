"""How a Selection is shown: `Selection.summary` as a table, `Selection.plot` as a figure."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..graph.refusals import by_reason
from ..runtime.figures import BLACK, BLUE, GREY, legend_below, panels_of
from ..sizes.budget import BudgetReport
from .layer_selection import LayerSelection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

Change = tuple[int, int] | None  # a cost of the dense and of the pruned model; None: not known


def summary(
    layers: Mapping[str, LayerSelection], params: Change, flops: Change,
    budget: BudgetReport | None, refused: Mapping[str, str], saving: str | None = None,
) -> Table:  # fmt: skip
    """A table with a row for each layer; below it the costs, the budget, the refused, `saving`."""
    from rich.table import Table

    kinds = sorted({f"{layer.objective}: {layer.loss}" for layer in layers.values()})
    table = Table(title=f"greedy forward selection ({', '.join(kinds)})")
    left = ("layer", "weights", "objective")
    columns = ["layer", "kept", "steps", "weights", "loss", "dense loss", "gap", "bound"]
    if len(kinds) > 1:  # the losses of these layers can't be compared
        columns.insert(4, "objective")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    for name, layer in layers.items():
        objective = [layer.objective] if len(kinds) > 1 else []
        table.add_row(
            name, f"{len(layer.kept)} of {len(layer.counts)}", str(len(layer.order)),
            layer.weighting, *objective, _last(layer.losses), f"{float(layer.dense_loss):.4g}",
            _last(layer.gap), _last(layer.bound),
        )  # fmt: skip
    lines = [*_caption(params, flops, budget), *_columns(layers.values())]
    lines += [f"not pruned: {reason}" for reason in by_reason(refused)]
    lines += [] if saving is None else [saving]
    table.caption = "\n".join(lines) or None
    return table


def _columns(layers: Collection[LayerSelection]) -> Iterator[str]:
    """What the columns mean that have no plain name, where they have numbers."""
    if any(layer.gap is not None for layer in layers):
        yield "loss - gap: no convex reweighting of all units has a lower loss"
    if any(layer.bound is not None for layer in layers):
        yield "bound: the loss is proved to be at most this, eq. (3)"


def _last(values: Tensor | None) -> str:
    """The value at the last step; empty where it is not known."""
    return "" if values is None else f"{float(values[-1]):.4g}"


def _caption(params: Change, flops: Change, budget: BudgetReport | None) -> Iterator[str]:
    for change, unit in ((params, "parameters"), (flops, "FLOPs of the first batch")):
        if change is not None:
            before, after = change
            yield f"{before:,} {unit} before, {after:,} after ({after / max(1, before):.1%})"
    if budget is not None:
        left = ", ".join(
            f"{what} {budget.left[what]:.4g} for a budget of {share:.4g}"
            for what, share in budget.asked.items()
        )
        yield (
            f"{left}; loss of the sizes {budget.objective:.4g}, at most {budget.gap:.2g} above the "
            "best"
        )


def plot(layers: Mapping[str, LayerSelection]) -> Figure:
    """A figure with one panel for each layer; ImportError without matplotlib."""
    figure, panels = panels_of(len(layers))
    for panel, (name, layer) in zip(panels, layers.items(), strict=True):
        _draw(panel, layer)
        title = [*textwrap.wrap(f"layer {name}", 30)]
        title.append(f"{len(layer.kept)} of {len(layer.counts)} units kept")
        panel.set_title("\n".join(title), fontsize="medium")
    legend_below(figure)
    return figure


def _draw(panel: Axes, layer: LayerSelection) -> None:
    """The loss against the steps, the proved bound and the dense loss, where they are known."""
    steps = torch.arange(1, len(layer.order) + 1)
    marker = "o" if len(steps) < 10 else ""
    panel.plot(steps, layer.losses, marker=marker, markersize=4, color=BLUE, label="pruned")
    lowest, highest = float(layer.losses.min()), float(layer.losses.max())
    if layer.bound is not None:
        panel.plot(steps, layer.bound, ":", color=GREY, label="proved bound (eq. 3)")
        highest = max(highest, float(layer.bound.max()))
    if layer.objective == "loss":
        dense = float(layer.dense_loss)
        panel.axhline(dense, linestyle="--", color=BLACK, linewidth=1, label="dense network's loss")
        lowest = min(lowest, dense)
    if 0 < 10 * lowest < highest:
        panel.set_yscale("log")
    panel.locator_params(axis="x", integer=True, min_n_ticks=1)
    panel.set_xlabel("greedy steps k")
    panel.set_ylabel(f"{layer.objective} ({layer.loss})")
