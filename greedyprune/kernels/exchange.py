"""Exchanges of kept units for dropped ones, as long as they lower the least squares error.

A greedy path never takes a pick back. After it, one kept unit at a time is exchanged for a dropped
one. K is the Gram matrix of the features (with its ridge) and R the right side. Both are swept on
the features of the kept units S (the sweep operator, Beaton 1964), which gives

    A_SS = -K_SS^-1    A_SD = K_SS^-1 K_SD    A_DD = K_DD - K_DS K_SS^-1 K_SD
    B_S = K_SS^-1 R_S (the weights)           B_D = R_D - K_DS K_SS^-1 R_S

where D are the other features. From these the cost of dropping a unit and the gain of every unit
in its place are small products, and an exchange is two updates of the rank of a unit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .least_squares import on_units
from .path import NestedFit

TRIED_UNITS = 8  # kept units that an exchange is tried for in a round: the cheapest to drop
LEAST_GAIN = 1e-9  # share of |t|^2 that an exchange has to gain, well above the gains' rounding
SWEPT_FEATURES = 256  # the most features that are swept together
ELIMINATION_FEATURES = 2304  # the most features for which elimination is tried, too


class Swept(NamedTuple):
    """A least squares problem swept on the features of some units.

    units: (K,) int64; matrix: (N w, N w) float64, A; right: (N w, C) float64, B
    """

    units: Tensor
    matrix: Tensor
    right: Tensor


def best_exchanged(
    gram: Tensor, right: Tensor, target_norm: float, kept: Tensor, width: int, limit: int,
    backend: str,
) -> NestedFit:  # fmt: skip
    """Least squares on the units that are kept after exchanges from two starts, the better one.

    One start is `kept`. The other is what elimination leaves, if there are at most
    ELIMINATION_FEATURES features. Units that are in `kept` come first, in their order there.

    Args:
        gram: (N w, N w) float64, with its ridge; right: (N w, C) float64; target_norm: |t|^2
        kept: (K,) int64; width: w, the features of a unit
        limit: the most exchanges from a start
        backend: as for `ops.swap_gains`
    """
    starts = [lambda: swept_on(gram, right, kept, width)]
    if len(gram) <= ELIMINATION_FEATURES:
        starts.append(lambda: eliminated(gram, right, len(kept), width))
    norms, best = gram.diagonal().contiguous(), None
    for start in starts:
        units = exchanged(start(), norms, target_norm, width, limit, backend).tolist()
        order = [unit for unit in kept.tolist() if unit in units]
        order += [unit for unit in units if unit not in order]
        refit = on_units(gram, right, torch.tensor(order), width)
        explained = float(refit.solved.square().sum())
        if best is None or explained > best[0] + LEAST_GAIN * target_norm:
            best = explained, refit
    assert best is not None
    return best[1]


def exchanged(
    start: Swept, norms: Tensor, target_norm: float, width: int, limit: int, backend: str
) -> Tensor:
    """The kept units (K,) after at most `limit` exchanges, each the best of its round.

    The units that stay come first and keep their order.

    Args:
        start: changed in place
        norms: (N w,) float64, the diagonal of the Gram matrix
    """
    units, matrix, right = start.units.tolist(), start.matrix, start.right
    features = torch.arange(len(matrix)).view(-1, width)
    for _ in range(limit):
        dropped = torch.tensor([j for j in range(len(features)) if j not in set(units)])
        if not len(dropped):
            break
        kept = torch.tensor(units)
        inner, pull, costs = _dropping(matrix, right, features[kept])
        tried = costs.argsort(stable=True)[:TRIED_UNITS]
        gains = ops.swap_gains(
            matrix, right, norms, kept[tried], dropped, inner[tried], pull[tried], costs[tried],
            backend=backend,
        )  # fmt: skip
        best = int(gains.argmax())
        if float(gains.flatten()[best]) <= LEAST_GAIN * target_norm:
            break
        out = units.pop(int(tried[best // len(dropped)]))
        into = int(dropped[best % len(dropped)])
        sweep(matrix, right, features[out], -1)
        sweep(matrix, right, features[into], 1)
        units.append(into)
    return torch.tensor(units)


def swept_on(gram: Tensor, right: Tensor, units: Tensor, width: int) -> Swept:
    """The problem swept on the features of `units` (K,), in copies."""
    features = torch.arange(len(gram)).view(-1, width)
    matrix, swept_right = gram.clone(), right.clone()
    for rows in features[units].split(max(1, SWEPT_FEATURES // width)):
        sweep(matrix, swept_right, rows.flatten(), 1)
    return Swept(units, matrix, swept_right)


def eliminated(gram: Tensor, right: Tensor, count: int, width: int) -> Swept:
    """The problem swept on the `count` units that backward elimination leaves.

    Elimination starts from all units and drops the one that is cheapest to drop, again and again.

    Source: Meng et al. 2024, arXiv:2403.12983 (OSSCAR).
    """
    features = torch.arange(len(gram)).view(-1, width)
    # A sweep on all features is the inverse, negated. This way takes a sixth of the time.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    weights, matrix, units = inverse @ right, inverse.neg_(), list(range(len(features)))
    while len(units) > count:
        costs = _dropping(matrix, weights, features[torch.tensor(units)])[-1]
        sweep(matrix, weights, features[units.pop(int(costs.argmin()))], -1)
    return Swept(torch.tensor(units), matrix, weights)


def _dropping(matrix: Tensor, right: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For dropping each of some kept units: P = (-A_pp)^-1, P B_p, and tr(B_p^T P B_p).

    The trace is the growth of the error. rows: (K, w), the units' features

    Returns:
        (K, w, w), (K, w, C), (K,)
    """
    inner = torch.linalg.inv(-matrix[rows[:, :, None], rows[:, None]])
    pull = inner @ right[rows]
    return inner, pull, (right[rows] * pull).sum((1, 2))


def sweep(matrix: Tensor, right: Tensor, rows: Tensor, sign: int) -> None:
    """Sweeps features into the least squares problem (sign 1) or out of it (-1), in place."""
    columns, swept_right = matrix[rows], right[rows]  # copies; the matrix is symmetric
    inverse = torch.linalg.inv(columns[:, rows])
    across = inverse @ columns
    matrix.addmm_(columns.T, across, alpha=-1)
    right.addmm_(across.T, swept_right, alpha=-1)
    across *= sign
    across[:, rows] = -inverse
    matrix[rows] = across
    matrix[:, rows] = across.T
    right[rows] = sign * (inverse @ swept_right)
