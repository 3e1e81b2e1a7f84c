"""Exchanges of kept units for dropped ones, as long as they lower the least squares error.

A greedy path never takes a pick back. After it, one kept unit at a time is exchanged for a dropped
one. K is the Gram matrix of the features (with its ridge) and R the right side. Both are swept on
the features of the kept units S (the sweep operator, Beaton 1964), which gives

    A_SS = -K_SS^-1    A_SD = K_SS^-1 K_SD    A_DD = K_DD - K_DS K_SS^-1 K_SD
    B_S = K_SS^-1 R_S (the weights)           B_D = R_D - K_DS K_SS^-1 R_S

where D are the other features. From these the cost of dropping a unit and the gain of every unit
in its place are small products, and an exchange is two updates of the rank of a unit.

A problem may have several parts, one for each consumer of the units. Each part has a K and an R of
its own, and the error is the sum of the parts' errors. So each part is swept by itself, and costs
and gains are added up over the parts. Parts of equal shapes are stacked, so that one call of torch
does the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .least_squares import feature_rows, on_units

TRIED_UNITS = 8  # kept units that an exchange is tried for in a round: the cheapest to drop
LEAST_GAIN = 1e-9  # share of |t|^2 that an exchange has to gain, well above the gains' rounding
SWEPT_FEATURES = 256  # the most features that are swept together
LATE_FEATURES = 64  # elimination changes its whole matrix after so many
ELIMINATION_FEATURES = 2304  # the most features of a single part for which elimination is tried


class Part(NamedTuple):
    """One consumer's least squares in the features of N units.

    gram: (N w, N w) float64, with its ridge; right: (N w, C) float64
    width: w, the features of a unit; parts may have different w and C
    """

    gram: Tensor
    right: Tensor
    width: int


class Stack(NamedTuple):
    """P parts of equal shapes.

    matrix: (P, N w, N w) float64; right: (P, N w, C) float64
    norms: (P, N w) float64, the diagonals of the parts' Gram matrices
    """

    matrix: Tensor
    right: Tensor
    norms: Tensor
    width: int

    def weights(self) -> Tensor:
        """The right sides by unit (P, N, w, C); once swept, those of kept units are weights."""
        parts, features, outputs = self.right.shape
        return self.right.view(parts, features // self.width, self.width, outputs)


class Swept(NamedTuple):
    """A least squares problem swept on the features of some units.

    units: (K,) int64; stacks: its parts, with A as the matrix and B as the right side
    """

    units: Tensor
    stacks: list[Stack]


def best_exchanged(
    parts: Sequence[Part], target_norm: float, kept: Tensor, limit: int, backend: str
) -> Tensor:
    """The units (K,) that are kept after exchanges from two starts, the better ones.

    One start is `kept`. The other is what elimination leaves, where `eliminates` is true. Units
    that are in `kept` come first, in their order there.

    Args:
        target_norm: |t|^2, of all parts together
        kept: (K,) int64
        limit: the most exchanges from a start
        backend: as for `ops.swap_gains`
    """
    starts = [lambda: swept_on(parts, kept)]
    if eliminates(len(part.gram) for part in parts):
        starts.append(lambda: swept_on(parts, eliminated(parts, len(kept))))
    best, most = kept, -torch.inf
    for start in starts:
        units = exchanged(start(), target_norm, limit, backend).tolist()
        order = [unit for unit in kept.tolist() if unit in units]
        order += [unit for unit in units if unit not in order]
        explained = sum(_explained(part, torch.tensor(order)) for part in parts)
        if explained > most + LEAST_GAIN * target_norm:
            best, most = torch.tensor(order), explained
    return best


def eliminates(features: Iterable[int]) -> bool:
    """Is elimination tried for parts of this many features?

    The limit is on time. Elimination takes about F^3 operations for a part of F features, and
    together they may be those of a single part of ELIMINATION_FEATURES.
    """
    return sum(each**3 for each in features) <= ELIMINATION_FEATURES**3


def _explained(part: Part, units: Tensor) -> float:
    """By how much least squares on some units (K,) lowers the squared error of a part."""
    return float(on_units(part.gram, part.right, units, part.width).solved.square().sum())


def narrowed(right: Tensor) -> Tensor:
    """A right side with the same products of rows, and no more columns than rows.

    Errors and gains depend on the products of rows alone: with right^T = Q T, Q orthogonal, T^T
    gives the same. A layer that widens a stream has more outputs than the stream has features.

    right: (F, C) float64; returns (F, min(F, C))
    """
    if right.shape[1] <= right.shape[0]:
        return right
    return torch.linalg.qr(right.T, mode="r").R.T.contiguous()


def exchanged(start: Swept, target_norm: float, limit: int, backend: str) -> Tensor:
    """The kept units (K,) after at most `limit` exchanges, each the best of its round.

    The units that stay come first and keep their order. `start` is changed in place.
    """
    units, stacks = start.units.tolist(), start.stacks
    is_dropped = torch.ones(stacks[0].matrix.shape[1] // stacks[0].width, dtype=torch.bool)
    is_dropped[start.units] = False
    for _ in range(limit if is_dropped.any() else 0):
        dropped, kept = is_dropped.nonzero().flatten(), torch.tensor(units)
        dropping = [_dropping(stack, kept) for stack in stacks]
        together = torch.cat([costs for _, costs in dropping]).sum(0)
        tried = together.argsort(stable=True)[:TRIED_UNITS]
        by_part: list[Tensor] = []
        for stack, (inner, costs) in zip(stacks, dropping, strict=True):
            by_part += _gains(
                stack, kept[tried], dropped, inner[:, tried], costs[:, tried], backend
            )
        gains = torch.stack(by_part).sum(0)
        best = int(gains.argmax())
        if float(gains.flatten()[best]) <= LEAST_GAIN * target_norm:
            break
        out = units.pop(int(tried[best // len(dropped)]))
        into = int(dropped[best % len(dropped)])
        for matrix, right, _, width in stacks:
            sweep(matrix, right, _rows_of(out, width), -1)
            sweep(matrix, right, _rows_of(into, width), 1)
        units.append(into)
        is_dropped[out], is_dropped[into] = True, False
    return torch.tensor(units)


def _gains(
    stack: Stack, tried: Tensor, dropped: Tensor, inner: Tensor, costs: Tensor, backend: str
) -> list[Tensor]:
    """The drop of each part's error by each exchange, (p, d).

    inner: (P, p, w, w); costs: (P, p); both as of `_dropping`
    """
    pull = _times(inner, stack.weights()[:, tried])
    return [
        ops.swap_gains(matrix, right, norms, tried, dropped, *dropping, backend=backend)
        for matrix, right, norms, *dropping in zip(*stack[:3], inner, pull, costs, strict=True)
    ]


def swept_on(parts: Sequence[Part], units: Tensor) -> Swept:
    """The problem swept on the features of `units` (K,), in copies."""
    stacks = []
    for equal in _of_equal_shapes(parts):
        stack = Stack(
            torch.stack([part.gram for part in equal]),
            torch.stack([part.right for part in equal]),
            torch.stack([part.gram.diagonal() for part in equal]),
            equal[0].width,
        )
        for i in range(len(equal)):  # one at a time, as copies of many rows are made
            matrix, right = stack.matrix[i : i + 1], stack.right[i : i + 1]
            for some in units.split(max(1, SWEPT_FEATURES // stack.width)):
                sweep(matrix, right, feature_rows(some, stack.width), 1)
        stacks.append(stack)
    return Swept(units, stacks)


def _of_equal_shapes(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts, those with the same features and outputs together."""
    by_shape: dict[torch.Size, list[Part]] = {}
    for part in parts:
        by_shape.setdefault(part.right.shape, []).append(part)
    return list(by_shape.values())


def eliminated(parts: Sequence[Part], count: int) -> Tensor:
    """The `count` units that backward elimination leaves, in the order of their numbers.

    Elimination starts from all units and drops the one that is cheapest to drop, again and again.

    Source: Meng et al. 2024, arXiv:2403.12983 (OSSCAR).
    """
    stacks = [_Inverses(equal) for equal in _of_equal_shapes(parts)]
    left = torch.ones(stacks[0].units, dtype=torch.bool)
    for _ in range(len(left) - count):
        costs = torch.cat([stack.costs() for stack in stacks]).sum(0)
        out = int(costs.masked_fill_(~left, torch.inf).argmin())
        left[out] = False
        for stack in stacks:
            stack.drop(out)
    return left.nonzero().flatten()


class _Inverses:
    """H = K^-1 on the units that are left and their weights B, in parts of equal shapes.

    Dropping unit p gives

        H - H_p P H_p^T    B - H_p P B_p    where P = H_pp^-1.

    H changes only where it is read: its blocks on the diagonal, and the columns of the unit that
    goes. All of it changes once for every LATE_FEATURES features.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        count, features, width = len(parts), len(parts[0].gram), parts[0].width
        self.width, self.units = width, features // width
        self.inverse = torch.stack(
            [torch.cholesky_inverse(torch.linalg.cholesky(part.gram)) for part in parts]
        )
        self.weights = self.inverse @ torch.stack([part.right for part in parts])  # (P, N w, C)
        rows = torch.arange(features).view(-1, width)
        self.blocks = self.inverse[:, rows[:, :, None], rows[:, None]]  # (P, N, w, w)
        late = max(1, LATE_FEATURES // width) * width
        # H is inverse - gone @ across, of which the first `used` columns and rows are in use.
        self.gone = self.inverse.new_empty(count, features, late)
        self.across, self.used = self.inverse.new_empty(count, late, features), 0

    def costs(self) -> Tensor:
        """The growth of each part's error when each unit is dropped: (P, N)."""
        weights = self.weights.view(len(self.weights), self.units, self.width, -1)
        return _traces(_inverse(self.blocks), weights)

    def drop(self, unit: int) -> None:
        """Drops a unit in all parts."""
        width, rows = self.width, _rows_of(unit, self.width)
        gone, across = self.gone[:, :, : self.used], self.across[:, : self.used]
        columns = torch.baddbmm(self.inverse[:, :, rows], gone, across[:, :, rows], alpha=-1)
        pulled = _inverse(self.blocks[:, unit]) @ columns.mT  # (P, w, N w)
        _subtract(self.weights, pulled.mT, self.weights[:, rows].clone())
        by_unit = (len(columns) * self.units, width, width)
        left, right = columns.reshape(by_unit), pulled.mT.reshape(by_unit).mT
        _subtract(self.blocks.view(by_unit), left, right)
        self.blocks[:, unit] = torch.eye(width, dtype=columns.dtype)  # it takes no part any more
        new = slice(self.used, self.used + width)
        self.gone[:, :, new], self.across[:, new] = columns, pulled
        self.used += width
        if self.used == self.across.shape[1]:
            self.inverse.baddbmm_(self.gone, self.across, alpha=-1)
            self.used = 0


def _dropping(stack: Stack, kept: Tensor) -> tuple[Tensor, Tensor]:
    """For dropping each of the kept units (K,): P = (-A_pp)^-1, and the growth of a part's error.

    Returns:
        (P, K, w, w), (P, K)
    """
    rows = feature_rows(kept, stack.width).view(-1, stack.width)
    inner = _inverse(-stack.matrix[:, rows[:, :, None], rows[:, None]])
    return inner, _traces(inner, stack.weights()[:, kept])


def _traces(blocks: Tensor, rows: Tensor) -> Tensor:
    """tr(R^T S R) for matrices S (P, n, w, w) and R (P, n, w, C): (P, n), in little memory."""
    if blocks.shape[-1] == 1:
        return torch.linalg.vector_norm(rows, dim=(2, 3)).square_().mul_(blocks[:, :, 0, 0])
    return (blocks * (rows @ rows.mT)).sum((2, 3))


def _inverse(blocks: Tensor) -> Tensor:
    """The inverses of matrices (..., w, w); those of numbers take a hundredth of the time."""
    return blocks.reciprocal() if blocks.shape[-1] == 1 else torch.linalg.inv(blocks)


def _times(blocks: Tensor, rows: Tensor) -> Tensor:
    """The products of matrices (..., w, w) and (..., w, C); numbers are faster by themselves."""
    return blocks * rows if blocks.shape[-1] == 1 else blocks @ rows


def _subtract(matrix: Tensor, left: Tensor, right: Tensor) -> None:
    """Takes (P, m, w) times (P, w, n) from matrices (P, m, n); columns have a faster way."""
    if left.shape[-1] == 1:
        matrix.addcmul_(left, right, value=-1)
    else:
        matrix.baddbmm_(left, right, alpha=-1)


def _rows_of(unit: int, width: int) -> slice:
    return slice(unit * width, (unit + 1) * width)


def sweep(matrix: Tensor, right: Tensor, rows: Tensor | slice, sign: int) -> None:
    """Sweeps features into least squares problems (sign 1) or out of them (-1), in place.

    Args:
        matrix: (P, F, F) float64; right: (P, F, C) float64
        rows: the features, (n,) int64 or a slice
    """
    columns, swept_right = matrix[:, rows].clone(), right[:, rows].clone()
    inverse = _inverse(columns[:, :, rows])
    across = _times(inverse, columns)
    _subtract(matrix, columns.mT, across)  # the matrices are symmetric
    _subtract(right, across.mT, swept_right)
    across *= sign
    across[:, :, rows] = -inverse
    matrix[:, rows] = across
    matrix[:, :, rows] = across.mT
    right[:, rows] = sign * _times(inverse, swept_right)
