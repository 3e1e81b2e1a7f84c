"""The records that every backend takes and returns: rule, sums, path and refitted weights.

A greedy step picks one unit. A path is the sequence of the picks. docs/how-it-works.md has
the equations and the notation: N units, m samples, C outputs, phi_j what unit j adds to the
outputs, t the targets less the bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Called after each greedy step with (k, unit, loss). The path ends there if it returns True.
Step = Callable[[int, int, float], bool]
NORM_ROWS = 256  # rows of the inverse factor that `NestedFit.norms` multiplies at a time


@dataclass(frozen=True)
class Rule:
    """When the greedy loop stops and which units it may pick.

    steps:       the largest number of picks
    size:        the loop stops when this many distinct units are picked
    replacement: may a unit be picked again?
    draws:       (steps, candidates) float64, uniform in [0, 1): each step scores this many
                 candidates, drawn at random; None: each step scores all units
    shortlist:   for mini-batches: this many of the best candidates are scored again on all
                 samples, and the second score decides; 0: the first score decides
    """

    steps: int
    size: int
    replacement: bool
    draws: Tensor | None = None
    shortlist: int = 0

    def most(self, units: int) -> int:
        """The largest number of distinct units that can be picked out of `units`."""
        return min(self.steps, self.size, units)

    def goes_on(self, picks: int, distinct: int) -> bool:
        """Does the rule ask for another pick after `picks` picks of `distinct` distinct units?"""
        return picks < self.steps and distinct < self.size


@dataclass(frozen=True)
class Path:
    """The result of a greedy loop of k steps. All tensors are on the CPU.

    order:    (k,) int64, the picked units in sequence
    losses:   (k,) float64, the loss after each step
    gap:      (k,) float64, the Frank-Wolfe gap after each step, or None where it was not asked for
    scored:   the number of candidate losses that were computed; a bound ruled the others out
    rescored: the number of candidates that were scored again because the rounding of their first
              score could have decided the pick
    """

    order: Tensor
    losses: Tensor
    gap: Tensor | None
    scored: int = 0
    rescored: int = 0


@dataclass(frozen=True)
class NestedFit:
    """Least squares on the units in the order of their first picks, for every number of them.

    A unit has w features side by side: one as the input of a Linear, its taps for a convolution.
    H holds the features of the picked units, one a row, and t the target:

        minimise |t - B H|^2 over B,    B^T = (H H^T)^-1 H t^T = factor^-T solved

    A Cholesky factor is nested: its first d w rows and columns belong to the first d units alone.

    units:  (K,) int64, the distinct units
    factor: (K w, K w) float64, lower triangular, factor @ factor.T = H H^T
    solved: (K w, C) float64, factor^-1 H t^T
    """

    units: Tensor
    factor: Tensor
    solved: Tensor

    @property
    def width(self) -> int:
        """The number of features of a unit, w."""
        return len(self.factor) // max(1, len(self.units))

    def outgoing(self, distinct: int) -> Tensor:
        """The new outgoing weights of the first `distinct` units: (C, distinct, w) float64."""
        size = distinct * self.width
        factor, solved = self.factor[:size, :size], self.solved[:size]
        weights = torch.linalg.solve_triangular(factor.T, solved, upper=True).T
        return weights.reshape(-1, distinct, self.width)

    def norms(self, factors: Tensor) -> Tensor:
        """The sum of the squares of `outgoing(d)` for d = 1 to K: (K,) float64.

        factors: (K w,) float64, of the squares of each feature's weights

        With R = factor^-1 the weights on the first n features are B^T = R_n^T solved_n. Feature i
        adds 2 sum_{j<i} M_ij + M_ii to |B|^2, where M = (R R^T) * (solved solved^T), entry by
        entry. One inverse therefore serves all d.
        """
        inverse = torch.linalg.solve_triangular(
            self.factor, torch.eye(len(self.factor), dtype=torch.float64), upper=False
        )
        added = []  # to |B|^2, by each feature
        starts = range(0, len(inverse), NORM_ROWS)
        for i, rows in zip(starts, inverse.split(NORM_ROWS), strict=True):
            end = i + len(rows)
            products = (rows[:, :end] * factors[:end]) @ inverse[:end, :end].T
            products *= self.solved[i:end] @ self.solved[:end].T
            products.tril_(i)
            added.append(2 * products.sum(1) - products.diagonal(i))
        return torch.cat(added).cumsum(0)[self.width - 1 :: self.width]

    def distances(self, dense: Tensor, factors: Tensor) -> Tensor:
        """The squared distance of `outgoing(d)` to dense weights, for d = 1 to K: (K,) float64.

        Units that are not among the first d have the weight 0. With B the weights on the first d
        units and W the dense ones, |W - B|^2 = |W|^2 - 2 <W, B> + |B|^2, and <W, B> is the sum of
        (factor^-1 W^T) * solved over the first d w rows.

        dense:   (C, N w) float64, the dense weights of all N units
        factors: (N w,) float64, of the squares of each feature's weights
        """
        columns = (self.units[:, None] * self.width + torch.arange(self.width)).flatten()
        scaled = (dense * factors).T[columns]
        along = torch.linalg.solve_triangular(self.factor, scaled, upper=False)
        products = (along * self.solved).sum(1).cumsum(0)[self.width - 1 :: self.width]
        whole = (dense.square() * factors).sum()
        return whole - 2 * products + self.norms(factors[columns])


def first_picks(order: Tensor) -> Tensor:
    """The distinct units of `order` (k,) int64, in the order of their first picks."""
    return torch.tensor(list(dict.fromkeys(order.tolist())), dtype=torch.int64)


@dataclass(frozen=True)
class Moments:
    """Sums over all samples that squared error needs beside the Gram matrix (eq. (2)).

    samples:     m
    mass:        what the sums are divided by to give the loss
    norm:        (N,) float64, G_jj = |phi_j|^2
    beta:        (N,) float64, <phi_j, t>
    target_norm: |t|^2
    dense_loss:  the loss of the layer with all its units
    spread:      (B/2) V of eq. (3)
    empty_loss:  the loss of the layer without units
    """

    samples: int
    mass: float
    norm: Tensor
    beta: Tensor
    target_norm: float
    dense_loss: float
    spread: float
    empty_loss: float


@dataclass(frozen=True)
class Exact:
    """The features behind a rounded Gram matrix: they decide between units that it can't.

    rounding: bound on the error of an entry G_ij, relative to |phi_i| |phi_j|
    features: (N, m) float32 or float64; outgoing: (N, C) float64
    target:   (C, m) float64, t
    """

    rounding: float
    features: Tensor
    outgoing: Tensor
    target: Tensor
