"""The ridge, and Cholesky factors of features some of which depend on others."""

import pytest
import torch

from greedyprune.kernels import least_squares


def test_a_ridge_scales_as_the_features_do() -> None:
    squares = torch.tensor([1.0, 2.0, 6.0]).double()
    assert least_squares.ridge(squares, 1e-2) == pytest.approx(3e-2)
    assert least_squares.ridge(100 * squares, 1e-2) == pytest.approx(3.0)
    assert least_squares.ridge(0 * squares, 1e-2) == 1.0  # all features are dead


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
