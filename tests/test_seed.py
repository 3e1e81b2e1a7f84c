"""What the seed decides, and what it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_problems import Problem, both, inner, one_layer, same

from greedyprune import Fisher, Imitation, Loss

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDED: dict[str, tuple[Callable[..., Problem], object]] = {
    "random candidates": (one_layer, Loss(candidates=3)),
    "random candidates, inner layer": (inner, Loss(candidates=3)),
    "mini-batches": (one_layer, Loss(batch_size=8)),
    "mini-batches, inner layer": (inner, Loss(batch_size=8)),
    "mini-batches of candidates by the gradient": (
        inner, Loss(candidates=3, draw="gradient", batch_size=8)
    ),
    "labels for the metric": (inner, Imitation(metric="fisher")),
}  # fmt: skip
UNSEEDED: dict[str, tuple[Callable[..., Problem], object]] = {
    "imitation": (both, Imitation()),
    "imitation by itself": (both, Imitation(sequential=False)),
    "loss": (both, Loss()),
    "squared error": (lambda: one_layer("numbers"), Loss()),
    "all candidates at random": (one_layer, Loss(candidates=24)),
    "by the gradient": (both, Loss(candidates=3, draw="gradient")),
    "all samples in a batch": (inner, Loss(batch_size=120)),
    "gates": (both, Fisher()),
    "auto": (both, "auto"),
}


@pytest.mark.parametrize("name", SEEDED)
def test_what_the_seed_decides(name: str) -> None:
    make, objective = SEEDED[name]
    problem = make()
    first = problem.select(objective=objective, seed=1)
    torch.manual_seed(99)  # torch's own generator decides nothing
    assert same(first, problem.select(objective=objective, seed=1))
    assert not all(same(first, problem.select(objective=objective, seed=s)) for s in (2, 3))


@pytest.mark.parametrize("name", UNSEEDED)
def test_what_the_seed_does_not_decide(name: str) -> None:
    make, objective = UNSEEDED[name]
    problem = make()
    first = problem.select(objective=objective, seed=1)
    torch.manual_seed(99)
    for seed in (2, 3):
        other = problem.select(objective=objective, seed=seed)
        for producer, layer in first.layers.items():
            assert layer.order.equal(other.layers[producer].order)
            torch.testing.assert_close(
                layer.losses, other.layers[producer].losses, rtol=1e-12, atol=0
            )
