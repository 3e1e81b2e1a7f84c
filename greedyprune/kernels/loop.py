"""The greedy loop in Python: README eq. 1, for objectives that no kernel runs whole."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .path import Path, Rule, Step

TIE = 1e-13  # relative: scores closer than float64 sums can tell apart are equal


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
