"""The ids of tensors' entries, and what happens to them where tensors meet or are mixed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import fx

from .classes import Classes, Ids
from .nodes import IDENTITY, shape_of
from .tracing import Graph

# What operations do, by name (`add` stands for `add_`, too).
# They act on every number by itself: these, and the operations that torch tags `pointwise`:
ELEMENTWISE = IDENTITY | {
    "hardswish", "log_sigmoid", "zeros_like", "ones_like", "full_like", "where", "copy",
    "fill", "zero", "floor_divide", "isreal",
    # second names, which torch does not tag:
    "multiply", "divide", "subtract", "absolute", "negative", "fix", "greater", "greater_equal",
    "less", "less_equal", "not_equal", "arccos", "arccosh", "arcsin", "arcsinh", "arctan",
    "arctanh", "arctan2", "special_expit", "special_expm1", "special_exp2", "special_erf",
    "special_erfc", "special_log1p", "special_round", "special_gammaln", "special_digamma",
}  # fmt: skip
# They repeat entries along dimensions of size 1:
EXPANDING = {"expand", "expand_as", "repeat"}
MIXED = "a reshape mixes its units' dimension with others"


class Labels(NamedTuple):
    """The ids of a tensor's entries along some of its dimensions; the others have none.

    ids: of the sizes of `dims`. Entries with the same ids go together
    """

    dims: tuple[int, ...]
    ids: Ids


State = tuple[Labels, ...]  # of disjoint dimensions
# An operand with its ids, and the result's dimension for each of its own; None: it has none.
Operand = tuple[fx.Node | None, State, Mapping[int, int | None]]


class Doubt(NamedTuple):
    """An operation that may have the size of a dimension with units as a constant.

    ids:   of the entries that the size counts, along `axis`
    value: the size
    dim:   the dimension of the operation's result that has this size; None: unknown
    """

    node: fx.Node
    ids: Ids
    axis: int
    value: int
    dim: int | None = None


class Factor(NamedTuple):
    """Ids that an operation combines with a constant, which has some of their axes only."""

    node: fx.Node
    ids: Ids
    constant: Ids
    axes: tuple[int, ...]


def blocks_of(sets: Iterable[set[int]]) -> list[set[int]]:
    """The dimensions that share ids, from sets of dimensions that overlap in some places."""
    blocks: list[set[int]] = []
    for dims in sets:
        met = [other for other in blocks if other & dims]
        blocks = [other for other in blocks if not other & dims]
        if dims:
            blocks.append(dims.union(*met))
    return blocks


class LabelledTensors:
    """The ids of a graph's tensors so far.

    classes:    which entries go together, and which are fixed
    parameters: the ids along each dimension of more than one entry, by parameter and dimension
    doubts:     operations that may have the number of units as a constant
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.classes = graph, Classes()
        self.parameters: dict[tuple[str, int], Ids] = {}
        self.doubts: list[Doubt] = []
        self._factors: list[Factor] = []
        self._splits: list[Ids] = []  # of several dimensions, which lose whole rows only
        self._states: dict[fx.Node, State] = {}
        self._parts: dict[fx.Node, list[State]] = {}  # of nodes that give several tensors
        self._constants = set[fx.Node]()  # nodes that are computed from parameters only
        self._uniform: dict[fx.Node, dict[int, Ids]] = {}  # of dimensions of constant entries

    def of(self, node: fx.Node) -> State:
        """The ids of a node's tensor."""
        return self._states.get(node, ())

    def _is_labelled(self, node: fx.Node) -> bool:
        return bool(self._states.get(node)) or node in self._parts

    def _of_all(self, node: fx.Node) -> State:
        """The ids of all tensors that a node gives."""
        return self.of(node) + tuple(la for state in self._parts.get(node, ()) for la in state)

    def _stays(self, labels: Labels) -> bool:
        """Are all of these entries fixed?"""
        return all(reason is not None for reason in self.classes.reasons(labels.ids))

    def _fix(self, state: State, reason: str) -> None:
        for labels in state:
            self.classes.fix(labels.ids, reason)

    def _refused(self, node: fx.Node, reason: str) -> State:
        for source in node.all_input_nodes:
            self._fix(self._of_all(source), reason)
        return ()

    def _doubt_sizes(self, node: fx.Node, state: State, dims: Iterable[int]) -> None:
        """Notes that an operation may have the sizes of these dimensions as constants."""
        self.doubts += [
            Doubt(node, labels.ids, axis, labels.ids.shape[axis], dim)
            for labels in state for axis, dim in enumerate(labels.dims) if dim in dims
        ]  # fmt: skip

    def _cut_out(self, state: State, dim: int, places: slice, removed: bool) -> State:
        """Some entries of a dimension; `removed`: one, without the dimension."""
        result = []
        for labels in state:
            dims, ids = labels
            if dim in dims:
                axis = dims.index(dim)
                ids = ids[(slice(None),) * axis + (places,)]
                if removed:
                    ids, dims = np.take(ids, 0, axis), dims[:axis] + dims[axis + 1 :]
            if dims:
                dims = tuple(d - (removed and d > dim) for d in dims)
                result.append(Labels(dims, ids))
        return tuple(result)

    def _mixed(
        self, node: fx.Node, state: State, dims: Iterable[int], reason: str | None = None
    ) -> State:
        """The ids after an operation that mixes all entries along these dimensions."""
        along, result = set(dims), list[Labels]()
        reason = reason or f"{node.target} mixes its units"
        for labels in state:
            axes = tuple(axis for axis, dim in enumerate(labels.dims) if dim in along)
            if not axes:
                result.append(labels)
            elif len(axes) == len(labels.dims):
                self._fix((labels,), reason)
            else:
                self.classes.unite_along(labels.ids, axes, reason)
                kept = [axis for axis in range(len(labels.dims)) if axis not in axes]
                first = tuple(0 if a in axes else slice(None) for a in range(len(labels.dims)))
                result.append(Labels(tuple(labels.dims[a] for a in kept), labels.ids[first]))
        return tuple(result)

    def _met(self, node: fx.Node, operands: Sequence[Operand]) -> State:
        """The ids of a result whose entries are computed from those at the same place."""
        shape = shape_of(node)
        result = []
        for block in blocks_of(
            {at for dim in labels.dims if (at := to.get(dim)) is not None}
            for _, state, to in operands for labels in state
        ):  # fmt: skip
            dims = sorted(block)
            ids = self._block(node, dims, [shape[dim] for dim in dims], operands)
            result.append(self._simple(Labels(tuple(dims), ids)))
        return tuple(result)

    def _block(
        self, node: fx.Node, dims: Sequence[int], sizes: Sequence[int],
        operands: Sequence[Operand],
    ) -> Ids:  # fmt: skip
        """The ids of a result along `dims`, of these sizes; those that meet become one class."""
        arrays, reasons = list[Ids](), list[tuple[tuple[int, ...], str]]()
        factors, held = list[tuple[Ids, tuple[int, ...]]](), list[tuple[fx.Node, int, int]]()
        for operand, state, to in operands:
            covered = set[int]()
            for labels in state:
                ats = [to[dim] for dim in labels.dims]
                if not any(at in dims for at in ats):
                    continue
                axes = [dims.index(at) for at in ats if at is not None]
                shape = [1] * len(dims)
                for axis, size in zip(axes, labels.ids.shape, strict=True):
                    shape[axis] = size
                    covered.add(dims[axis])
                ids = labels.ids.transpose(np.argsort(axes)).reshape(shape)
                if ids.size == 1 < math.prod(sizes):  # a single unit that is broadcast
                    self.classes.fix(ids, f"{node.target} changes the size of its units' dimension")
                elif operand in self._constants and len(axes) < len(dims):
                    factors.append((np.broadcast_to(ids, sizes), tuple(axes)))
                else:
                    arrays.append(np.broadcast_to(ids, sizes))
            if operand is None or operand is node:
                continue
            uniform = self._uniform.get(operand, {})
            constant = {
                dims.index(at): ids for dim, ids in uniform.items()
                if (at := to.get(dim)) is not None and at in dims and at not in covered
            }  # fmt: skip
            for axis, ids in constant.items():
                held.append((operand, axis, len(ids)))
                if len(constant) == 1:  # along several, each entry would tie rows and columns
                    shape = [1] * len(dims)
                    shape[axis] = len(ids)
                    arrays.append(np.broadcast_to(ids.reshape(shape), sizes))
            own = {
                at: shape_of(operand)[dim] for dim, at in to.items()
                if at in dims and dim not in uniform
            }  # fmt: skip
            bare = tuple(dims.index(at) for at, s in own.items() if s > 1 and at not in covered)
            if bare:
                other = f"another tensor of shape {shape_of(operand)}"
                reasons.append((bare, f"{node.target} combines its units with {other}"))
        first = arrays[0] if arrays else self.classes.fresh(math.prod(sizes)).reshape(sizes)
        for others in arrays[1:]:
            self.classes.unite(first, others)
        self.doubts += [Doubt(source, first, axis, size) for source, axis, size in held]
        self._factors += [Factor(node, first, ids, axes) for ids, axes in factors]
        for bare, reason in reasons:
            if len(bare) < len(dims):  # along the other dimensions, units can still be removed
                self.classes.unite_along(first, bare, reason)
            else:
                self.classes.fix(first, reason)
        return np.ascontiguousarray(first)

    def _simple(self, labels: Labels) -> Labels:
        """The same without the dimensions along which all entries have one id."""
        roots, dims, ids = self.classes.roots(labels.ids), list(labels.dims), labels.ids
        for axis in reversed(range(ids.ndim)):
            if ids.ndim > 1 and (roots == roots.take([0], axis)).all():
                roots, ids = np.take(roots, 0, axis), np.take(ids, 0, axis)
                del dims[axis]
        return Labels(tuple(dims), ids)

    def _decide_factors(self) -> None:
        """Decides whether the entries of a constant go with units that lie along more dimensions.

        A bias for each head loses its entry with the head, because heads differ along the bias's
        dimension. A norm's factors are the same for all heads: they stay, and heads stay whole.
        """
        for factor in self._factors:
            self._decide_factor(factor)

    def _decide_factor(self, factor: Factor) -> None:
        node, ids, constant, axes = factor
        roots = self.classes.roots(ids)
        others = tuple(axis for axis in range(ids.ndim) if axis not in axes)
        if all((roots == roots.take([0], axis)).all() for axis in others):
            self.classes.unite(ids, constant)
        else:
            self.classes.fix(constant, f"{node.target} has the same for several units")
            self.classes.unite_along(ids, axes, f"{node.target} has factors for its entries")

    def _make_rectangular(self) -> None:
        """Decides along which dimension the entries go, where a reshape made several of one.

        The tensor has to stay rectangular. So only the dimension with the most units can get
        smaller, and entries at the same place of it go together.
        """
        for ids in self._splits:
            roots = self.classes.roots(ids)
            varying = [
                axis for axis in range(ids.ndim) if not (roots == roots.take([0], axis)).all()
            ]
            free = np.array([reason is None for reason in self.classes.reasons(roots)])
            if len(varying) < 2 or not free.any():
                continue
            most = max(varying, key=lambda axis: ids.shape[axis])
            self.classes.unite_along(ids, tuple(a for a in range(ids.ndim) if a != most), MIXED)

    def _is_pointwise(self, node: fx.Node, op: str) -> bool:
        return op in ELEMENTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ())
