"""What the kernels compute, in plain torch and float64: clear rather than fast, and the judge.

The names and signatures are those of `ops`; `greedy` is the loop that every backend runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .losses import Target

# Called after each step with (k, unit, loss); a true answer ends the path there.
Step = Callable[[int, int, float], bool]
SOME = 256  # rows at a time of what is needed beside a matrix
TIE = 1e-13  # relative: scores closer than float64 sums can tell apart are equal


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


class Objective(Protocol):
    """What the loop minimises. It knows z, the sum of the phi picked so far."""

    units: int

    def scores(self, k: int, candidates: Tensor, everywhere: bool = False) -> Tensor:
        """L(b + (z + phi_j) / k) for each candidate j, or anything in the same order.

        everywhere: on all samples, not on the step's mini-batch
        """

    def add(self, k: int, unit: int) -> None:
        """z += phi_unit."""

    def loss(self, k: int) -> float:
        """L(b + z / k)."""

    def gap(self, k: int) -> float | None:
        """<L'(u), u> - min_j <L'(u), phi_j> at u = z / k; None where it is not wanted."""


def greedy(objective: Objective, rule: Rule, step: Step | None = None) -> Path:
    """Greedy forward selection, README eq. 1 (Ye et al. 2020; Wolfe et al. 2021, algorithm 1)."""
    available = list(range(objective.units))
    order: list[int] = []
    losses: list[float] = []
    gaps: list[float | None] = []
    while rule.goes_on(len(order), len(set(order))) and available:
        k = len(order) + 1
        n = len(available)
        if rule.draws is not None:  # the first steps of a Fisher-Yates shuffle
            draw = rule.draws[k - 1, :n].tolist()
            for i, uniform in enumerate(draw):
                other = i + int(uniform * (n - i))
                available[i], available[other] = available[other], available[i]
            n = len(draw)
        candidates = torch.tensor(available[:n])
        scores = objective.scores(k, candidates).cpu()
        if rule.shortlist:
            candidates = candidates[scores.argsort(stable=True)[: rule.shortlist]]
            scores = objective.scores(k, candidates, everywhere=True).cpu()
        lowest = scores.min()
        unit = int(candidates[scores <= lowest + TIE * lowest.abs()].min())  # ties: lowest index
        objective.add(k, unit)
        order.append(unit)
        losses.append(objective.loss(k))
        gaps.append(objective.gap(k))
        if not rule.replacement:
            at = available.index(unit)
            available[at] = available[-1]
            available.pop()
        if step is not None and step(k, unit, losses[-1]):
            break
    gap = None if None in gaps else torch.tensor(gaps, dtype=torch.float64)
    return Path(torch.tensor(order), torch.tensor(losses, dtype=torch.float64), gap)


def candidate_loss(
    features: Tensor,
    outgoing: Tensor,
    outputs: Tensor,
    target: Target,
    *,
    shrink: float = 1.0,
    units: Tensor | None = None,
) -> Tensor:
    """mass * L(outputs + shrink * phi_j) for each unit j; see `ops.candidate_loss`.

    features: (N, m); outgoing: (N, C); outputs: (C, m); returns (n,) float64
    """
    units = torch.arange(len(features)) if units is None else units
    losses = torch.empty(len(units), dtype=torch.float64, device=features.device)
    chunk = max(1, 2**24 // max(1, outputs.numel()))
    for i in range(0, len(units), chunk):
        some = units[i : i + chunk].to(features.device)
        phi = features[some].double()[:, None, :] * outgoing[some].double()[:, :, None]
        losses[i : i + chunk] = target.loss_sum(outputs + shrink * phi)
    return losses


def candidate_slope(
    features: Tensor, outgoing: Tensor, gradient: Tensor, *, units: Tensor | None = None
) -> Tensor:
    """<gradient, phi_j> for each unit j: features (N, m), outgoing (N, C), gradient (C, m)."""
    units = torch.arange(len(features)) if units is None else units
    slopes = torch.empty(len(units), dtype=torch.float64, device=features.device)
    chunk = max(1, 2**24 // max(1, features.shape[1]))
    for i in range(0, len(units), chunk):
        some = units[i : i + chunk].to(features.device)
        slopes[i : i + chunk] = ((features[some].double() @ gradient.T) * outgoing[some]).sum(1)
    return slopes


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


class QuadraticObjective:
    """Squared error by README eq. 2, on the Gram matrix."""

    def __init__(self, gram: Tensor, moments: Moments, with_gap: bool = True) -> None:
        self.units = len(gram)
        self._gram, self._moments, self._with_gap = gram, moments, with_gap
        self._c = torch.zeros_like(moments.norm)
        self._picks: list[int] = []

    def scores(self, k: int, candidates: Tensor, everywhere: bool = False) -> Tensor:
        m = self._moments
        return (m.norm / 2 + self._c - k * m.beta)[candidates.to(m.norm.device)]

    def add(self, k: int, unit: int) -> None:
        self._c += self._gram[:, unit]
        self._picks.append(unit)

    def loss(self, k: int) -> float:
        m = self._moments
        beta, c = m.beta[self._picks].sum(), self._c[self._picks].sum()
        return float((m.target_norm - 2 / k * beta + c / k**2) / m.mass)

    def gap(self, k: int) -> float | None:
        if not self._with_gap:
            return None
        slopes = self._c / k - self._moments.beta
        return float(2 * (slopes[self._picks].mean() - slopes.min()) / self._moments.mass)


def greedy_gram(
    gram: Tensor, moments: Moments, rule: Rule, *, with_gap: bool = True, step: Step | None = None
) -> Path:
    """All greedy steps on a Gram matrix (N, N) float64; see `ops.greedy_gram`."""
    return greedy(QuadraticObjective(gram, moments, with_gap), rule, step)


def greedy_refit(
    gram: Tensor,
    right: Tensor,
    target_norm: float,
    rule: Rule,
    *,
    width: int = 1,
    scale: float = 1.0,
    step: Step | None = None,
) -> tuple[Path, Refit]:
    """Least squares refitted in each step, the Schur complement kept whole; see `ops`."""
    objective = RefitObjective(gram, right, target_norm, width, scale)
    path = greedy(objective, rule, step)
    picked = torch.tensor(list(dict.fromkeys(path.order.tolist())))
    rows = (picked[:, None] * width + torch.arange(width)).flatten()
    factor = torch.linalg.cholesky(gram[rows][:, rows])
    return path, Refit(
        picked, factor, torch.linalg.solve_triangular(factor, right[rows], upper=False)
    )


def swap_gains(
    swept: Tensor,
    right: Tensor,
    norms: Tensor,
    kept: Tensor,
    dropped: Tensor,
    inner: Tensor,
    pull: Tensor,
    costs: Tensor,
) -> Tensor:
    """By what each exchange lowers a squared error; see `ops.swap_gains`."""
    width = inner.shape[-1]
    rows = torch.arange(len(right)).view(-1, width)
    gains = torch.empty(len(kept), len(dropped), dtype=torch.float64)
    for i, p in enumerate(kept.tolist()):
        for k, j in enumerate(dropped.tolist()):
            across = swept[rows[p]][:, rows[j]]
            left = swept[rows[j]][:, rows[j]] + across.T @ inner[i] @ across
            own = right[rows[j]] + across.T @ pull[i]
            gains[i, k] = (own * torch.linalg.lstsq(left, own).solution).sum() - costs[i]
    return gains


class RefitObjective:
    """What is left of |t|^2 once the picked units' weights are solved for again."""

    def __init__(
        self, gram: Tensor, right: Tensor, target_norm: float, width: int, scale: float
    ) -> None:
        self.units, self._width, self._scale = len(gram) // width, width, scale
        self._rest, self._right, self._left = gram.clone(), right.clone(), target_norm
        self._picked: set[int] = set()

    def scores(self, k: int, candidates: Tensor, everywhere: bool = False) -> Tensor:
        gains = torch.tensor([self._gain(int(j)) for j in candidates], dtype=torch.float64)
        return self._scale * (self._left - gains)

    def add(self, k: int, unit: int) -> None:
        if unit in self._picked:
            return
        self._left -= self._gain(unit)
        self._picked.add(unit)
        own = self._features(unit)
        solved = torch.linalg.solve(self._rest[own, own], self._rest[own])
        right = torch.linalg.solve(self._rest[own, own], self._right[own])
        columns = self._rest[:, own].clone()
        self._rest -= columns @ solved
        self._right -= columns @ right

    def loss(self, k: int) -> float:
        return self._scale * self._left

    def gap(self, k: int) -> float | None:
        return None

    def _gain(self, unit: int) -> float:
        if unit in self._picked:
            return 0.0
        own = self._features(unit)
        right = self._right[own]
        return float((right * torch.linalg.lstsq(self._rest[own, own], right).solution).sum())

    def _features(self, unit: int) -> slice:
        return slice(unit * self._width, (unit + 1) * self._width)
