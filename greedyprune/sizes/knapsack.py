"""The widths with the lowest total loss within a cost limit: a multiple-choice knapsack problem.

For each item i, one width w_i is chosen (an item is a layer, or several layers of one width):

    minimise  sum_i values_i(w_i)   subject to   sum_i costs_i(w_i) + sum_ij b_ij w_i w_j <= limit

The coupling b_ij is there because the cost of a layer between two items depends on both widths.

The solver has two parts. The first is the Lagrangian relaxation, which adds multiplier * cost to
the values instead of the limit. For every multiplier, its minimum less multiplier * limit is a
lower bound on the minimum. The couplings of an architecture form trees (chains of convolutions, for
example), so that the minimum is computed exactly from the leaves to the roots: the best choice
below an item depends on the width of its parent alone. As a function of the parent's width w, it is
min_k H(k) + slope(w) w_k for the widths w_k of the item, and all these minima lie on the lower
convex hull of H. Couplings that close a cycle are left out of the relaxation, so it stays a bound.

The second part is a search of the choices between the lower bound and the best known choice, item
by item in the order of the trees. It is complete, or limited to the most promising part of the
choices. Then `Best.gap` says how far from the minimum the result can be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]

BEAMS = (64, 2048)  # partial choices kept after each item, in a first and in a second search
# Of the continuations of these choices: how many are computed for an item, and how many of these
# are compared with one another.
TRIED = 2**18, 2**15
ROUNDING = 1e-12  # relative: smaller differences between objectives count as rounding


@dataclass(frozen=True)
class Knapsack:
    """One width has to be chosen for each item.

    values:    for each item (n,): its loss at each of its widths
    costs:     for each item (n,): its cost at each of its widths, without couplings
    widths:    for each item (n,): the widths, ascending
    couplings: from a pair of items i < j to b_ij, their joint cost per product of the widths
    limit:     the highest cost that is allowed
    """

    values: Sequence[Numbers]
    costs: Sequence[Numbers]
    widths: Sequence[Numbers]
    couplings: Mapping[tuple[int, int], float]
    limit: float

    @cached_property
    def neighbours(self) -> list[dict[int, float]]:
        """For each item, from the items that it is coupled with to the coupling."""
        neighbours: list[dict[int, float]] = [{} for _ in self.values]
        for (i, j), coupling in self.couplings.items():
            neighbours[i][j] = neighbours[j][i] = coupling
        return neighbours

    def value(self, choice: Indices) -> float:
        """The total loss of a choice: (items,), the index of each item's width."""
        return float(sum(values[k] for values, k in zip(self.values, choice, strict=True)))

    def cost(self, choice: Indices) -> float:
        """The total cost of a choice, couplings included."""
        uncoupled = sum(costs[k] for costs, k in zip(self.costs, choice, strict=True))
        w = [widths[k] for widths, k in zip(self.widths, choice, strict=True)]
        return float(uncoupled + sum(b * w[i] * w[j] for (i, j), b in self.couplings.items()))

    def costs_of(self, i: int, choice: Indices) -> Numbers:
        """(n,): the part of the cost that depends on item i, for each of its widths."""
        slope = sum(b * self.widths[j][choice[j]] for j, b in self.neighbours[i].items())
        return self.costs[i] + slope * self.widths[i]


@dataclass(frozen=True)
class Best:
    """The best choice that was found.

    choice: (items,), the index of each item's width
    value:  its total loss
    gap:    an upper bound on how far the value is above the minimum; 0: it is the minimum
    """

    choice: Indices
    value: float
    gap: float


@dataclass(frozen=True)
class _Forest:
    """The items in an order in which each item follows its parent, one tree after another.

    A coupling that closes a cycle is between two items neither of which is the other's parent.
    """

    order: list[int]
    parent: list[int]  # -1: the item is a root

    @classmethod
    def of(cls, knapsack: Knapsack) -> _Forest:
        """Depth first from every item that is not yet in a tree."""
        order: list[int] = []
        parent = [-1] * len(knapsack.values)
        seen = [False] * len(parent)
        for root in range(len(parent)):
            stack = [(root, -1)]
            while stack:
                i, before = stack.pop()
                if not seen[i]:
                    seen[i], parent[i] = True, before
                    order.append(i)
                    stack += [(j, i) for j in reversed(knapsack.neighbours[i])]
        return cls(order, parent)


class _Relaxation:
    """min over all choices of  value + multiplier * cost, without couplings that close a cycle.

    subtree: for each item (n,): the minimum over the items below it in its tree, for each width
    branch:  for each item with a parent (n of the parent,): the minimum over the item, the items
             below it and the coupling to the parent, for each width of the parent
    choice:  the choice that attains the minimum
    """

    def __init__(self, knapsack: Knapsack, forest: _Forest, multiplier: float) -> None:
        self.multiplier = multiplier
        self.subtree = [
            v + multiplier * c for v, c in zip(knapsack.values, knapsack.costs, strict=True)
        ]
        self.branch: list[Numbers] = [np.zeros(0)] * len(self.subtree)
        best: list[Indices] = [np.zeros(0, np.int64)] * len(self.subtree)
        for i in reversed(forest.order):
            if (p := forest.parent[i]) >= 0:
                slopes = multiplier * knapsack.neighbours[i][p] * knapsack.widths[p]
                self.branch[i], best[i] = _minima(knapsack.widths[i], self.subtree[i], slopes)
                self.subtree[p] = self.subtree[p] + self.branch[i]
        self.choice = np.zeros(len(self.subtree), np.int64)
        self.minimum = 0.0
        for i in forest.order:
            if (p := forest.parent[i]) >= 0:
                self.choice[i] = best[i][self.choice[p]]
            else:
                self.choice[i] = self.subtree[i].argmin()
                self.minimum += float(self.subtree[i].min())

    def bound(self, limit: float) -> float:
        """A lower bound on the value of every choice within the limit."""
        return self.minimum - self.multiplier * limit


def _minima(x: Numbers, y: Numbers, slopes: Numbers) -> tuple[Numbers, Indices]:
    """min over k of y_k + slope x_k for each slope, and the k that attain it; x ascends."""
    hull: list[int] = []  # the lower convex hull of the points (x_k, y_k)
    xs, ys = x.tolist(), y.tolist()  # Python's floats: faster than NumPy's one at a time
    for k in range(len(xs)):
        while len(hull) > 1:  # drop the last point while it lies on or above the line past it
            a, b = hull[-2], hull[-1]
            if (ys[b] - ys[a]) * (xs[k] - xs[a]) < (ys[k] - ys[a]) * (xs[b] - xs[a]):
                break
            hull.pop()
        hull.append(k)
    hull_slopes = np.diff(y[hull]) / np.diff(x[hull])
    lowest = np.array(hull)[np.searchsorted(hull_slopes, -slopes)]
    return y[lowest] + slopes * x[lowest], lowest


def solve(knapsack: Knapsack) -> Best:
    """The choice with the lowest value within the limit; ValueError where no choice is within it.

    Example:
        >>> values = [np.array([3.0, 1.0]), np.array([2.0, 0.5])]
        >>> widths = costs = [np.array([1.0, 2.0])] * 2
        >>> best = solve(Knapsack(values, costs, widths, couplings={}, limit=3.0))
        >>> best.choice.tolist(), best.value, best.gap
        ([1, 0], 3.0, 0.0)
    """
    forest = _Forest.of(knapsack)
    smallest = np.zeros(len(forest.order), np.int64)
    if knapsack.cost(smallest) > knapsack.limit:
        raise ValueError(f"even the smallest widths cost {knapsack.cost(smallest):g}")
    unlimited = np.array([values.argmin() for values in knapsack.values])
    if knapsack.cost(unlimited) <= knapsack.limit:
        return Best(unlimited, knapsack.value(unlimited), 0.0)
    choice, relaxation = _best_multiplier(knapsack, forest, unlimited, smallest)
    choice = filled_up([knapsack], choice)
    value, bound = knapsack.value(choice), relaxation.bound(knapsack.limit)
    for beam in BEAMS:
        if value - bound <= ROUNDING * abs(value):
            break
        better, is_complete = _search(knapsack, forest, relaxation, value - bound, beam)
        if better is not None:
            choice = filled_up([knapsack], better)
            value = knapsack.value(choice)
        if is_complete:
            return Best(choice, value, 0.0)
    gap = value - bound
    return Best(choice, value, gap if gap > ROUNDING * abs(value) else 0.0)


def _best_multiplier(
    knapsack: Knapsack, forest: _Forest, dear: Indices, cheap: Indices
) -> tuple[Indices, _Relaxation]:
    """The best choice within the limit on the way, and the relaxation with the highest bound.

    dear, cheap: choices whose costs are above and within the limit

    In the plane of cost and value, each step takes the slope of the line between the cheapest
    choice above the limit and the dearest within it. If no choice lies below this line, then its
    slope is the multiplier with the highest bound.
    """
    best_choice, best = cheap, None
    while True:
        saved = knapsack.cost(dear) - knapsack.cost(cheap)
        lost = knapsack.value(cheap) - knapsack.value(dear)
        relaxation = _Relaxation(knapsack, forest, max(0.0, lost) / saved)
        if best is None or relaxation.bound(knapsack.limit) > best.bound(knapsack.limit):
            best = relaxation
        choice, multiplier = relaxation.choice, relaxation.multiplier
        on_line = knapsack.value(cheap) + multiplier * knapsack.cost(cheap)
        lowest = knapsack.value(choice) + multiplier * knapsack.cost(choice)
        if lowest >= on_line - ROUNDING * abs(on_line):
            return best_choice, best
        if knapsack.cost(choice) > knapsack.limit:
            dear = choice
        else:
            cheap = choice
            best_choice = min(best_choice, choice, key=knapsack.value)


def filled_up(knapsacks: Sequence[Knapsack], choice: Indices) -> Indices:
    """Spends what the choice leaves of the limits: one item at a time, the one that gains most.

    knapsacks: they have the same values and widths, and the choice is within all their limits
    """
    choice, values = choice.copy(), knapsacks[0].values
    while True:
        gains, target = np.zeros(len(choice)), choice.copy()
        unspent = [knapsack.limit - knapsack.cost(choice) for knapsack in knapsacks]
        for i, of_item in enumerate(values):
            affordable = of_item
            for knapsack, rest in zip(knapsacks, unspent, strict=True):
                costs = knapsack.costs_of(i, choice)
                affordable = np.where(costs <= costs[choice[i]] + rest, affordable, np.inf)
            target[i] = affordable.argmin()
            gains[i] = of_item[choice[i]] - of_item[target[i]]
        i = int(gains.argmax())
        if gains[i] <= 0:
            return choice
        choice[i] = target[i]


def _search(
    knapsack: Knapsack, forest: _Forest, relaxation: _Relaxation, margin: float, beam: int
) -> tuple[Indices | None, bool]:
    """A beam search for a choice with a value less than `margin` above the bound.

    Returns the best such choice (None: none was found), and whether the search was complete.

    The search goes through the items in the order of the trees, and keeps at most `beam` partial
    choices. The excess of a partial choice is how much it raises the bound: the bound on all
    choices that continue it, less the bound on all choices.
    """
    items = len(forest.order)
    place = {i: t for t, i in enumerate(forest.order)}
    # After place last[i], the width of item i no longer changes the cost of a continuation.
    last = [max([place[j] for j in around], default=-1) for around in knapsack.neighbours]
    # At place t, the items that are still open cost at least least[t].
    least = np.cumsum([0.0] + [float(knapsack.costs[i][0]) for i in reversed(forest.order)])[::-1]
    chosen = np.zeros((1, items), np.int64)  # a row for each partial choice
    excess, cost, value = np.zeros(1), np.zeros(1), np.zeros(1)
    is_complete = True
    for t, i in enumerate(forest.order):
        added, row_of = _added_excess(knapsack, forest, relaxation, chosen, i)
        columns = np.flatnonzero(added.min(0) < margin - excess.min())  # widths of the item
        most = max(1, TRIED[0] // len(chosen))
        if len(columns) > most:
            is_complete = False
            columns = columns[np.argsort(added.min(0)[columns], kind="stable")[:most]]
        new_excess = excess[:, None] + added[row_of][:, columns]
        new_cost = cost[:, None] + knapsack.costs[i][columns]
        for j, b in knapsack.neighbours[i].items():
            if place[j] < t:
                w = knapsack.widths[j][chosen[:, j]]
                new_cost += b * w[:, None] * knapsack.widths[i][columns]
        rows, at = np.nonzero((new_excess < margin) & (new_cost + least[t + 1] <= knapsack.limit))
        if not len(rows):
            return None, is_complete
        if len(rows) > TRIED[1]:
            is_complete = False
            best = np.argpartition(new_excess[rows, at], TRIED[1])[: TRIED[1]]
            rows, at = rows[best], at[best]
        excess, cost = new_excess[rows, at], new_cost[rows, at]
        value = value[rows] + knapsack.values[i][columns[at]]
        keys = [chosen[rows, j] for j in forest.order[:t] if last[j] > t]
        if last[i] > t:
            keys.append(columns[at])
        survivors = _undominated(keys, cost, value)
        if len(survivors) > beam:
            is_complete = False
            survivors = survivors[np.argsort(excess[survivors], kind="stable")[:beam]]
        chosen = chosen[rows[survivors]]
        chosen[:, i] = columns[at[survivors]]
        excess, cost, value = excess[survivors], cost[survivors], value[survivors]
    return chosen[value.argmin()], is_complete


def _added_excess(
    knapsack: Knapsack, forest: _Forest, relaxation: _Relaxation, chosen: Indices, i: int
) -> tuple[Numbers, Indices]:
    """What each width of item i adds to the excess of a partial choice.

    Returns a table with a row for each width of the item's parent and a column for each width of
    the item; and, for each partial choice in `chosen`, its row.
    """
    subtree, p = relaxation.subtree[i], forest.parent[i]
    if p < 0:
        return (subtree - subtree.min())[None], np.zeros(len(chosen), np.int64)
    parent_widths, row_of = np.unique(chosen[:, p], return_inverse=True)
    slopes = relaxation.multiplier * knapsack.neighbours[i][p] * knapsack.widths[p][parent_widths]
    with_coupling = subtree + slopes[:, None] * knapsack.widths[i]
    return with_coupling - relaxation.branch[i][parent_widths, None], row_of


def _undominated(keys: Sequence[Indices], cost: Numbers, value: Numbers) -> Indices:
    """The partial choices that no other one dominates.

    One dominates another if they agree in all `keys`, and its cost and value are no higher. The
    keys are the widths of the items whose couplings are still open.
    """
    order = np.lexsort([value, cost, *keys])
    same_keys = np.ones(len(order), bool)  # as the choice before it in this order
    same_keys[0] = False
    for key in keys:
        same_keys[1:] &= key[order][1:] == key[order][:-1]
    segment = np.cumsum(~same_keys)
    rank = np.empty(len(order), np.int64)
    rank[np.argsort(value, kind="stable")] = np.arange(len(order))
    # Every segment starts below all segments before it, so that one running minimum serves for all.
    depth = rank[order] - segment * len(order)
    lowest = np.minimum.accumulate(depth)
    return order[np.concatenate([[True], lowest[1:] < lowest[:-1]])]
