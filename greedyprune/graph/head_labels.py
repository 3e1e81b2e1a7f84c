"""The dimensions inside attention's heads as units, in the place of whole heads.

A head has a query, a key and a value vector for each token. The scores are sums of products over
the dimensions of queries and keys. The output has the dimensions of the values. Linear attention
and other products of two tensors are treated alike: a dimension that a product sums over is a
*query-key* dimension, and one that it keeps is a *value* dimension.

All heads keep as many dimensions, but each may keep others. A norm's factors or rotary embeddings,
which all heads share, tie the dimensions of all heads.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from torch import fx

from .classes import Ids
from .labels import Factor, Labels, Operand, State
from .nodes import shape_of
from .propagate import Product, Propagation, aligned, repeated
from .tracing import Graph


class Inside(NamedTuple):
    """The ids along a dimension of heads in a product of two tensors.

    ids:  (heads..., d), where the first dimensions are `dims` of the product's result
    sums: does the product sum over the dimension?
    """

    node: fx.Node
    ids: Ids
    dims: tuple[int, ...]
    sums: bool

    def of_heads(self, roots: Ids) -> Ids:
        """The classes of each head's dimensions: (heads, d)."""
        return roots.reshape(-1, roots.shape[-1])


class HeadPropagation(Propagation):
    """The ids of all tensors of a graph, with the dimensions inside heads as units.

    noted: where products of two tensors have them
    """

    def __init__(self, graph: Graph) -> None:
        self.noted: list[Inside] = []
        self._even: list[tuple[Ids, str]] = []  # ids that a split puts into tensors of one size
        super().__init__(graph)

    def places(self) -> dict[int, int]:
        """The place among its head's dimensions of each unit inside heads."""
        found = dict[int, int]()
        for inside in self.noted:
            roots = self.classes.roots(inside.ids)
            for place, units in enumerate(inside.of_heads(roots).T):
                found |= dict.fromkeys(units.tolist(), place)
        reasons = self.classes.reasons(np.array([*found], np.int64))
        return {u: at for (u, at), why in zip(found.items(), reasons, strict=True) if why is None}

    def _through_product(self, node: fx.Node, op: str) -> State:
        one, other = node.args[1:3] if op == "baddbmm" else node.args[:2]
        if not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
            return super()._through_product(node, op)
        if len(shape_of(one)) < 2 or len(shape_of(other)) < 2 or len(shape_of(node)) < 3:
            return super()._through_product(node, op)
        if any(tensor in self._constants and len(shape_of(tensor)) == 2 for tensor in (one, other)):
            return super()._through_product(node, op)  # a projection, by a weight that is computed
        for tensor in node.all_input_nodes:
            if tensor not in (one, other):
                self._fix(self.of(tensor), f"{node.target} adds its units")
        dims, row, column = len(shape_of(node)), len(shape_of(one)) - 2, len(shape_of(other)) - 2
        to_one, to_other = aligned(one, node), aligned(other, node)
        left, right = self._inside_heads(node, one), self._inside_heads(node, other)
        self._sum_over(node, [
            (one, _along(left, row + 1), to_one | {row: None, row + 1: dims}),
            (other, _along(right, column), to_other | {column + 1: None, column: dims}),
        ])  # fmt: skip
        rows = self._keep(node, (one, _along(left, row), to_one | {row + 1: None}))
        columns = _along(right, column + 1)
        return (*rows, *self._keep(node, (other, columns, to_other | {column: None})))

    def _through_attention(self, node: fx.Node) -> State:
        query, key, value = (arg for arg in node.args[:3] if isinstance(arg, fx.Node))
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if isinstance(mask, fx.Node):
            self._fix(self.of(mask), f"{node.target} adds its units")
        dims = len(shape_of(node))
        heads = shape_of(query)[-3] if dims > 2 else 1
        operands = list[Operand]()
        for tensor in (query, key, value):
            state = self._inside_heads(node, tensor)
            self._fix(_along(state, dims - 2), f"{node.target} mixes its units")
            state = repeated(_along(state, dims - 1), dims - 3, [heads] * dims)
            operands.append((tensor, state, aligned(tensor, node) | {dims - 2: None}))
        of_values = operands.pop()
        self._sum_over(node, [(t, state, {**to, dims - 1: dims}) for t, state, to in operands])
        return self._keep(node, of_values)

    def _inside_heads(self, node: fx.Node, tensor: fx.Node) -> State:
        """The ids along one of the last two dimensions, and along those of heads."""
        last, state = {len(shape_of(tensor)) - 2, len(shape_of(tensor)) - 1}, self.of(tensor)
        mixed = tuple(labels for labels in state if len(last & set(labels.dims)) != 1)
        self._fix(mixed, f"{node.target} mixes its units")
        return tuple(labels for labels in state if labels not in mixed)

    def _sum_over(self, node: fx.Node, operands: list[Operand]) -> None:
        """The ids along the dimension that a product sums over, of both its operands.

        operands: their dimension that is summed over becomes the one behind the result's last
        """
        dims = len(shape_of(node))
        states = [state for _, state, _ in operands]
        if not all(states):
            for state in states:
                self._fix(state, f"{node.target} sums over its units")
            return
        over = sorted({to[d] or 0 for _, state, to in operands for la in state for d in la.dims})
        size = next(
            labels.ids.shape[labels.dims.index(dim)]
            for _, (labels, *_), to in operands for dim in labels.dims if to[dim] == dims
        )  # fmt: skip
        ids = self._block(node, over, [(*shape_of(node), size)[dim] for dim in over], operands)
        self.noted.append(Inside(node, ids, tuple(over[:-1]), sums=True))
        self.products.append(Product(node, ids))

    def _keep(self, node: fx.Node, operand: Operand) -> State:
        """The ids of a product's result along a dimension that it keeps."""
        state = self._met(node, [operand])
        for labels in state:
            if labels.dims[-1] < len(shape_of(node)) - 2:  # all dimensions of a head are one
                self._fix((labels,), f"{node.target} mixes its units")
                continue
            self.noted.append(Inside(node, labels.ids, labels.dims[:-1], sums=False))
            self.products.append(Product(node, labels.ids))
        return state

    def _as_normed(self, state: State, over: Collection[int]) -> State:
        """A norm over the dimensions of a head: those of all heads are one."""
        result = list[Labels]()
        for labels in state:
            others = tuple(axis for axis, dim in enumerate(labels.dims) if dim not in over)
            if others and len(others) == len(labels.dims) - 1:
                self.classes.unite_along(labels.ids, others)
                [(axis, dim)] = [(a, d) for a, d in enumerate(labels.dims) if d in over]
                ids = np.moveaxis(labels.ids, axis, 0).reshape(labels.ids.shape[axis], -1)[:, 0]
                labels = Labels((dim,), ids)
            result.append(labels)
        return tuple(result)

    def _split_evenly(self, ids: Ids, note: str) -> None:
        """Queries, keys and values may lose different units, as long as they lose as many."""
        self._even.append((ids, note))

    def _make_rectangular(self) -> None:
        """Only where not all ids are inside heads: trials tell which sizes the code needs alike."""
        inside = np.array([*self.places()], np.int64)

        def all_inside(ids: Ids) -> bool:
            return bool(np.isin(self.classes.roots(ids), inside).all())

        for ids, note in self._even:
            if not all_inside(ids):
                super()._split_evenly(ids, note)
        self._even.clear()
        self._splits = [ids for ids in self._splits if not all_inside(ids)]
        super()._make_rectangular()

    def _decide_factor(self, factor: Factor) -> None:
        """Factors along the dimensions of heads tie those of all heads."""
        places, roots = self.places(), self.classes.roots(factor.ids)
        if not places.keys() >= set(roots.ravel().tolist()):
            super()._decide_factor(factor)
            return
        at = np.vectorize(places.__getitem__)(roots)
        if (at == at.min(factor.axes, keepdims=True)).all():  # a factor for each head
            self.classes.fix(factor.constant, f"{factor.node.target} has one for each head")
        else:
            others = tuple(axis for axis in range(roots.ndim) if axis not in factor.axes)
            self.classes.unite_along(factor.ids, others)
            self.classes.unite(factor.ids, factor.constant)


def _along(state: State, dim: int) -> State:
    """The ids along a dimension of heads."""
    return tuple(labels for labels in state if dim in labels.dims)
