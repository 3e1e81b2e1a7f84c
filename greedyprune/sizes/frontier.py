"""What is lost against what the model costs, for a range of budgets: a table and a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..runtime.figures import BLUE, GREY, VERMILLION, legend_below, panels_of
from .curves import Curves
from .knapsack import Numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

LOWEST = 1e-4  # of the highest loss: where a figure ends
BUDGETS = 20  # evenly between the cost of the smallest sizes and the dense model's


@dataclass(frozen=True, eq=False)
class Frontier:
    """The best sizes for a range of budgets; the result of `Selection.frontier`.

    what:   the cost: "flops", "params", "latency" or "memory"
    shares: (n,) float64, ascending: the share of the dense model's cost that is left
    losses: (n,) float64: the sum over the layers that `Budget` minimises
    sizes:  for each of these, the layers' sizes by their names
    chosen: which of these is the selection itself, whose sizes may not be the best; None: its
            sizes have no known loss, as those of `at(k)` may not be multiples of round_to
    """

    what: str
    shares: Numbers
    losses: Numbers
    sizes: Sequence[Mapping[str, int]]
    chosen: int | None

    @classmethod
    def of(cls, curves: Curves, what: str, chosen: Mapping[str, int]) -> Frontier:
        """chosen: the sizes of the selection"""
        dense, least = curves.dense(what), curves.share(what, curves.least())
        points = dict[float, tuple[float, Mapping[str, int]]]()
        for share in np.linspace(least, 1.0, BUDGETS).tolist():
            sizes, best = curves.within({what: share * dense})
            points[curves.share(what, sizes)] = best.value, sizes
        share, loss = curves.share(what, chosen), curves.loss(chosen)
        is_known = not math.isnan(loss)
        if is_known:
            points[share] = loss, chosen
        shares = sorted(points)
        return cls(
            what, np.array(shares), np.array([points[share][0] for share in shares]),
            [points[share][1] for share in shares], shares.index(share) if is_known else None,
        )  # fmt: skip

    def summary(self) -> Table:
        """A rich table with one row for each budget: `rich.print(frontier.summary())`.

        The row of the selection itself is marked. `Selection.resize` reaches the rows above it.
        """
        from rich.table import Table

        table = Table(title=f"what is lost for {self.what}, as a share of the dense model's")
        for column in (self.what, "loss of the sizes", "units kept", ""):
            table.add_column(column, justify="right")
        total = sum(self.sizes[-1].values())
        for i, sizes in enumerate(self.sizes):
            table.add_row(
                f"{self.shares[i]:.4f}", f"{self.losses[i]:.4g}",
                f"{sum(sizes.values()) / total:.1%}", "this selection" * (i == self.chosen),
            )  # fmt: skip
        return table

    def plot(self) -> Figure:
        """A matplotlib figure: the loss against the cost, with the selection marked.

        ImportError without matplotlib (install the extra: `pip install '.[plot]'` in the checkout).
        """
        figure, [panel] = panels_of(1)
        at = [] if self.chosen is None else [self.chosen]
        shares, losses = (np.delete(values, at) for values in (self.shares, self.losses))
        panel.plot(shares, losses, ".-", color=BLUE, label="best sizes for a budget")
        if self.chosen is not None:
            share, loss = float(self.shares[self.chosen]), float(self.losses[self.chosen])
            panel.plot(share, loss, "*", markersize=13, color=VERMILLION, label="this selection")
            panel.axvspan(float(self.shares[0]), share, color=GREY, alpha=0.12, label="by resize")
        positive = self.losses[self.losses > 0]
        if len(positive) and 10 * positive.min() < positive.max():
            panel.set_yscale("log", nonpositive="mask")
            panel.set_ylim(bottom=max(positive.min(), LOWEST * positive.max()) / 2)
        panel.set_xlabel(f"{self.what}, as a share of the dense model's")
        panel.set_ylabel("loss of the sizes")
        legend_below(figure)
        return figure

    def __repr__(self) -> str:
        first, last = self.shares[0], self.shares[-1]
        return f"Frontier({self.what}: {len(self.shares)} budgets from {first:.3g} to {last:.3g})"
