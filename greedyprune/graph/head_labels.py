"""The dimensions inside attention's heads as units, in the place of whole heads.

A head has a query, a key and a value vector for each token. The scores are sums of products over
the dimensions of queries and keys. The output has the dimensions of the values. Here the entries at
the same place of all heads go together, so that all heads keep one size. Linear attention and other
products of two tensors are treated alike: a dimension that a product sums over is a *query-key*
dimension, and one that it keeps a *value* dimension.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from torch import fx

from .classes import Ids
from .labels import Labels, State
from .nodes import shape_of
from .propagate import Product, Propagation
from .tracing import Graph


class Scores(NamedTuple):
    """A product that sums over units, and their ids along the dimension that it sums over."""

    node: fx.Node
    ids: Ids


class HeadPropagation(Propagation):
    """The ids of all tensors of a graph, with the dimensions inside heads as units.

    scores: the products that sum over units
    """

    def __init__(self, graph: Graph) -> None:
        self.scores: list[Scores] = []
        self._values: list[Ids] = []
        self._even: list[tuple[Ids, str]] = []  # ids that a split puts into tensors of one size
        super().__init__(graph)

    def inside(self) -> set[int]:
        """The units inside heads, those of queries and keys and those of values."""
        noted = [scores.ids for scores in self.scores] + self._values
        units = {int(unit) for ids in noted for unit in self.classes.roots(ids).ravel()}
        roots = np.array(sorted(units), np.int64)
        reasons = self.classes.reasons(roots)
        return {unit for unit, why in zip(roots.tolist(), reasons, strict=True) if why is None}

    def _through_product(self, node: fx.Node, op: str) -> State:
        one, other = node.args[-2:] if op != "baddbmm" else node.args[1:3]
        tensors = (isinstance(each, fx.Node) and len(shape_of(each)) > 1 for each in (one, other))
        if not all(tensors):
            return super()._through_product(node, op)
        assert isinstance(one, fx.Node)
        assert isinstance(other, fx.Node)
        dims = len(shape_of(node))
        rows, columns = len(shape_of(one)) - 2, len(shape_of(other)) - 2
        left, right = self._inside_heads(node, one), self._inside_heads(node, other)
        self._sum_over(node, _along(left, rows + 1), _along(right, columns))
        kept = (rows, _along(left, rows), dims - 2), (columns, _along(right, columns + 1), dims - 1)
        added = [tensor for tensor in node.all_input_nodes if tensor not in (one, other)]
        for tensor in added:
            self._fix(self.of(tensor), f"{node.target} adds its units")
        return self._of_values(node, [(state, to) for _, state, to in kept])

    def _through_attention(self, node: fx.Node) -> State:
        query, key, value = (arg for arg in node.args[:3] if isinstance(arg, fx.Node))
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if isinstance(mask, fx.Node):
            self._fix(self.of(mask), f"{node.target} adds its units")
        queries, keys, values = (self._inside_heads(node, each) for each in (query, key, value))
        last = len(shape_of(node)) - 1
        for state, tensor in ((keys, key), (values, value)):
            self._fix(_along(state, len(shape_of(tensor)) - 2), f"{node.target} mixes its units")
        self._fix(_along(queries, last - 1), f"{node.target} mixes its units")
        self._sum_over(node, _along(queries, last), _along(keys, len(shape_of(key)) - 1))
        return self._of_values(node, [(_along(values, len(shape_of(value)) - 1), last)])

    def _inside_heads(self, node: fx.Node, tensor: fx.Node) -> State:
        """The ids along the last two dimensions, where those of all heads are one."""
        dims = len(shape_of(tensor))
        reason = f"{node.target} runs for each of its units"
        state = self._mixed(node, self.of(tensor), range(dims - 2), reason)
        mixed = tuple(labels for labels in state if len(labels.dims) > 1)
        self._fix(mixed, f"{node.target} mixes its units")
        return tuple(labels for labels in state if len(labels.dims) == 1)

    def _sum_over(self, node: fx.Node, left: State, right: State) -> None:
        """The ids along the dimension that a product sums over, of both its operands."""
        if left and right:
            self.classes.unite(left[0].ids, right[0].ids)
            self.scores.append(Scores(node, left[0].ids))
            self.products.append(Product(node, left[0].ids))
        else:
            self._fix(left + right, f"{node.target} sums over its units")

    def _of_values(self, node: fx.Node, kept: list[tuple[State, int]]) -> State:
        """The ids of a product's result, from those that it keeps and their dimensions there."""
        state = tuple(la._replace(dims=(to,)) for labels, to in kept for la in labels)
        self._values += [labels.ids for labels in state]
        self.products += [Product(node, labels.ids) for labels in state]
        return state

    def _apart(self, state: State, over: Collection[int]) -> State:
        """A norm over the dimension of each head: the entries of all heads are one."""
        result = list[Labels]()
        for labels in state:
            others = tuple(axis for axis, dim in enumerate(labels.dims) if dim not in over)
            if others and len(others) == len(labels.dims) - 1:
                self.classes.unite_along(labels.ids, others)
                axis = next(axis for axis, dim in enumerate(labels.dims) if dim in over)
                ids = np.moveaxis(labels.ids, axis, 0).reshape(labels.ids.shape[axis], -1)[:, 0]
                labels = Labels((labels.dims[axis],), ids)
            result.append(labels)
        return tuple(result)

    def _split_evenly(self, ids: Ids, note: str) -> None:
        """Queries, keys and values may lose different units, as long as they lose as many."""
        self._even.append((ids, note))

    def _make_rectangular(self) -> None:
        """Only where not all ids are inside heads: trials tell which sizes the code needs alike."""
        inside = np.array(sorted(self.inside()), np.int64)

        def all_inside(ids: Ids) -> bool:
            return bool(np.isin(self.classes.roots(ids), inside).all())

        for ids, note in self._even:
            if not all_inside(ids):
                super()._split_evenly(ids, note)
        self._even.clear()
        self._splits = [ids for ids in self._splits if not all_inside(ids)]
        super()._make_rectangular()


def _along(state: State, dim: int) -> State:
    """The ids along one dimension."""
    return tuple(labels for labels in state if labels.dims == (dim,))
