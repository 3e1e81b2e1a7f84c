"""Least squares of layers with more features than rows, from the rows themselves.

A row holds the features at one position: X is (m, F), the targets Y are (m, C). With a ridge R, a
diagonal matrix, towards the dense weights W, the weights B on the picked units S minimise

    |Y - X_S B^T|^2 + tr( (B - W_S) R_S (B - W_S)^T ).

The Gram matrix X^T X has F^2 numbers. The dual form (Saunders et al. 1998) has m^2:

    M = (I + X_S R_S^-1 X_S^T)^-1    A = M (Y - X_S W_S^T), what the fit leaves of Y
    B^T = W_S^T + R_S^-1 X_S^T A

Unit j then lowers the minimum by tr( r_j^T s_j^-1 r_j ), the same number as in
csrc/cpu/greedy_refit.cpp, with

    s_j = R_j + X_j^T M X_j    r_j = X_j^T A + R_j W_j^T

and its pick changes M, A, and each s_i and r_i, through U = M X_j s_j^-1/2 and V_i = U^T X_i:

    M -= U U^T    A -= U s_j^-1/2 r_j    s_i -= V_i^T V_i    r_i -= V_i^T s_j^-1/2 r_j
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.distributed import Ranks
from .least_squares import ridge
from .loop import greedy
from .path import Path, Rule, Step, first_picks
from .products import add_upper_product, mirror

GAIN_ENTRIES = 2**22  # the most entries of r_j whose gains are computed together
NEAR = 1e-4  # gains in float32 whose relative difference is below this are computed again
MOST_NEAR = 16  # as many units at most, those with the largest gains
COPIED_FEATURES = 2048  # features that are copied to float64 at a time


@dataclass(frozen=True)
class DualFit:
    """What `NestedFit` is for a Gram matrix: least squares for every number of the picked units.

    units:   (K,) int64, the distinct units, in the order of their first picks
    rows:    (m, K w) float32 or float64: X on the picked units, w features side by side of each
    targets: (m, C) float64, Y
    dense:   (C, K w), the dense weights W, of the rows' type
    ridge:   (K w,) float64, R
    """

    units: Tensor
    rows: Tensor
    targets: Tensor
    dense: Tensor
    ridge: Tensor

    @property
    def width(self) -> int:
        """The number of features of a unit, w."""
        return len(self.ridge) // max(1, len(self.units))

    def outgoing(self, distinct: int) -> Tensor:
        """The new outgoing weights of the first `distinct` units: (C, distinct, w) float64."""
        size = distinct * self.width
        rows, dense, added = self.rows[:, :size], self.dense[:, :size], self.ridge[:size]
        left = residual(kernel_of(rows, added), self.targets - product(rows, dense.T))
        weights = change_of(rows, left, added).add_(dense.T)
        return weights.T.unflatten(1, (distinct, self.width))


def gathered(
    what: str, halves: list[list[Tensor]], size: int, dtype: torch.dtype, ranks: Ranks
) -> tuple[Tensor, int]:
    """All ranks' columns of both halves as rows of one matrix (m, size), on the CPU.

    halves: parts (size, n) of each half; the lists are empty afterwards

    Returns also how many rows the first half has.
    """
    parts, counts = list[Tensor](), list[int]()
    for i, half in enumerate(halves):
        if ranks.size > 1:
            half[:] = [ranks.joined(f"{what} {i}", _as_rows(half, size, dtype)).T]
        counts.append(sum(part.shape[1] for part in half))
        parts += half
        half.clear()
    return _as_rows(parts, size, dtype), counts[0]


def _as_rows(parts: list[Tensor], size: int, dtype: torch.dtype) -> Tensor:
    """Parts (size, m) as rows of one matrix. Each part's memory is free once it is copied."""
    rows, end = torch.empty(sum(part.shape[1] for part in parts), size, dtype=dtype), 0
    for i in range(len(parts)):
        part, parts[i] = parts[i], parts[i][:, :0]
        rows[end : end + part.shape[1]] = part.T
        end += part.shape[1]
    parts.clear()
    return rows


def product(rows: Tensor, weights: Tensor) -> Tensor:
    """rows (m, F) @ weights (F, C): (m, C) float64."""
    total = torch.zeros(len(rows), weights.shape[1], dtype=torch.float64, device=rows.device)
    for at in _parts(len(weights)):
        total.addmm_(rows[:, at].double(), weights[at].double())
    return total


def change_of(rows: Tensor, left: Tensor, added: Tensor) -> Tensor:
    """R^-1 X^T A, by how much the weights change: (F, C) float64.

    left: (m, C) float64, A, from `residual`
    """
    change = torch.empty(rows.shape[1], left.shape[1], dtype=torch.float64, device=rows.device)
    for at in _parts(len(change)):
        torch.mm(rows[:, at].double().T, left, out=change[at])
    return change.div_(added[:, None])


def _parts(features: int) -> Iterator[slice]:
    for i in range(0, features, COPIED_FEATURES):
        yield slice(i, i + COPIED_FEATURES)


def kernel_of(rows: Tensor, added: Tensor) -> Tensor:
    """X R^-1 X^T, (m, m) float64.

    rows: (m, F); added: (F,) float64, the ridge, above 0
    """
    kernel = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for at in _parts(len(added)):
        add_upper_product(kernel, rows[:, at].double() * added[at].rsqrt(), torch.float64)
    mirror(kernel)
    return kernel


def residual(kernel: Tensor, error: Tensor) -> Tensor:
    """(kernel + I)^-1 error: what a ridge leaves of an error (m, C) of the dense weights."""
    damped = kernel.clone()
    damped.diagonal().add_(1)
    return torch.cholesky_solve(error, torch.linalg.cholesky(damped))


class DualHalves:
    """A least squares problem for the change of weights, in two halves of the samples.

    It is the counterpart of `least_squares.Halves`, for `chosen_damping`.

    rows:    (m, F), those of the first half first
    error:   (m, C) float64, what the weights that are there already leave of the targets
    first:   how many rows the first half has
    squares: (F,) float64, the features' squared norms over both halves
    free:    is there a constant without a ridge, beside the features?
    """

    def __init__(
        self, rows: Tensor, error: Tensor, first: int, squares: Tensor, *, free: bool = False
    ) -> None:
        self._kernel = kernel_of(rows, ridge(squares, 1.0))
        self._error, self._free = error, free
        self._halves = slice(0, first), slice(first, len(rows))
        self._is_scaled = bool(squares.any())  # else the ridge is 1 for any damping

    @property
    def has_samples(self) -> bool:
        return all(bool(self._kernel[half, half].any()) for half in self._halves)

    def held_out_gain(self, damping: float) -> float:
        """By how much the change that each half asks for lowers the squared error in the other."""
        gain, kernel = 0.0, self.damped_kernel(damping)
        for half, other in (self._halves, self._halves[::-1]):
            within, across, error = kernel[half, half], kernel[other, half], self._error[half]
            mean = torch.zeros_like(error[:1])
            if self._free:  # the constant makes the means of the half's features and errors zero
                mean, means = error.mean(0, keepdim=True), within.mean(0)
                across = across - means - across.mean(1, keepdim=True) + means.mean()
                within = within - means - means[:, None] + means.mean()
            change = across @ residual(within, error - mean) + mean
            gain += float((change * (2 * self._error[other] - change)).sum())
        return gain

    def damped_kernel(self, damping: float) -> Tensor:
        return self._kernel / damping if self._is_scaled else self._kernel


def _squares(matrix: Tensor) -> Tensor:
    """The squared norms of a matrix's columns, in float64."""
    return torch.linalg.vector_norm(matrix, dim=0, dtype=torch.float64).square()


class _Exact(NamedTuple):
    """M X_j (m, w), s_j^1/2 (w, w) and s_j^-1/2 r_j (w, C) of one unit, float64."""

    weighted: Tensor
    root: Tensor
    solved: Tensor


class DualPart:
    """One consumer's least squares while units are picked.

    rows:    (m, N w) float32 or float64; targets: (m, C) float64
    dense:   (C, N w), the dense weights, of the rows' type
    added:   (N w,) float64, the ridge, above 0
    width:   w, the features of a unit, which lie side by side
    """

    def __init__(
        self, rows: Tensor, targets: Tensor, dense: Tensor, added: Tensor, width: int
    ) -> None:
        self.rows, self.targets, self.dense, self.added = rows, targets, dense, added
        self.width, self.units = width, rows.shape[1] // width
        self.left = targets.clone()  # A
        self._inverse = torch.eye(len(rows), dtype=torch.float64, device=rows.device)  # M
        # In the rows' type: they only say which unit is best. What is picked is exact.
        self._right = rows.T @ targets.to(rows) + added.to(rows)[:, None] * dense.T  # r
        blocks = torch.diag_embed(added.view(-1, width))
        for some in torch.arange(self.units).split(max(1, 2**24 // (len(rows) * width))):
            of_units = self._of(some).double()
            blocks[some] += of_units.mT @ of_units
        self._blocks = blocks  # s, (N, w, w) float64

    def gains(self) -> Tensor:
        """By how much each unit lowers the squared error with its ridge: (N,) float64."""
        outputs = self.dense.shape[0]
        rights = self._right.view(self.units, self.width, outputs)
        unit, gains = torch.eye(self.width, dtype=torch.float64), []
        for some in torch.arange(self.units).split(max(1, GAIN_ENTRIES // (self.width * outputs))):
            root, failed = torch.linalg.cholesky_ex(self._blocks[some])
            for i in failed.nonzero().flatten().tolist():  # rounding exceeds a very small ridge
                root[i] = self._exact(int(some[i])).root
            inverse = torch.linalg.solve_triangular(root, unit, upper=False).to(rights)
            solved = inverse @ rights[some[0] : some[-1] + 1]
            gains.append(torch.linalg.vector_norm(solved, dim=2).double().square().sum(1))
        return torch.cat(gains)

    def exact_gain(self, unit: int) -> float:
        """One of `gains`, in float64."""
        return float(self._exact(unit).solved.square().sum())

    def _exact(self, unit: int) -> _Exact:
        at = slice(unit * self.width, (unit + 1) * self.width)
        features, added = self.rows[:, at].double(), self.added[at]
        weighted = self._inverse @ features
        root = torch.linalg.cholesky(features.T @ weighted + torch.diag(added))
        right = features.T @ self.left + added[:, None] * self.dense[:, at].T.double()
        return _Exact(weighted, root, torch.linalg.solve_triangular(root, right, upper=False))

    def add(self, unit: int) -> float:
        """Picks a unit. Returns its gain."""
        weighted, root, solved = self._exact(unit)
        along = torch.linalg.solve_triangular(root, weighted.T, upper=False)  # U^T
        self._inverse.addmm_(along.T, along, alpha=-1)
        self.left.addmm_(along.T, solved, alpha=-1)
        across = along.to(self.rows) @ self.rows  # V
        self._right.addmm_(across.T, solved.to(self.rows), alpha=-1)
        by_unit = across.view(self.width, self.units, self.width).transpose(0, 1).double()
        self._blocks.baddbmm_(by_unit.mT, by_unit, alpha=-1)
        return float(solved.square().sum())

    def _of(self, units: Tensor) -> Tensor:
        """The rows' features of some units: (n, m, w)."""
        by_unit = self.rows.view(len(self.rows), self.units, self.width)
        return by_unit[:, units].transpose(0, 1)


class DualObjective:
    """Least squares of all parts, refitted in every step, for `loop.greedy`."""

    def __init__(self, parts: Sequence[DualPart], scale: float) -> None:
        self.units, self._parts, self._scale = parts[0].units, parts, scale
        self._picked = torch.zeros(self.units, dtype=torch.bool)
        self._error = sum(  # with the ridge
            float(part.targets.square().sum() + _squares(part.dense) @ part.added)
            for part in parts
        )  # fmt: skip

    def scores(self, k: int, candidates: Tensor, everywhere: bool = False) -> Tensor:
        gains = torch.stack([part.gains() for part in self._parts]).sum(0)
        gains[self._picked] = 0
        if self._parts[0].rows.dtype == torch.float32:
            self._decide(gains, candidates)
        return self._scale * (self._error - gains[candidates])

    def _decide(self, gains: Tensor, candidates: Tensor) -> None:
        """Computes the gains again that float32 can't tell from the largest, in place."""
        of_candidates = gains[candidates]
        best = float(of_candidates.max())
        near = candidates[of_candidates >= best - NEAR * abs(best)]
        near = near[gains[near].argsort(descending=True, stable=True)[:MOST_NEAR]]
        for unit in near.tolist() if len(near) > 1 else ():
            if not self._picked[unit]:
                gains[unit] = sum(part.exact_gain(unit) for part in self._parts)

    def add(self, k: int, unit: int) -> None:
        if not self._picked[unit]:
            self._picked[unit] = True
            self._error -= sum(part.add(unit) for part in self._parts)

    def loss(self, k: int) -> float:
        """Without the ridge."""
        return self._scale * sum(float(part.left.square().sum()) for part in self._parts)

    def gap(self, k: int) -> float | None:
        return None


def greedy_dual(
    parts: Sequence[DualPart], rule: Rule, *, scale: float = 1.0, step: Step | None = None
) -> tuple[Path, Tensor]:
    """All greedy steps of least squares that is refitted in every step, as `ops.greedy_refit`.

    Returns:
        the path, whose losses are without the ridge, and the picked units (K,) int64 in order

    Source: eq. (4), in the dual form of ridge regression (Saunders et al. 1998).
    """
    path = greedy(DualObjective(parts, scale), rule, step)
    return path, first_picks(path.order)
