"""What a greedy loop is given and what it returns: the rule, the sums, the path, the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Called after each step with (k, unit, loss); a true answer ends the path there.
Step = Callable[[int, int, float], bool]
SOME = 256  # rows at a time of what is needed beside a matrix


@dataclass(frozen=True)
class Rule:
    """When the greedy loop stops and what it may pick.

    steps:       at most so many picks
    size:        stop once so many distinct units are picked
    replacement: may a unit be picked again?
    draws:       (steps, candidates) float64 uniform in [0, 1): score random candidates only
    shortlist:   score so many of the best again on all samples; 0: the first score counts
    """

    steps: int
    size: int
    replacement: bool
    draws: Tensor | None = None
    shortlist: int = 0

    def most(self, units: int) -> int:
        """How many distinct of so many units can be picked."""
        return min(self.steps, self.size, units)

    def goes_on(self, picks: int, distinct: int) -> bool:
        """After so many picks of so many distinct units, is another one wanted?"""
        return picks < self.steps and distinct < self.size


@dataclass(frozen=True)
class Path:
    """The greedy picks: order (k,) int64, losses (k,) float64, gap (k,) float64 or None.

    scored: how many candidates' losses were computed; the others could not be the lowest
    rescored: how many candidates were scored again because rounding could have decided
    """

    order: Tensor
    losses: Tensor
    gap: Tensor | None
    scored: int = 0
    rescored: int = 0


@dataclass(frozen=True)
class Refit:
    """Least squares on units in the order of their first picks, for every length at once.

    A unit has w features, side by side: one for a Linear's input, its taps for a convolution's.

    units:  (K,) int64, the distinct units in that order
    factor: (K w, K w) float64, lower triangular, factor @ factor.T = H H^T for their features H
    solved: (K w, C) float64, factor^-1 H t^T: the first d w rows belong to the first d units
    """

    units: Tensor
    factor: Tensor
    solved: Tensor

    @property
    def width(self) -> int:
        return len(self.factor) // max(1, len(self.units))

    def outgoing(self, distinct: int) -> Tensor:
        """The new outgoing weights of the first `distinct` units: (C, distinct, w) float64."""
        size = distinct * self.width
        factor, solved = self.factor[:size, :size], self.solved[:size]
        new = torch.linalg.solve_triangular(factor.T, solved, upper=True).T
        return new.reshape(-1, distinct, self.width)

    def norms(self) -> Tensor:
        """The sum of the squares of `outgoing(d)` for d = 1 to K: (K,) float64."""
        inverse = torch.linalg.solve_triangular(
            self.factor, torch.eye(len(self.factor), dtype=torch.float64), upper=False
        )
        added = []  # by each feature
        for i, rows in zip(range(0, len(inverse), SOME), inverse.split(SOME), strict=True):
            end = i + len(rows)
            products = rows[:, :end] @ inverse[:end, :end].T
            products *= self.solved[i:end] @ self.solved[:end].T
            products.tril_(i)
            added.append(2 * products.sum(1) - products.diagonal(i))
        return torch.cat(added).cumsum(0)[self.width - 1 :: self.width]


@dataclass(frozen=True)
class Moments:
    """Sums over all samples: everything that squared error needs (README eq. 2).

    norm: (N,) float64, G_jj = |phi_j|^2; beta: (N,) float64, <phi_j, t> with t = target - bias
    """

    samples: int
    mass: float
    norm: Tensor
    beta: Tensor
    target_norm: float
    dense_loss: float
    spread: float  # (B/2) V of README eq. 3
    empty_loss: float  # the loss of the layer without units
