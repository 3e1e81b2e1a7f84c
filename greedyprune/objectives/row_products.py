"""A wide layer's columns themselves, in the place of the sums of their products.

A layer with F features has sums of F^2 numbers. Where that is too many, or there are far fewer
positions than features, the columns are kept instead: (m, F). All that a layer is selected from
follows from them, by the dual form of least squares (kernels/dual.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels.dual import DualFit, DualHalves, gathered, product
from ..kernels.least_squares import Held, feature_rows
from ..kernels.products import PendingColumns
from ..runtime.distributed import Ranks
from .products import ConsumerProducts, Sums

BLOCK = 2**24  # entries of products of features that are computed together


class Columns(Sums):
    """The columns of one half of the samples; they wait in `pending`, and are never added up."""

    def __init__(self) -> None:
        self.positions, self.target_norm = 0, 0.0
        self.pending = PendingColumns()

    def add_pending(self, long: bool) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return self.columns()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.set_columns(state)


class RowProducts(ConsumerProducts):
    """What `ConsumerProducts` gives, of a consumer whose columns are kept.

    After `finish`, all on the CPU:
    rows:    (m, F), X, a row for each position; those of the first half come first
    targets: (m, C) float64, Y, in the metric of `root`
    first:   how many rows the first half has
    """

    rows: Tensor
    targets: Tensor
    first: int

    wide = True

    def _empty(self, device: torch.device) -> Sums:
        return Columns()

    def _stored(self, weight: Tensor) -> Tensor:
        return weight if weight.dtype == torch.float64 else weight.float()

    def finish(self, ranks: Ranks, owner: int | None = None) -> None:
        stride, dtype = self.sampling.stride if self.sampling else 1, self.weight.dtype
        halves = [sums.pending for sums in self.sums]
        self.rows, self.first = gathered(
            f"columns {self.name!r}", [half.rows for half in halves], self.features, dtype, ranks
        )
        if self.is_given:
            self.targets = gathered(
                f"targets {self.name!r}", [half.targets for half in halves], self.outputs,
                torch.float64, ranks,
            )[0]  # fmt: skip
        else:
            self.targets = product(self.rows, self.weight.T)
        if stride > 1:  # each position stands for so many
            self.rows *= math.sqrt(stride)
            self.targets *= math.sqrt(stride)
        self._positions = len(self.rows) * stride

    @property
    def positions(self) -> int:
        return self._positions

    def merge(self) -> None:
        """There are no sums of halves."""

    def squares(self) -> Tensor:
        return torch.linalg.vector_norm(self.rows, dim=0, dtype=torch.float64).square()

    def errors_without(self, units: Tensor, factor: float) -> Held:
        at = feature_rows(units, self.width)
        rows = self.rows[:, at]
        error = self.targets - product(rows, self.weight[:, at].T)
        squares = self.squares()[at]
        return DualHalves(rows, error * math.sqrt(factor), self.first, squares)

    def target_norm(self) -> float:
        return float(self.targets.square().sum())

    def end_losses(self) -> tuple[float, float]:
        if not self.is_given:
            return 0.0, self.target_norm()
        left = self.targets - product(self.rows, self.weight.T)
        return float(left.square().sum()), self.target_norm()

    def unit_beta(self) -> Tensor:
        along = self.rows.T @ self.targets.to(self.rows)
        return (along.T * self.weight).double().sum(0).view(self.units, -1).sum(1)

    def contributions(self) -> Tensor:
        total = torch.empty(self.units, dtype=torch.float64)
        for j in range(self.units):
            at = slice(j * self.width, (j + 1) * self.width)
            output = self.rows[:, at] @ self.weight[:, at].T
            total[j] = torch.linalg.vector_norm(output, dtype=torch.float64) ** 2
        return total

    def unit_gram(self) -> Tensor:
        gram = torch.empty(self.units, self.units, dtype=torch.float64)
        at_once = max(1, BLOCK // (self.features * self.width))
        for units in torch.arange(self.units).split(at_once):
            at = feature_rows(units, self.width)
            products = self.rows[:, at].T @ self.rows
            products *= self.weight[:, at].T @ self.weight
            by_unit = products.double().view(len(units), self.width, self.units, self.width)
            gram[units] = by_unit.sum((1, 3))
        return (gram + gram.T) / 2

    def fit(self, units: Tensor, added: Tensor) -> DualFit:
        """Least squares on units (K,) int64, with the ridge `added` (F,); in no metric."""
        at = feature_rows(units, self.width)
        targets, dense = self.targets, self.weight[:, at]
        if self.root is not None:  # the weights themselves are the same in any metric
            targets = torch.linalg.solve(self.root, targets.T).T
            dense = torch.linalg.solve(self.root, dense.double()).to(dense)
        return DualFit(units.clone(), self.rows[:, at], targets, dense, added[at])
