"""The ridge, and Cholesky factors of features some of which depend on others."""

import pytest
import torch
from torch import Tensor

from greedyprune.kernels import least_squares


def test_a_ridge_scales_as_the_features_do() -> None:
    squares = torch.tensor([1.0, 2.0, 6.0]).double()
    expected = 1e-2 * (squares * 3).sqrt()  # own square and mean square
    torch.testing.assert_close(least_squares.ridge(squares, 1e-2), expected)
    torch.testing.assert_close(least_squares.ridge(100 * squares, 1e-2), 100 * expected)
    assert least_squares.ridge(0 * squares, 1e-2).tolist() == [1, 1, 1]  # all features are dead
    assert least_squares.ridge(torch.tensor([0.0, 4.0]), 1e-2).gt(0).all()  # one is


def halves_of(rows: Tensor, error: Tensor) -> least_squares.Halves:
    pairs = zip(rows.chunk(2, 1), error.chunk(2, 1), strict=True)
    grams, rights = zip(*((x @ x.T, x @ e.T) for x, e in pairs), strict=True)
    return least_squares.Halves(grams, rights, rows.square().sum(1)[:-1], free=1)


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_the_damping_is_the_best_of_cross_validation(noise: float) -> None:
    """Against errors on the held-out half, computed from the samples themselves."""
    torch.manual_seed(3)
    rows, change = torch.randn(12, 40).double(), torch.randn(3, 12).double()
    rows[-1] = 1  # a constant without a ridge
    error = change @ rows + noise * torch.randn(3, 40).double()
    squares = rows.square().sum(1)[:-1]
    errors = {}
    for power in range(-4, 3):
        total = 0.0
        for fitted, other in ((slice(20), slice(20, 40)), (slice(20, 40), slice(20))):
            x, e = rows[:, fitted], error[:, fitted]
            ridge = torch.cat([least_squares.ridge(squares, 10.0**power), torch.zeros(1).double()])
            found = torch.linalg.solve(x @ x.T + ridge.diag(), x @ e.T).T
            total += float((error[:, other] - found @ rows[:, other]).square().sum())
        errors[10.0**power] = total
    damping, gain = least_squares.chosen_damping([halves_of(rows, error)], 1e-4)
    best = min(errors, key=errors.__getitem__)
    assert damping == pytest.approx(best)
    assert gain == pytest.approx(float(error.square().sum()) - errors[best])
    assert damping == pytest.approx({0.0: 1e-4, 0.3: 1e-4, 3.0: 1e-1}[noise])


def test_without_held_out_samples_the_damping_is_large() -> None:
    nothing, right = torch.zeros(2, 2).double(), torch.ones(2, 1).double()
    gram = torch.eye(2).double()
    problem = least_squares.Halves([gram, nothing], [right, 0 * right], gram.diagonal())
    assert least_squares.chosen_damping([problem], 1e-4) == (0.1, 0.0)
    assert least_squares.chosen_damping([problem], 0.5) == (0.5, 0.0)


def test_dependent_features_get_a_row_of_the_identity() -> None:
    """Of six features the third is dead, and the fifth is the sum of the first two."""
    torch.manual_seed(0)
    x = torch.randn(6, 40, dtype=torch.float64)
    x *= torch.tensor([1.0, 1e3, 1.0, 1e-3, 1.0, 1.0]).double()[:, None]
    x[2], x[4] = 0, x[0] + x[1]
    factor, dependent = least_squares.factored(x @ x.T)
    assert dependent.tolist() == [False, False, True, False, True, False]
    assert factor[dependent].equal(torch.eye(6, dtype=torch.float64)[dependent])
    kept = ~dependent
    torch.testing.assert_close((factor @ factor.T)[kept][:, kept], (x @ x.T)[kept][:, kept])
    assert (factor[kept][:, dependent] == 0).all()


def test_independent_features_are_factored_as_by_cholesky() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 30, dtype=torch.float64) * torch.tensor([1e-6, 1, 1e6, 1, 1])[:, None]
    factor, dependent = least_squares.factored(x @ x.T)
    assert not dependent.any()
    torch.testing.assert_close(factor, torch.linalg.cholesky(x @ x.T))
