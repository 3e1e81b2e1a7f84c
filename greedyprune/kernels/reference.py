"""What the kernels compute, in plain torch and float64: clear, not fast. It judges the kernels.

The names and signatures are those of `ops`, whose docstrings say what they mean. `ops` calls these
functions for backend="reference"; nothing else in the package does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.losses import Target
from .least_squares import DEPENDENT, on_units
from .loop import greedy
from .path import Moments, NestedFit, Path, Rule, Step, first_picks

CHUNK_ENTRIES = 2**24  # the most entries of a temporary
TINY = 1e-150  # its square can be divided by


def candidate_loss(
    features: Tensor,
    outgoing: Tensor,
    outputs: Tensor,
    target: Target,
    *,
    shrink: float = 1.0,
    units: Tensor | None = None,
) -> Tensor:
    """mass * L(outputs + shrink * phi_j) for each unit j: (n,) float64.

    features: (N, m); outgoing: (N, C); outputs: (C, m)
    """
    units = torch.arange(len(features)) if units is None else units
    losses = torch.empty(len(units), dtype=torch.float64, device=features.device)
    chunk = max(1, CHUNK_ENTRIES // max(1, outputs.numel()))
    for i in range(0, len(units), chunk):
        part = units[i : i + chunk].to(features.device)
        phi = features[part].double()[:, None, :] * outgoing[part].double()[:, :, None]
        losses[i : i + chunk] = target.loss_sum(outputs + shrink * phi)
    return losses


def candidate_slope(
    features: Tensor, outgoing: Tensor, gradient: Tensor, *, units: Tensor | None = None
) -> Tensor:
    """<gradient, phi_j> for each unit j: (n,) float64.

    features: (N, m); outgoing: (N, C); gradient: (C, m)
    """
    units = torch.arange(len(features)) if units is None else units
    slopes = torch.empty(len(units), dtype=torch.float64, device=features.device)
    chunk = max(1, CHUNK_ENTRIES // max(1, features.shape[1]))
    for i in range(0, len(units), chunk):
        part = units[i : i + chunk].to(features.device)
        slopes[i : i + chunk] = ((features[part].double() @ gradient.T) * outgoing[part]).sum(1)
    return slopes


class QuadraticObjective:
    """Squared error by eq. (2) on the Gram matrix, for `loop.greedy`."""

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
    """All greedy steps for squared error on a Gram matrix (N, N) float64."""
    return greedy(QuadraticObjective(gram, moments, with_gap), rule, step)


class Remainder:
    """One part's least squares: what the picked units leave of all features and of the target.

    gram: (N w, N w) float64, right: (N w, C) float64: kept whole, as Schur complements
    """

    def __init__(self, gram: Tensor, right: Tensor, width: int) -> None:
        self._gram, self._right, self._width = gram.clone(), right.clone(), width

    def gain(self, unit: int) -> float:
        """The drop of the squared error if the unit is picked."""
        rows = self._rows(unit)
        right = self._right[rows]
        return float((right * torch.linalg.lstsq(self._gram[rows, rows], right).solution).sum())

    def add(self, unit: int) -> None:
        rows = self._rows(unit)
        across = torch.linalg.solve(self._gram[rows, rows], self._gram[rows])
        weights = torch.linalg.solve(self._gram[rows, rows], self._right[rows])
        columns = self._gram[:, rows].clone()
        self._gram -= columns @ across
        self._right -= columns @ weights

    def _rows(self, unit: int) -> slice:
        return slice(unit * self._width, (unit + 1) * self._width)


class RefitObjective:
    """Least squares of all parts, refitted in every step, for `loop.greedy`, by its definition."""

    def __init__(
        self, units: int, parts: Sequence[Remainder], target_norm: float, scale: float
    ) -> None:
        self.units, self._parts = units, parts
        self._error, self._scale = target_norm, scale
        self._picked: set[int] = set()

    def scores(self, k: int, candidates: Tensor, everywhere: bool = False) -> Tensor:
        gains = torch.tensor([self._gain(int(j)) for j in candidates], dtype=torch.float64)
        return self._scale * (self._error - gains)

    def add(self, k: int, unit: int) -> None:
        if unit in self._picked:
            return
        self._error -= self._gain(unit)
        self._picked.add(unit)
        for part in self._parts:
            part.add(unit)

    def loss(self, k: int) -> float:
        return self._scale * self._error

    def gap(self, k: int) -> float | None:
        return None

    def _gain(self, unit: int) -> float:
        return 0.0 if unit in self._picked else sum(part.gain(unit) for part in self._parts)


def greedy_refit(
    grams: Sequence[Tensor],
    rights: Sequence[Tensor],
    target_norm: float,
    rule: Rule,
    *,
    widths: Sequence[int],
    scale: float = 1.0,
    step: Step | None = None,
) -> tuple[Path, list[NestedFit]]:
    """All greedy steps of least squares that is refitted in every step."""
    problems = list(zip(grams, rights, widths, strict=True))
    parts = [Remainder(*problem) for problem in problems]
    units = len(grams[0]) // widths[0]
    path = greedy(RefitObjective(units, parts, target_norm, scale), rule, step)
    picked = first_picks(path.order)
    return path, [on_units(gram, right, picked, width) for gram, right, width in problems]


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
    """The drop of a squared error by each exchange of a kept for a dropped unit: (p, d).

    A feature of which less than DEPENDENT is left beside the kept ones gains nothing.
    """
    width = inner.shape[-1]
    rows = torch.arange(len(right)).view(-1, width)
    gains = torch.empty(len(kept), len(dropped), dtype=torch.float64)
    for i, p in enumerate(kept.tolist()):
        for k, j in enumerate(dropped.tolist()):
            across = swept[rows[p]][:, rows[j]]
            gram_j = swept[rows[j]][:, rows[j]] + across.T @ inner[i] @ across
            right_j = right[rows[j]] + across.T @ pull[i]
            scale = norms[rows[j]].sqrt().clamp(min=TINY)  # to correlations
            correlations = gram_j / (scale[:, None] * scale)
            inverse = torch.linalg.pinv(correlations, atol=DEPENDENT, rtol=0.0, hermitian=True)
            scaled = right_j / scale[:, None]
            gains[i, k] = (scaled * (inverse @ scaled)).sum() - costs[i]
    return gains
