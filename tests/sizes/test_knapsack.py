"""The knapsack: exact, or with an honest gap."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from greedyprune.sizes import knapsack
from greedyprune.sizes.knapsack import Knapsack, solve


def random_knapsack(
    items: int, widths: int, seed: int, *, edges: str = "", share: float = 0.5
) -> Knapsack:
    """Random losses that fall with the width, and random costs.

    edges: the coupled items: "" (none), "chain" (neighbours) or "all" (every pair)
    share: the limit, as a share of the cost of the largest widths
    """
    rng = np.random.default_rng(seed)
    all_widths = [np.arange(1.0, 1 + widths) for _ in range(items)]
    values = [np.sort(rng.random(widths))[::-1].copy() for _ in range(items)]
    costs = [rng.integers(1, 1000) * item_widths for item_widths in all_widths]
    pairs = [(i, j) for i, j in itertools.combinations(range(items), 2)
             if edges == "all" or (edges == "chain" and j == i + 1)]  # fmt: skip
    couplings = {pair: float(rng.integers(1, 300)) for pair in pairs}
    unlimited = Knapsack(values, costs, all_widths, couplings, np.inf)
    limit = share * unlimited.cost(np.full(items, widths - 1))
    return Knapsack(values, costs, all_widths, couplings, limit)


def minimum_by_enumeration(problem: Knapsack) -> float:
    choices = itertools.product(*(range(len(widths)) for widths in problem.widths))
    affordable = [c for c in map(np.array, choices) if problem.cost(c) <= problem.limit]
    return min(problem.value(c) for c in affordable)


@pytest.mark.parametrize("edges", ["", "chain", "all"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_the_knapsack_is_solved_exactly(edges: str, share: float) -> None:
    for seed in range(8):
        problem = random_knapsack(4, 5, seed, edges=edges, share=share)
        best = solve(problem)
        assert problem.cost(best.choice) <= problem.limit
        assert best.value == pytest.approx(problem.value(best.choice))
        assert best.gap == 0
        assert best.value == pytest.approx(minimum_by_enumeration(problem), abs=1e-12)


@pytest.mark.parametrize("edges", ["", "chain", "all"])
def test_the_gap_holds_where_the_search_is_not_complete(
    edges: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knapsack, "BEAMS", (1,))
    monkeypatch.setattr(knapsack, "TRIED", (2, 1))
    gaps = []
    for seed in range(30):
        problem = random_knapsack(4, 5, seed, edges=edges)
        best = solve(problem)
        assert problem.cost(best.choice) <= problem.limit
        minimum = minimum_by_enumeration(problem)
        assert best.value - best.gap - 1e-12 <= minimum <= best.value + 1e-12
        gaps.append(best.gap)
    assert max(gaps) > 0


def test_a_large_knapsack() -> None:
    for items, widths, edges in ((200, 4096, ""), (13, 512, "chain")):
        problem = random_knapsack(items, widths, 0, edges=edges)
        best = solve(problem)
        assert problem.cost(best.choice) <= problem.limit
        assert best.gap <= 0.02 * best.value


def test_a_limit_above_all_costs_and_one_below() -> None:
    problem = random_knapsack(3, 4, 0, share=1.0)
    assert solve(problem).choice.tolist() == [3, 3, 3]
    with pytest.raises(ValueError, match="even the smallest widths cost"):
        solve(random_knapsack(3, 4, 0, share=0.1))
