"""Several limits at once: within all of them, the best or with an honest gap."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from test_knapsack import random_knapsack

from greedyprune.sizes.knapsack import Knapsack
from greedyprune.sizes.limits import solve_within


def random_knapsacks(count: int, seed: int, edges: str) -> list[Knapsack]:
    """Knapsacks of the same values and widths, with costs and limits of their own."""
    first, *others = (
        random_knapsack(4, 5, 100 * seed + i, edges=edges, share=0.4 + 0.02 * i)
        for i in range(count)
    )
    return [first, *(replace(other, values=first.values) for other in others)]


@pytest.mark.parametrize("edges", ["", "chain", "all"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_choice_is_within_all_limits_and_near_the_best(count: int, edges: str) -> None:
    excess = []
    for seed in range(12):
        problems = random_knapsacks(count, seed, edges)
        best = solve_within(problems)
        assert all(problem.cost(best.choice) <= problem.limit for problem in problems)
        assert best.value == pytest.approx(problems[0].value(best.choice))
        choices = map(np.array, itertools.product(range(5), repeat=4))
        lowest = min(
            problems[0].value(choice) for choice in choices
            if all(problem.cost(choice) <= problem.limit for problem in problems)
        )  # fmt: skip
        assert best.value - best.gap <= lowest + 1e-9
        excess.append(best.value / lowest - 1)
    assert min(excess) >= -1e-9
    assert np.median(excess) <= 1e-9
    assert max(excess) <= 0.02


def test_a_second_limit_that_is_met_anyway_changes_nothing() -> None:
    problem = random_knapsack(4, 5, 0, edges="chain")
    alone, both = solve_within([problem]), solve_within([problem, replace(problem, limit=1e9)])
    assert alone.choice.tolist() == both.choice.tolist()
    assert both.gap == alone.gap == 0


def test_a_limit_that_no_choice_meets() -> None:
    problem = random_knapsack(4, 5, 0)
    with pytest.raises(ValueError, match="even the smallest widths cost"):
        solve_within([problem, replace(problem, limit=1.0)])
