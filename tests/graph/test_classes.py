"""Classes of entries, against sets that are united one pair at a time."""

from __future__ import annotations

import time

import numpy as np
import pytest

from greedyprune.graph.classes import Classes


def united_by_hand(pairs: np.ndarray, count: int) -> list[int]:
    """The least entry of each entry's class."""
    least = list(range(count))
    for one, other in pairs.tolist():
        kept, gone = sorted((least[one], least[other]))
        least = [kept if entry == gone else entry for entry in least]
    return least


@pytest.mark.parametrize("seed", range(20))
def test_the_same_classes_as_by_hand(seed: int) -> None:
    generator = np.random.default_rng(seed)
    classes, pairs = Classes(), generator.integers(60, size=(generator.integers(1, 80), 2))
    classes.fresh(60)
    for some in np.array_split(pairs, 3):
        classes.unite(some[:, 0], some[:, 1])
    assert classes.roots(np.arange(60)).tolist() == united_by_hand(pairs, 60)


@pytest.mark.parametrize("order", [1, -1])
def test_chains_and_stars(order: int) -> None:
    classes = Classes()
    ids = classes.fresh(1000)[::order]
    classes.unite(ids[1:500], ids[:499])
    classes.unite(ids[500:], ids[500])
    assert len(np.unique(classes.roots(ids))) == 2


def test_long_chains_are_short_work() -> None:
    classes, count = Classes(), 200_000
    ids = classes.fresh(count)
    classes.fix(ids, "a reason")
    start = time.perf_counter()
    classes.unite(ids[1:], ids[:-1])
    assert time.perf_counter() - start < 20  # a walk along the chain takes minutes
    assert not classes.roots(ids).any()


def test_a_class_keeps_its_first_reason_and_gives_it_to_what_joins() -> None:
    classes = Classes()
    classes.fresh(6)
    classes.fix(np.array([4]), "the first reason")
    classes.fix(np.array([4]), "another")
    assert list(classes.reasons(np.array([3, 4]))) == [None, "the first reason"]
    classes.unite(np.array([4, 1, 2]), np.array([3, 4, 1]))
    reasons = list(classes.reasons(np.arange(6)))
    assert reasons == [None, *["the first reason"] * 4, None]
