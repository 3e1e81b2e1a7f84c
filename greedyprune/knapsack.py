"""The widths that lose least under a limit: a multiple-choice knapsack whose costs may couple.

    minimise  sum_i values_i(w_i)   subject to   sum_i costs_i(w_i) + sum_ij b_ij w_i w_j <= limit

Its Lagrangian bounds the minimum from below for every multiplier, and is minimised exactly:
couplings form trees (chains of convolutions, say), so that a width's best continuation is a
function of its parent's width alone, and as  min_k H(k) + mu w_k  for all mu that is the lower
convex hull of H. What then lies between the bound and the best widths found is searched, item by
item in the order of the trees: exactly, or the most promising part of it, and the gap is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]

BEAMS = (64, 2048)  # partial choices kept at a time, in a first and a second search
TRIED = 2**18, 2**15  # continuations of them that are looked at, and compared with one another
ROUNDING = 1e-12  # of the objective: differences that mean nothing


@dataclass(frozen=True)
class Knapsack:
    """One width is chosen for each item.

    values:    for each item (n,): what it loses at each of its widths
    costs:     for each item (n,): what it costs by itself
    widths:    for each item (n,), ascending
    couplings: and what two items i < j cost, times the product of their widths
    """

    values: Sequence[Numbers]
    costs: Sequence[Numbers]
    widths: Sequence[Numbers]
    couplings: Mapping[tuple[int, int], float]
    limit: float

    @cached_property
    def beside(self) -> list[dict[int, float]]:
        """What each item is coupled with."""
        found: list[dict[int, float]] = [{} for _ in self.values]
        for (i, j), amount in self.couplings.items():
            found[i][j] = found[j][i] = amount
        return found

    def value(self, choice: Indices) -> float:
        return float(sum(each[k] for each, k in zip(self.values, choice, strict=True)))

    def cost(self, choice: Indices) -> float:
        alone = sum(each[k] for each, k in zip(self.costs, choice, strict=True))
        w = [each[k] for each, k in zip(self.widths, choice, strict=True)]
        return float(alone + sum(b * w[i] * w[j] for (i, j), b in self.couplings.items()))


@dataclass(frozen=True)
class Best:
    """choice: (items,) index of each item's width; gap: how far above the minimum value may be."""

    choice: Indices
    value: float
    gap: float


@dataclass(frozen=True)
class _Tree:
    """The items in an order in which each follows its parent; couplings may close circles."""

    order: list[int]
    parent: list[int]  # -1: none

    @classmethod
    def of(cls, knapsack: Knapsack) -> _Tree:
        order: list[int] = []
        parent = [-1] * len(knapsack.values)
        seen = [False] * len(parent)
        for root in range(len(parent)):
            todo = [(root, -1)]
            while todo:
                i, before = todo.pop()
                if not seen[i]:
                    seen[i], parent[i] = True, before
                    order.append(i)
                    todo += [(j, i) for j in reversed(knapsack.beside[i])]
        return cls(order, parent)


class _Relaxed:
    """min over all choices of  value + multiplier * cost, the couplings outside of the trees free.

    own:     for each item (n,): the minimum over the items below it in its tree, given its width
    message: for each item with a parent, (n of the parent,): the minimum of its branch
    """

    def __init__(self, knapsack: Knapsack, tree: _Tree, multiplier: float) -> None:
        self.multiplier = multiplier
        self.own = [
            v + multiplier * c for v, c in zip(knapsack.values, knapsack.costs, strict=True)
        ]
        self.message: list[Numbers] = [np.zeros(0)] * len(self.own)
        best: list[Indices] = [np.zeros(0, np.int64)] * len(self.own)
        for i in reversed(tree.order):
            if (p := tree.parent[i]) >= 0:
                slopes = multiplier * knapsack.beside[i][p] * knapsack.widths[p]
                self.message[i], best[i] = _lowest(knapsack.widths[i], self.own[i], slopes)
                self.own[p] = self.own[p] + self.message[i]
        self.choice = np.zeros(len(self.own), np.int64)
        self.minimum = 0.0
        for i in tree.order:
            if (p := tree.parent[i]) >= 0:
                self.choice[i] = best[i][self.choice[p]]
            else:
                self.choice[i] = self.own[i].argmin()
                self.minimum += float(self.own[i].min())

    def bound(self, limit: float) -> float:
        return self.minimum - self.multiplier * limit


def _lowest(x: Numbers, y: Numbers, slopes: Numbers) -> tuple[Numbers, Indices]:
    """min over k of y_k + slope x_k, and where, for each slope; x ascending."""
    hull: list[int] = []
    xs, ys = x.tolist(), y.tolist()  # numbers of their own are faster one by one
    for k in range(len(xs)):
        while len(hull) > 1:  # what lies above the line between its neighbours is not on the hull
            a, b = hull[-2], hull[-1]
            if (ys[b] - ys[a]) * (xs[k] - xs[a]) < (ys[k] - ys[a]) * (xs[b] - xs[a]):
                break
            hull.pop()
        hull.append(k)
    rises = np.diff(y[hull]) / np.diff(x[hull])
    at = np.array(hull)[np.searchsorted(rises, -slopes)]
    return y[at] + slopes * x[at], at


def solve(knapsack: Knapsack) -> Best:
    """The choice of the lowest value within the limit; ValueError where there is none."""
    tree = _Tree.of(knapsack)
    smallest = np.zeros(len(tree.order), np.int64)
    if knapsack.cost(smallest) > knapsack.limit:
        raise ValueError(f"even the smallest widths cost {knapsack.cost(smallest):g}")
    free = np.array([each.argmin() for each in knapsack.values])
    if knapsack.cost(free) <= knapsack.limit:
        return Best(free, knapsack.value(free), 0.0)
    found, relaxed = _multiplier(knapsack, tree, free, smallest)
    found = _filled(knapsack, found)
    value, bound = knapsack.value(found), relaxed.bound(knapsack.limit)
    for beam in BEAMS:
        if value - bound <= ROUNDING * abs(value):
            break
        better, exact = _search(knapsack, tree, relaxed, value - bound, beam)
        if better is not None:
            found = _filled(knapsack, better)
            value = knapsack.value(found)
        if exact:
            return Best(found, value, 0.0)
    gap = value - bound
    return Best(found, value, gap if gap > ROUNDING * abs(value) else 0.0)


def _multiplier(
    knapsack: Knapsack, tree: _Tree, dear: Indices, cheap: Indices
) -> tuple[Indices, _Relaxed]:
    """The best choice met on the way to the highest bound, and what gives that.

    Where the line between the cheapest choice that is too dear and the dearest that is not has no
    choice below it, its slope is the multiplier.
    """
    found, best = cheap, None
    while True:
        saved = knapsack.cost(dear) - knapsack.cost(cheap)
        lost = knapsack.value(cheap) - knapsack.value(dear)
        relaxed = _Relaxed(knapsack, tree, max(0.0, lost) / saved)
        if best is None or relaxed.bound(knapsack.limit) > best.bound(knapsack.limit):
            best = relaxed
        choice = relaxed.choice
        line = knapsack.value(cheap) + relaxed.multiplier * knapsack.cost(cheap)
        here = knapsack.value(choice) + relaxed.multiplier * knapsack.cost(choice)
        if here >= line - ROUNDING * abs(line):
            return found, best
        if knapsack.cost(choice) > knapsack.limit:
            dear = choice
        else:
            cheap = choice
            found = min(found, choice, key=knapsack.value)


def _filled(knapsack: Knapsack, choice: Indices) -> Indices:
    """With what is left of the limit used: one item at a time, the one that gains most."""
    choice = choice.copy()
    while True:
        left = knapsack.limit - knapsack.cost(choice)
        gains, to = np.zeros(len(choice)), choice.copy()
        for i, (values, widths) in enumerate(zip(knapsack.values, knapsack.widths, strict=True)):
            beside = sum(b * knapsack.widths[j][choice[j]] for j, b in knapsack.beside[i].items())
            price = knapsack.costs[i] + beside * widths
            fitting = np.where(price <= price[choice[i]] + left, values, np.inf)
            to[i] = fitting.argmin()
            gains[i] = values[choice[i]] - values[to[i]]
        i = int(gains.argmax())
        if gains[i] <= 0:
            return choice
        choice[i] = to[i]


def _search(
    knapsack: Knapsack, tree: _Tree, relaxed: _Relaxed, room: float, beam: int
) -> tuple[Indices | None, bool]:
    """A choice with a value less than `room` above the bound, if there is one; is that certain?

    A partial choice's excess is how far the bound given that choice is above the bound.
    """
    items = len(tree.order)
    place = {i: t for t, i in enumerate(tree.order)}
    last = [max([place[j] for j in beside], default=-1) for beside in knapsack.beside]
    least = np.cumsum([0.0] + [float(knapsack.costs[i][0]) for i in reversed(tree.order)])[::-1]
    chosen = np.zeros((1, items), np.int64)
    excess, cost, value = np.zeros(1), np.zeros(1), np.zeros(1)
    exact = True
    for t, i in enumerate(tree.order):
        more, table = _excess_of(knapsack, tree, relaxed, chosen, i)
        columns = np.flatnonzero(more.min(0) < room - excess.min())
        most = max(1, TRIED[0] // len(chosen))
        if len(columns) > most:
            exact = False
            columns = columns[np.argsort(more.min(0)[columns], kind="stable")[:most]]
        new_excess = excess[:, None] + more[table][:, columns]
        new_cost = cost[:, None] + knapsack.costs[i][columns]
        for j, b in knapsack.beside[i].items():
            if place[j] < t:
                w = knapsack.widths[j][chosen[:, j]]
                new_cost += b * w[:, None] * knapsack.widths[i][columns]
        rows, at = np.nonzero((new_excess < room) & (new_cost + least[t + 1] <= knapsack.limit))
        if not len(rows):
            return None, exact
        if len(rows) > TRIED[1]:
            exact = False
            best = np.argpartition(new_excess[rows, at], TRIED[1])[: TRIED[1]]
            rows, at = rows[best], at[best]
        excess, cost = new_excess[rows, at], new_cost[rows, at]
        value = value[rows] + knapsack.values[i][columns[at]]
        open_items = [j for j in tree.order[:t] if last[j] > t]
        keys = [chosen[rows, j] for j in open_items]
        if last[i] > t:
            keys.append(columns[at])
        keep = _undominated(keys, cost, value)
        if len(keep) > beam:
            exact = False
            keep = keep[np.argsort(excess[keep], kind="stable")[:beam]]
        chosen = chosen[rows[keep]]
        chosen[:, i] = columns[at[keep]]
        excess, cost, value = excess[keep], cost[keep], value[keep]
    return chosen[value.argmin()], exact


def _excess_of(
    knapsack: Knapsack, tree: _Tree, relaxed: _Relaxed, chosen: Indices, i: int
) -> tuple[Numbers, Indices]:
    """What each width of item i adds to the excess, a row a width of its parent; their rows."""
    p = tree.parent[i]
    if p < 0:
        return (relaxed.own[i] - relaxed.own[i].min())[None], np.zeros(len(chosen), np.int64)
    parents, table = np.unique(chosen[:, p], return_inverse=True)
    slopes = relaxed.multiplier * knapsack.beside[i][p] * knapsack.widths[p][parents]
    along = relaxed.own[i] + slopes[:, None] * knapsack.widths[i]
    return along - relaxed.message[i][parents, None], table


def _undominated(keys: Sequence[Indices], cost: Numbers, value: Numbers) -> Indices:
    """Without those for which another of the same keys costs and loses no more."""
    order = np.lexsort([value, cost, *keys])
    same = np.ones(len(order), bool)
    same[0] = False
    for key in keys:
        same[1:] &= key[order][1:] == key[order][:-1]
    segment = np.cumsum(~same)
    rank = np.empty(len(order), np.int64)
    rank[np.argsort(value, kind="stable")] = np.arange(len(order))
    depth = rank[order] - segment * len(order)  # a new segment starts below all before it
    lowest = np.minimum.accumulate(depth)
    return order[np.concatenate([[True], lowest[1:] < lowest[:-1]])]
