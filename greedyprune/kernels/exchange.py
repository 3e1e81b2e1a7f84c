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
LATE_FEATURES = 64  # elimination changes its whole matrix after so many
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


def narrowed(right: Tensor) -> Tensor:
    """A right side with the same products of rows, and no more columns than rows.

    Errors and gains depend on the products of rows alone: with right^T = Q T, Q orthogonal, T^T
    gives the same. A layer that widens a stream has more outputs than the stream has features.

    right: (F, C) float64; returns (F, min(F, C))
    """
    if right.shape[1] <= right.shape[0]:
        return right
    return torch.linalg.qr(right.T, mode="r").R.T.contiguous()


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
    is_dropped = torch.ones(len(features), dtype=torch.bool)
    is_dropped[start.units] = False
    for _ in range(limit if is_dropped.any() else 0):
        dropped, kept = is_dropped.nonzero().flatten(), torch.tensor(units)
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
        is_dropped[out], is_dropped[into] = True, False
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
    With H = K^-1 on the units that are left and B their weights, dropping p gives

        H - H_p P H_p^T    B - H_p P B_p    where P = H_pp^-1.

    H changes only where it is read: its blocks on the diagonal, and the columns of the unit that
    goes. All of it changes once for every LATE_FEATURES features.

    Source: Meng et al. 2024, arXiv:2403.12983 (OSSCAR).
    """
    features = torch.arange(len(gram)).view(-1, width)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    weights = (inverse @ right).view(len(features), width, -1)
    blocks = inverse[features[:, :, None], features[:, None]].contiguous()  # (N, w, w)
    left = torch.ones(len(features), dtype=torch.bool)
    late = max(1, LATE_FEATURES // width) * width
    gone, across, used = gram.new_empty(len(gram), late), gram.new_empty(late, len(gram)), 0
    for _ in range(len(features) - count):
        costs = (weights * _times(_inverse(blocks), weights)).sum((1, 2))
        out = int(costs.masked_fill_(~left, torch.inf).argmin())
        left[out] = False
        rows = features[out]
        columns = inverse[:, rows].addmm_(gone[:, :used], across[:used, rows], alpha=-1)
        pulled = _inverse(blocks[out]) @ columns.T
        weights.view(len(gram), -1).addmm_(pulled.T, weights[out].clone(), alpha=-1)
        each = (
            columns.view(len(features), width, width),
            pulled.T.reshape(len(features), width, width),
        )
        blocks.baddbmm_(each[0], each[1].mT, alpha=-1)
        blocks[out] = torch.eye(width, dtype=blocks.dtype)  # it takes no part any more
        gone[:, used : used + width], across[used : used + width] = columns, pulled
        used += width
        if used == late:
            inverse.addmm_(gone, across, alpha=-1)
            used = 0
    return swept_on(gram, right, left.nonzero().flatten(), width)


def _dropping(matrix: Tensor, right: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For dropping each of some kept units: P = (-A_pp)^-1, P B_p, and tr(B_p^T P B_p).

    The trace is the growth of the error. rows: (K, w), the units' features

    Returns:
        (K, w, w), (K, w, C), (K,)
    """
    inner = _inverse(-matrix[rows[:, :, None], rows[:, None]])
    pull = _times(inner, right[rows])
    return inner, pull, (right[rows] * pull).sum((1, 2))


def _inverse(blocks: Tensor) -> Tensor:
    """The inverses of matrices (..., w, w); those of numbers take a hundredth of the time."""
    return blocks.reciprocal() if blocks.shape[-1] == 1 else torch.linalg.inv(blocks)


def _times(blocks: Tensor, rows: Tensor) -> Tensor:
    """The products of matrices (..., w, w) and (..., w, C); numbers are faster by themselves."""
    return blocks * rows if blocks.shape[-1] == 1 else blocks @ rows


def sweep(matrix: Tensor, right: Tensor, rows: Tensor, sign: int) -> None:
    """Sweeps features into the least squares problem (sign 1) or out of it (-1), in place."""
    columns, swept_right = matrix[rows], right[rows]  # copies; the matrix is symmetric
    inverse = _inverse(columns[:, rows])
    across = inverse @ columns
    matrix.addmm_(columns.T, across, alpha=-1)
    right.addmm_(across.T, swept_right, alpha=-1)
    across *= sign
    across[:, rows] = -inverse
    matrix[rows] = across
    matrix[:, rows] = across.T
    right[rows] = sign * (inverse @ swept_right)
