"""The widths with the lowest total loss within several limits, such as FLOPs and latency.

A choice that is within all limits also keeps any weighted sum of the costs within the same sum of
the limits. So the knapsack with this one limit is a relaxation (a surrogate constraint; Glover
1968, "Surrogate constraints"). If its best choice is within all limits, it is the best. Otherwise
the limits that it exceeds get more weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .knapsack import Best, Indices, Knapsack, Numbers, filled_up, solve

ROUNDS = 12  # surrogate knapsacks that are solved, at most


def solve_within(knapsacks: Sequence[Knapsack]) -> Best:
    """The choice with the lowest value that is within the limit of every knapsack.

    knapsacks: they have the same values and widths; ValueError where no choice is within a limit
    """
    if len(knapsacks) == 1:
        return solve(knapsacks[0])
    values = knapsacks[0].values
    smallest = np.zeros(len(values), np.int64)
    for knapsack in knapsacks:
        if knapsack.cost(smallest) > knapsack.limit:
            raise ValueError(f"even the smallest widths cost {knapsack.cost(smallest):g}")
    unlimited = np.array([of_item.argmin() for of_item in values])
    scales = np.array([max(1e-300, knapsack.cost(unlimited)) for knapsack in knapsacks])
    excess = _excess(knapsacks, unlimited) / scales
    if (excess <= 0).all():
        return Best(unlimited, knapsacks[0].value(unlimited), 0.0)
    weights = np.zeros(len(knapsacks))
    weights[excess.argmax()] = 1.0
    best, bound = smallest, -np.inf
    for count in range(1, ROUNDS + 1):
        relaxed = solve(_weighted(knapsacks, weights / scales))
        bound = max(bound, relaxed.value - relaxed.gap)
        excess = _excess(knapsacks, relaxed.choice) / scales
        choice = _within(knapsacks, relaxed.choice)
        best = min(best, choice, key=knapsacks[0].value)
        if (excess <= 0).all() or knapsacks[0].value(best) <= bound:
            break
        weights = np.maximum(0, weights + excess / (count * np.abs(excess).max()))
        weights /= weights.sum()
    value = knapsacks[0].value(best)
    return Best(best, value, max(0.0, value - bound))


def _excess(knapsacks: Sequence[Knapsack], choice: Indices) -> Numbers:
    """How much the choice costs above each limit."""
    return np.array([knapsack.cost(choice) - knapsack.limit for knapsack in knapsacks])


def _weighted(knapsacks: Sequence[Knapsack], weights: Numbers) -> Knapsack:
    """The knapsack whose cost and limit are weighted sums of those of the knapsacks."""
    pairs = list(zip(knapsacks, weights.tolist(), strict=True))
    couplings: dict[tuple[int, int], float] = {}
    for knapsack, weight in pairs:
        for items, coupling in knapsack.couplings.items():
            couplings[items] = couplings.get(items, 0.0) + weight * coupling
    items_costs = zip(*(knapsack.costs for knapsack in knapsacks), strict=True)
    costs = [np.tensordot(weights, np.stack(of_item), 1) for of_item in items_costs]
    limit = sum(weight * knapsack.limit for knapsack, weight in pairs)
    return replace(knapsacks[0], costs=costs, couplings=couplings, limit=limit)


def _within(knapsacks: Sequence[Knapsack], choice: Indices) -> Indices:
    """A choice within all limits: narrower where that loses least for the excess that it saves."""
    choice = choice.copy()
    while ((excess := _excess(knapsacks, choice)) > 0).any():
        over = [(knapsack, e) for knapsack, e in zip(knapsacks, excess, strict=True) if e > 0]
        best, item, index = np.inf, -1, 0
        for i, chosen in enumerate(choice.tolist()):
            if not chosen:
                continue
            saved = np.zeros(chosen)
            for knapsack, e in over:
                costs = knapsack.costs_of(i, choice)
                saved += np.minimum(1.0, (costs[chosen] - costs[:chosen]) / e)
            lost = knapsacks[0].values[i][:chosen] - knapsacks[0].values[i][chosen]
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = np.where(saved > 0, lost / saved, np.inf)
            if ratios.min() < best:
                best, item, index = float(ratios.min()), i, int(ratios.argmin())
        if item < 0:  # rounding: only the smallest widths are left
            return np.zeros_like(choice)
        choice[item] = index
    return filled_up(knapsacks, choice)
