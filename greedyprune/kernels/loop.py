"""The greedy loop in Python (eq. (1)), for objectives that no kernel runs as a whole."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .path import Path, Rule, Step

# Scores whose relative difference is below this are equal, and the lowest index wins. The sums of
# two equal units may differ by some hundred roundings of 2^-53, because their order may differ.
TIE = 1e-13


class Objective(Protocol):
    """What the loop minimises. An objective knows z, the sum of phi over the picks so far."""

    units: int

    def scores(self, k: int, candidates: Tensor, everywhere: bool = False) -> Tensor:
        """L(b + (z + phi_j) / k) for each candidate j, or any increasing function of it: (n,).

        everywhere: score on all samples, not on the step's mini-batch
        """

    def add(self, k: int, unit: int) -> None:
        """Adds phi_unit to z."""

    def loss(self, k: int) -> float:
        """L(b + z / k)."""

    def gap(self, k: int) -> float | None:
        """<L'(u), u> - min_j <L'(u), phi_j> at u = z / k; None where it is not wanted."""


def greedy(objective: Objective, rule: Rule, step: Step | None = None) -> Path:
    """Runs greedy forward selection.

    Source: eq. (1) (Ye et al. 2020; Wolfe et al. 2021, algorithm 1).
    """
    available = list(range(objective.units))
    order: list[int] = []
    losses: list[float] = []
    gaps: list[float | None] = []
    while rule.goes_on(len(order), len(set(order))) and available:
        k = len(order) + 1
        n = len(available)
        if rule.draws is not None:  # the first steps of a Fisher-Yates shuffle
            draws = rule.draws[k - 1, :n].tolist()
            for i, uniform in enumerate(draws):
                other = i + int(uniform * (n - i))
                available[i], available[other] = available[other], available[i]
            n = len(draws)
        candidates = torch.tensor(available[:n])
        scores = objective.scores(k, candidates).cpu()
        if rule.shortlist:
            candidates = candidates[scores.argsort(stable=True)[: rule.shortlist]]
            scores = objective.scores(k, candidates, everywhere=True).cpu()
        lowest = scores.min()
        unit = int(candidates[scores <= lowest + TIE * lowest.abs()].min())
        objective.add(k, unit)
        order.append(unit)
        losses.append(objective.loss(k))
        gaps.append(objective.gap(k))
        if not rule.replacement:
            position = available.index(unit)
            available[position] = available[-1]
            available.pop()
        if step is not None and step(k, unit, losses[-1]):
            break
    gap = None if None in gaps else torch.tensor(gaps, dtype=torch.float64)
    return Path(torch.tensor(order), torch.tensor(losses, dtype=torch.float64), gap)
