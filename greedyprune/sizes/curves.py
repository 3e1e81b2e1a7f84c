"""What is lost at each size of the layers, what it costs, and the best sizes within limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..graph.costs import Cost
from .kinds import ROUNDING, Kinds, KindSizes
from .knapsack import Best, Indices, Knapsack, Numbers
from .limits import solve_within


@dataclass(frozen=True, eq=False)
class Curves:
    """The curve of each kind, which is a list of layers that keep one share of their units.

    kinds:   for each kind, the names of its layers
    sizes:   for each kind (n, layers), the sizes that its layers can have, ascending; the last are
             all their units
    values:  for each kind (n,), what is lost at each of these sizes
    costs:   by the name of a cost, such as "flops": one function of the sizes, or several of which
             the highest value counts, as for the memory at several moments
    uniform: are the kinds those of `Budget(uniform=True)`?
    """

    kinds: Sequence[Sequence[str]]
    sizes: Sequence[Indices]
    values: Sequence[Numbers]
    costs: Mapping[str, Sequence[Cost]]
    uniform: bool

    @classmethod
    def of(
        cls, kinds: Kinds, sizes_of: KindSizes, values: Sequence[Numbers],
        costs: Mapping[str, Sequence[Cost]], *, uniform: bool,
    ) -> Curves:  # fmt: skip
        names = [[group.producer for group in kind] for kind in kinds]
        return cls(names, [np.array(sizes) for sizes in sizes_of], values, costs, uniform)

    def dense(self, what: str) -> int:
        """The dense model's cost."""
        return max(cost.dense for cost in self.costs[what])

    def share(self, what: str, sizes: Mapping[str, int]) -> float:
        """The share of the dense model's cost that is left with these sizes, by layers' names."""
        return max(cost.at(sizes) for cost in self.costs[what]) / self.dense(what)

    def least(self) -> dict[str, int]:
        """The smallest size of each layer."""
        return self._by_layer([0] * len(self.kinds))

    def loss(self, sizes: Mapping[str, int]) -> float:
        """The sum over the layers of what is lost with these sizes; NaN for one without a curve."""
        lost = 0.0
        for names, of_kind, values in zip(self.kinds, self.sizes, self.values, strict=True):
            at = (of_kind == [sizes[name] for name in names]).all(1).nonzero()[0]
            lost += float(values[at[0]]) if len(at) else math.nan
        return lost

    def within(self, limits: Mapping[str, float]) -> tuple[dict[str, int], Best]:
        """The sizes that lose least, by layers' names.

        limits: the highest cost that is allowed, by the name of the cost

        ValueError where no sizes are within the limits.
        """
        best = solve_within([
            self.knapsack(cost, limits[what] + ROUNDING * self.dense(what))
            for what in limits for cost in self.costs[what]
        ])  # fmt: skip
        return self._by_layer(best.choice.tolist()), best

    def restricted(self, most: Mapping[str, int], min_share: float) -> Curves:
        """The curves at those sizes only that are allowed.

        most:      the highest size of each layer
        min_share: the least share of its units that each layer keeps

        ValueError for a layer that has no such size.
        """
        sizes, values = list[Indices](), list[Numbers]()
        for names, of_kind, lost in zip(self.kinds, self.sizes, self.values, strict=True):
            highest, units = np.array([most[name] for name in names]), of_kind[-1]
            stored = (of_kind <= highest).all(1)
            if not stored.any():
                raise ValueError(
                    f"layers: found {highest[0]} units of {names[0]!r}, fewer than the smallest "
                    f"size that its curve has; expected at least {of_kind[0, 0]}"
                )
            allowed = stored & (of_kind[:, 0] >= min_share * units[0] - ROUNDING)
            if not allowed.any():
                raise ValueError(
                    f"min_share: found {min_share:g}, but layer {names[0]!r} has "
                    f"{highest[0] / units[0]:.4g} of its units in this selection; expected at "
                    "most this"
                )
            sizes.append(of_kind[allowed])
            values.append(lost[allowed])
        return Curves(self.kinds, sizes, values, self.costs, self.uniform)

    def _by_layer(self, choice: Sequence[int]) -> dict[str, int]:
        return {
            name: int(size)
            for names, of_kind, k in zip(self.kinds, self.sizes, choice, strict=True)
            for name, size in zip(names, of_kind[k], strict=True)
        }

    def knapsack(self, cost: Cost, limit: float) -> Knapsack:
        """An item for each kind of layers. Its width is the size of its first layer."""
        costs = [np.zeros(len(of_kind)) for of_kind in self.sizes]
        widths = [of_kind[:, 0].astype(np.float64) for of_kind in self.sizes]
        place = {name: i for i, names in enumerate(self.kinds) for name in names}
        first = {name: names[0] for names in self.kinds for name in names}
        couplings: dict[tuple[int, int], float] = {}
        for layers, amount in cost.parts.items():
            a_unit = amount / math.prod(cost.units[first[name]] for name in layers)
            items = sorted(place[name] for name in layers)
            if items[0] == items[-1]:
                costs[items[0]] += a_unit * widths[items[0]] ** len(items)
            else:
                if len(items) > 2:
                    names = ", ".join(map(repr, layers))
                    raise ValueError(
                        f"size: found a cost that depends on the sizes of {names} together, "
                        "expected Budget(params=) or Budget(flops=)"
                    )
                i, j = items  # a weight has two dimensions that are cut
                couplings[i, j] = couplings.get((i, j), 0.0) + a_unit
        rest = cost.dense - sum(cost.parts.values())
        return Knapsack(self.values, costs, widths, couplings, limit - rest)

    def as_json(self) -> dict[str, Any]:
        """The curves as values that JSON can hold."""
        return {
            "kinds": [list(names) for names in self.kinds], "uniform": self.uniform,
            "sizes": [sizes.tolist() for sizes in self.sizes],
            "values": [values.tolist() for values in self.values],
            "costs": {what: [c.as_json() for c in costs] for what, costs in self.costs.items()},
        }  # fmt: skip

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Curves:
        return cls(
            value["kinds"], [np.array(sizes, np.int64) for sizes in value["sizes"]],
            [np.array(values, np.float64) for values in value["values"]],
            {what: [Cost.of_json(c) for c in costs] for what, costs in value["costs"].items()},
            value["uniform"],
        )  # fmt: skip
