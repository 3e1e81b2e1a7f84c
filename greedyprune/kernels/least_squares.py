"""Least squares on the features of chosen units: one ridge, one Cholesky factor."""

from __future__ import annotations

import torch
from torch import Tensor

from .path import Refit

DEPENDENT = 1e-10  # share of a unit's own norm below which what others leave of it is rounding


def factored(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky's factor, and which units depend on those before them.

    A dependent (or dead) unit gets a row of the identity, so that it stays out of all the others.
    The matrix is written over.
    """
    scale = gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    correlation = gram.div_(scale).div_(scale[:, None])
    factor, info = torch.linalg.cholesky_ex(correlation)
    dropped = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
    if int(info) or bool((factor.diagonal() ** 2 < DEPENDENT).any()):
        del factor
        factor, dropped = _factor_dependent(correlation)
    return factor.mul_(torch.where(dropped, 1.0, scale)[:, None]), dropped


def _factor_dependent(correlation: Tensor) -> tuple[Tensor, Tensor]:
    """The same column by column; the matrix is written over."""
    rest, factor = correlation, torch.zeros_like(correlation)
    dropped = torch.zeros(len(rest), dtype=torch.bool, device=rest.device)
    for j in range(len(rest)):
        if rest[j, j] < DEPENDENT:
            factor[j] = 0
            factor[j, j] = 1
            dropped[j] = True
            continue
        column = rest[j:, j] / rest[j, j].sqrt()
        factor[j:, j] = column
        rest[j:, j:].addr_(column, column, alpha=-1)
    return factor, dropped


def ridge(gram: Tensor, damping: float) -> float:
    """The number that is added to a Gram matrix's diagonal: damping times its mean.

    1 where all features are dead, so that the matrix can be factored.
    """
    return damping * float(gram.diagonal().mean()) or 1.0


def on_units(gram: Tensor, right: Tensor, units: Tensor, width: int, added: float = 0.0) -> Refit:
    """Least squares on units (K,) in that order, for every length.

    added: to the diagonal
    """
    rows = (units[:, None] * width + torch.arange(width)).flatten()
    block = gram[rows[:, None], rows]
    block.diagonal().add_(added)
    factor = torch.linalg.cholesky(block)
    return Refit(units, factor, torch.linalg.solve_triangular(factor, right[rows], upper=False))
