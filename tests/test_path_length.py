"""The public contract: how long the path is, by size, steps and tolerance."""

from collections.abc import Iterable

import pytest
import torch
from oracle import Dense, Problem, each_backend, each_loss, near, problem, select
from torch import nn

from greedyprune.runtime import progress

pytestmark = pytest.mark.usefixtures("one_thread")


def test_default_keeps_half_the_units_once() -> None:
    model, x, y = problem()
    selection = select(model, (x, y))
    assert len(selection.kept) == len(selection.order) == 8
    assert Dense(model, x, y, "mse").follow(selection.order, replacement=False) == 8


@pytest.mark.parametrize(
    ("size", "kept"), [(1, 1), (7, 7), (20, 20), (0.3, 6), (0.01, 1), (1.0, 20), ({"0": 4}, 4)]
)
def test_size_counts_distinct_units(size: object, kept: int) -> None:
    model, x, y = problem(n=20)
    selection = select(model, (x, y), size=size)
    assert len(selection.kept) == len(selection.order) == kept
    if kept == 20:
        assert float(selection.losses[-1]) == near(float(selection.dense_loss))


@pytest.mark.parametrize("weights", ["refit", "none"])
def test_a_tolerance_on_other_weights_ends_the_steps_soon_after_it_is_reached(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of weights that the loop does not have are computed at few steps, but not last."""
    model, x, y = problem(n=400, m=200)
    steps = 0

    class Counting(progress.tqdm):
        def update(self, n: float = 1) -> bool | None:
            nonlocal steps
            steps += int(n)
            return super().update(n)

    monkeypatch.setattr(progress, "tqdm", Counting)
    with pytest.warns(UserWarning, match="tolerance: 10 allows 11 times the dense loss"):
        selection = select(model, (x, y), tolerance=10.0, weights=weights)
    goal = float(selection.dense_loss) * 11
    assert float(selection.losses[-1]) <= goal < float(selection.losses[:-1].min())
    assert len(selection.order) <= steps == (128 if weights == "none" else 32)  # of 400


def test_size_with_replacement_stops_at_that_many_distinct_units() -> None:
    model, x, y = problem(n=20)
    selection = select(model, (x, y), size=4, replacement=True)
    assert selection.distinct.tolist().count(4) == 1
    assert len(selection.kept) == 4
    assert Dense(model, x, y, "mse").follow(selection.order) == len(selection.order)


def orthogonal(planted: Iterable[int], n: int = 12) -> Problem:
    """Unit j answers sample j only; the target is the mean of the planted units."""
    model = nn.Sequential(nn.Linear(n, n, bias=False), nn.ReLU(), nn.Linear(n, 2))
    x = torch.eye(n)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(n))
        model[2].weight.fill_(0.5)
        dense = Dense(model, x, torch.zeros(n, 2), "mse")
        return model, x, (model[2].bias + dense.phi[list(planted)].mean(0)).float()


@each_backend
def test_repeats_that_go_on_for_ever_are_stopped_with_a_warning(backend: str) -> None:
    model, x, y = orthogonal([3])
    with pytest.warns(UserWarning, match="size"):
        selection = select(model, (x, y), size=2, replacement=True, backend=backend)
    assert selection.order.tolist() == [3] * 20


@each_backend
@pytest.mark.parametrize("planted", [[3, 7, 11], [5, 9, 5], [0], [0, 1, 2, 3]])
def test_a_planted_mean_is_recovered(backend: str, planted: list[int]) -> None:
    model, x, y = orthogonal(planted)
    selection = select(model, (x, y), steps=len(planted), backend=backend)
    assert selection.order.tolist() == planted
    assert float(selection.losses[-1]) < 1e-10
    assert (selection.losses[:-1] > 1e-3).all()


@each_backend
@each_loss
def test_tolerance_stops_at_the_first_step_within_it(backend: str, loss: str) -> None:
    model, x, y = problem(loss, n=24)
    selection = select(model, (x, y), tolerance=0.1, loss=loss, backend=backend)
    within = selection.losses <= 1.1 * selection.dense_loss
    assert within.tolist() == [False] * (len(within) - 1) + [True]
    assert len(within) > 1
