"""Exchanging kept units for dropped ones, after least squares has chosen: while the error falls.

K and its right side are swept on the kept units (the sweep operator, Beaton 1964): from then on
what dropping a unit costs and what each other in its place would bring are small products, and an
exchange is two updates of the rank of a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops, reference
from .reference import Refit

TRIED = 8  # kept units a round: those that cost least to drop
LEAST = 1e-9  # of |t|^2: what an exchange has to bring


def exchanged(
    gram: Tensor, right: Tensor, target_norm: float, kept: Tensor, width: int, limit: int,
    backend: str,
) -> Tensor:  # fmt: skip
    """Kept units (K,) after at most `limit` exchanges: those that stay in their order, then others.

    gram: (N w, N w) float64; right: (N w, C) float64
    """
    units = kept.tolist()
    features = torch.arange(len(gram)).view(-1, width)
    swept, left = gram.clone(), right.clone()
    sweep(swept, left, features[kept].flatten(), 1)
    gains_of = reference.swap_gains if backend == "reference" else ops.swap_gains
    norms = gram.diagonal().contiguous()
    for _ in range(limit):
        dropped = torch.tensor([j for j in range(len(features)) if j not in set(units)])
        if not len(dropped):
            break
        here = torch.tensor(units)
        rows = features[here]
        inner = torch.linalg.inv(-swept[rows[:, :, None], rows[:, None]])  # (K, w, w)
        own = left[rows]
        pull = inner @ own
        costs = (own * pull).sum((1, 2))
        tried = costs.argsort(stable=True)[:TRIED]
        gains = gains_of(
            swept, left, norms, here[tried], dropped, inner[tried], pull[tried], costs[tried]
        )
        best = int(gains.argmax())
        if float(gains.flatten()[best]) <= LEAST * target_norm:
            break
        out = units.pop(int(tried[best // len(dropped)]))
        into = int(dropped[best % len(dropped)])
        sweep(swept, left, features[out], -1)
        sweep(swept, left, features[into], 1)
        units.append(into)
    return torch.tensor(units)


def sweep(swept: Tensor, right: Tensor, rows: Tensor, sign: int) -> None:
    """Takes some features into the fit (sign 1) or out of it (-1), in place."""
    columns, ahead = swept[rows], right[rows]  # copies; the matrix is symmetric
    inverse = torch.linalg.inv(columns[:, rows])
    across = inverse @ columns
    swept.addmm_(columns.T, across, alpha=-1)
    right.addmm_(across.T, ahead, alpha=-1)
    across *= sign
    across[:, rows] = -inverse
    swept[rows] = across
    swept[:, rows] = across.T
    right[rows] = sign * (inverse @ ahead)


def refit_of(gram: Tensor, right: Tensor, units: Tensor, width: int) -> Refit:
    """Least squares on units (K,) in that order, for every length."""
    rows = (units[:, None] * width + torch.arange(width)).flatten()
    factor = torch.linalg.cholesky(gram[rows][:, rows])
    return Refit(units, factor, torch.linalg.solve_triangular(factor, right[rows], upper=False))
