"""What the kernels compute, in plain torch and float64: clear rather than fast, and the judge.

The names and signatures are those of `ops`; `greedy` is the loop that every backend runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.losses import Target
from .loop import greedy
from .path import Moments, Path, Refit, Rule, Step


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
