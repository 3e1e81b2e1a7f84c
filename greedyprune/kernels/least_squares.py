"""Least squares from a Gram matrix: the ridge, the Cholesky factor, weights on given units.

With features X (F, m) and targets T (C, m), the weights B that minimise |T - B X|^2 solve
B G = T X^T, G = X X^T. G = L L^T with L lower triangular gives B^T = L^-T (L^-1 X T^T). The factor
is nested: its first n rows and columns are the factor of the first n features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .path import NestedFit

# A feature is dependent where the features before it leave less than this share of its own squared
# norm. The rounding of a float64 Gram matrix of correlated features is smaller by some orders of
# magnitude. csrc/kernels.h has the same number as kDependent, and a test compares the two.
DEPENDENT = 1e-10


def ridge(squares: Tensor, damping: float) -> Tensor:
    """What to add to the diagonal of a Gram matrix before it is factored: (F,) float64.

    damping times the geometric mean of a feature's own squared norm and the mean of all features'.
    So it scales as the features do, and features that are rarely active have a small ridge, but not
    as small as their own norms: few samples say little about them. 1.0 where all features are dead.
    All features of a layer count, picked or not, so that a path has the same ridge at every length.

    Args:
        squares: (F,) float64, the squared norms of all features: the Gram matrix's diagonal
        damping: above 0

    Source: Hoerl and Kennard 1970; relative to the diagonal's mean as in Frantar et al. 2022
        (GPTQ, arXiv:2210.17323), or to each entry as in Marquardt 1963; the geometric mean of both
        did best on held-out samples (benchmarks/NOTES.md, "Ridge").

    Example:
        >>> import torch
        >>> from greedyprune.kernels.least_squares import ridge
        >>> ridge(torch.tensor([1.0, 7.0, 4.0]), damping=0.5)
        tensor([1.0000, 2.6458, 2.0000])
        >>> ridge(torch.zeros(2), damping=0.5)
        tensor([1., 1.])
    """
    mean = squares.mean()
    if not mean:
        return torch.ones_like(squares)
    return damping * (squares.clamp(min=SMALLEST_SQUARE * mean) * mean).sqrt()


SMALLEST_SQUARE = 1e-8  # of a feature, as a share of the mean, in its ridge
DAMPING_FACTOR = 10.0  # from one damping that is tried to the next
MOST_DAMPING = 100.0  # the largest that is tried
UNTESTED_DAMPING = 0.1  # where there are no held-out samples to choose by


class Held(Protocol):
    """A least squares problem for the change of weights, in two halves of the samples."""

    @property
    def has_samples(self) -> bool:
        """Has each half any?"""

    def held_out_gain(self, damping: float) -> float:
        """By how much the change that each half asks for lowers the squared error in the other."""


class Halves(NamedTuple):
    """The problem from Gram matrices, with the ridge of `ridge`.

    grams:   G = X X^T of each half, (F, F) float64
    rights:  X E^T of each half, (F, C) float64
    squares: (F - free,) float64, the features' squared norms over both halves
    free:    how many of the last features have no ridge, such as a constant
    """

    grams: Sequence[Tensor]
    rights: Sequence[Tensor]
    squares: Tensor
    free: int = 0

    @property
    def has_samples(self) -> bool:
        return all(bool(gram.any()) for gram in self.grams)

    def held_out_gain(self, damping: float) -> float:
        gain, added = 0.0, ridge(self.squares, damping)
        for half in (0, 1):
            change = damped_change(self.grams[half], self.rights[half], added, self.free)
            gram, right = self.grams[1 - half], self.rights[1 - half]
            gain += float((change * (2 * right - gram @ change)).sum())
        return gain


def chosen_damping(problems: Sequence[Held], least: float) -> tuple[float, float]:
    """The damping for the lowest error on held-out samples: 2-fold cross-validation.

    In each of two halves of the samples, weights that are there already leave an error E of the
    targets. The change D of the weights solves, in the other half,

        minimise |E - D X|^2 + sum over features j of ridge_j |D_j|^2,

    and lowers the squared error in this half by 2 <D, E X^T> - <D G, D>, G = X X^T. Dampings are
    tried from the least upwards, until the sum over both halves falls.

    Args:
        problems: of each layer that the damping is for
        least: the least damping, above 0

    Returns:
        the damping, and by how much it lowers the squared error in both halves together;
        UNTESTED_DAMPING and 0.0 where a half has no samples

    Source: Hoerl and Kennard 1970 (ridge); Stone 1974 (cross-validation).

    Example:
        >>> import torch
        >>> from greedyprune.kernels.least_squares import Halves, chosen_damping
        >>> gram, right = torch.eye(2).double(), torch.ones(2, 1).double()
        >>> squares = 2 * gram.diagonal()
        >>> chosen_damping([Halves([gram, gram], [right, right], squares)], 1e-4)[0]
        0.0001
        >>> chosen_damping([Halves([gram, gram], [right, -right], squares)], 1e-4)[0]
        100.0
    """
    if not all(problem.has_samples for problem in problems):
        return max(least, UNTESTED_DAMPING), 0.0
    best, damping = (least, -math.inf), least
    while damping <= max(least, MOST_DAMPING) * (1 + 1e-9):
        gain = sum(problem.held_out_gain(damping) for problem in problems)
        if gain < best[1]:
            break
        best, damping = (damping, gain), damping * DAMPING_FACTOR
    return best


def damped_change(gram: Tensor, right: Tensor, added: Tensor, free: int = 0) -> Tensor:
    """The change D^T (F, C) that minimises |E - D X|^2 + sum of added_j |D_j|^2.

    Args:
        gram: (F, F) float64, X X^T
        right: (F, C) float64, X E^T
        added: (F - free,) float64, the features' ridge, above 0
        free: how many of the last features have no ridge
    """
    damped = gram.clone()
    damped.diagonal()[: len(gram) - free].add_(added)
    return torch.cholesky_solve(right, torch.linalg.cholesky(damped))


def factored(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of a Gram matrix, some of whose features may depend on earlier ones.

    The matrix is scaled to correlations first, so that DEPENDENT means the same for features of
    any size. A dependent feature, a dead one among them, gets a row of the identity. It then takes
    no part in the others' weights; its own entry on the right side is to be set to zero.

    Args:
        gram: (F, F) float64, symmetric; its memory is used and its content lost

    Returns:
        the factor (F, F), lower triangular, and which features are dependent, (F,) bool

    Source: Cholesky's factor column by column, right-looking (Golub and Van Loan, Matrix
        Computations, section 4.2), with pivots below DEPENDENT left out.

    Example:
        >>> import torch
        >>> from greedyprune.kernels.least_squares import factored
        >>> x = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 3.0]]).double()
        >>> factored(x @ x.T)[1].tolist()
        [False, True, False]
    """
    scale = gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    correlation = gram.div_(scale).div_(scale[:, None])
    factor, info = torch.linalg.cholesky_ex(correlation)
    dependent = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
    if int(info) or bool((factor.diagonal() ** 2 < DEPENDENT).any()):
        del factor
        factor, dependent = _factor_dependent(correlation)
    return factor.mul_(torch.where(dependent, 1.0, scale)[:, None]), dependent


def _factor_dependent(correlation: Tensor) -> tuple[Tensor, Tensor]:
    """`factored` for a matrix of correlations with dependent features, column by column."""
    rest, factor = correlation, torch.zeros_like(correlation)
    dependent = torch.zeros(len(rest), dtype=torch.bool, device=rest.device)
    for j in range(len(rest)):
        if rest[j, j] < DEPENDENT:
            factor[j] = 0
            factor[j, j] = 1
            dependent[j] = True
            continue
        column = rest[j:, j] / rest[j, j].sqrt()
        factor[j:, j] = column
        rest[j:, j:].addr_(column, column, alpha=-1)
    return factor, dependent


def on_units(
    gram: Tensor, right: Tensor, units: Tensor, width: int, added: Tensor | None = None
) -> NestedFit:
    """Least squares on given units, for every number of them in the order given.

    With the ridge, the matrix has to be positive definite. It is factored as it is: scaling it to
    correlations, as `factored` does, would serve nothing.

    Args:
        gram: (N w, N w) float64, <x_i, x_j>
        right: (N w, C) float64, <x_i, t>
        units: (K,) int64; width: w, the features of a unit, which are side by side
        added: (N w,) float64, the ridge; None: the diagonal has it already

    Raises:
        torch.linalg.LinAlgError: the matrix is not positive definite on these units

    Example:
        >>> import torch
        >>> from greedyprune.kernels.least_squares import on_units
        >>> gram, right = torch.eye(3).double(), torch.tensor([[1.0], [2.0], [3.0]]).double()
        >>> on_units(gram, right, torch.tensor([2, 0]), width=1).outgoing(2).flatten().tolist()
        [3.0, 1.0]
    """
    rows = feature_rows(units, width)
    block = gram[rows[:, None], rows]
    if added is not None:
        block.diagonal().add_(added[rows])
    factor = torch.linalg.cholesky(block)
    return NestedFit(units, factor, torch.linalg.solve_triangular(factor, right[rows], upper=False))


def feature_rows(units: Tensor, width: int) -> Tensor:
    """The indices of the units' features where each unit has `width` side by side: (K w,) int64."""
    return (units[:, None] * width + torch.arange(width)).flatten()
