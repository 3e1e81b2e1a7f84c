"""Exchanging kept units for dropped ones, after least squares has chosen: while the error falls.

K and its right side are swept on the kept units (the sweep operator, Beaton 1964): from then on
what dropping a unit costs and what each other in its place would bring are small products, and an
exchange is two updates of the rank of a unit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import least_squares, ops, reference
from .path import Refit

TRIED = 8  # kept units a round: those that cost least to drop
LEAST = 1e-9  # of |t|^2: what an exchange has to bring
TOGETHER = 256  # features that are swept together
FEWEST = 2304  # features up to which it is tried from the other side, too


class Fit(NamedTuple):
    """Units (K,) and the two matrices swept on their features: (N w, N w), (N w, C) float64."""

    units: Tensor
    swept: Tensor
    left: Tensor


def best_exchanged(
    gram: Tensor, right: Tensor, target_norm: float, kept: Tensor, width: int, limit: int,
    backend: str,
) -> Refit:  # fmt: skip
    """The fit after exchanges: from the units `kept`, or, if better, from those that elimination
    leaves; units that both have come first, in the order of `kept`.
    """
    starts = [lambda: on_units(gram, right, kept, width)]
    if len(gram) <= FEWEST:
        starts.append(lambda: eliminated(gram, right, len(kept), width))
    norms, best = gram.diagonal().contiguous(), None
    for start in starts:
        units = exchanged(start(), norms, target_norm, width, limit, backend).tolist()
        order = [unit for unit in kept.tolist() if unit in units]
        order += [unit for unit in units if unit not in order]
        found = least_squares.on_units(gram, right, torch.tensor(order), width)
        gain = float(found.solved.square().sum())
        if best is None or gain > best[0] + LEAST * target_norm:
            best = gain, found
    assert best is not None
    return best[1]


def exchanged(
    start: Fit, norms: Tensor, target_norm: float, width: int, limit: int, backend: str
) -> Tensor:
    """Kept units (K,) after at most `limit` exchanges: those that stay in their order, then others.

    norms: (N w,) float64, the diagonal of K; start: changed in place
    """
    units, swept, left = start.units.tolist(), start.swept, start.left
    features = torch.arange(len(swept)).view(-1, width)
    gains_of = reference.swap_gains if backend == "reference" else ops.swap_gains
    for _ in range(limit):
        dropped = torch.tensor([j for j in range(len(features)) if j not in set(units)])
        if not len(dropped):
            break
        here = torch.tensor(units)
        inner, pull, costs = _dropped(swept, left, features[here])
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


def on_units(gram: Tensor, right: Tensor, units: Tensor, width: int) -> Fit:
    features, swept, left = torch.arange(len(gram)).view(-1, width), gram.clone(), right.clone()
    for some in features[units].split(max(1, TOGETHER // width)):
        sweep(swept, left, some.flatten(), 1)
    return Fit(units, swept, left)


def eliminated(gram: Tensor, right: Tensor, count: int, width: int) -> Fit:
    """What is left of the fit on all units when those go one by one that cost least to drop.

    Source: Meng et al. 2024, arXiv:2403.12983 (OSSCAR).
    """
    features = torch.arange(len(gram)).view(-1, width)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))  # a sweep of all, at a sixth
    left, swept, units = inverse @ right, inverse.neg_(), list(range(len(features)))
    while len(units) > count:
        costs = _dropped(swept, left, features[torch.tensor(units)])[-1]
        sweep(swept, left, features[units.pop(int(costs.argmin()))], -1)
    return Fit(torch.tensor(units), swept, left)


def _dropped(swept: Tensor, left: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For units of rows (K, w) in the fit: (-A_kk)^-1, that times the weights, what dropping costs.

    (K, w, w), (K, w, C), (K,)
    """
    inner = torch.linalg.inv(-swept[rows[:, :, None], rows[:, None]])
    pull = inner @ left[rows]
    return inner, pull, (left[rows] * pull).sum((1, 2))


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
