"""How norms over units carry their ids, and which entries they have in a pruned network."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from .classes import Ids
from .labels import EXPANDING, Labels, Operand, State
from .nodes import CONVOLUTIONS, first_of, operation, shape_of
from .norms import NORMS
from .shapes import ShapeOperations
from .slices import Entries
from .tracing import Graph


class Norm(NamedTuple):
    """An operation over units, along `dim` of its input, with their ids.

    It takes statistics of them, or is a convolution of one channel along them.
    """

    node: fx.Node
    dim: int
    ids: Ids


class NormOperations(ShapeOperations):
    """Norms, and the statistics of norms that are written out.

    norms: the operations that take statistics over units
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.norms: list[Norm] = []

    def _through_norm(self, node: fx.Node, op: str) -> State:
        """A norm along the last dimensions, or of groups of channels with all positions."""
        source, of_groups = first_of(node), op == "group_norm"
        dims = len(shape_of(source))
        sizes: Any = node.args[1]
        over = range(1, dims) if of_groups else range(dims - len(sizes), dims)
        state: State = ()
        for labels in self._as_normed(self.of(source), over):
            if labels.dims in [(dim,) for dim in ([1] if of_groups else over)]:
                state += (labels,)  # units that the norm goes over
            else:
                state += self._mixed(node, (labels,), range(2, dims) if of_groups else over)
        operands: list[Operand] = [(source, state, {dim: dim for dim in range(dims)})]
        for operand in node.args[2:4]:
            if isinstance(operand, fx.Node):
                to = {dim: over[dim] for dim in range(len(shape_of(operand)))}
                operands.append((operand, self.of(operand), to))
        state = self._met(node, operands)
        for labels in state:
            if not set(labels.dims) & set(over):
                continue
            if len(labels.dims) > 1:
                self._fix((labels,), f"{node.target} mixes its units")
            elif of_groups and sizes > 1:
                note = f"{node.target} has groups of channels, which mix several of its units"
                self.classes.unite_along(labels.ids.reshape(sizes, -1), (1,), note)
            else:
                self.norms.append(Norm(node, labels.dims[0], labels.ids))
            if len(operands) == 1:  # its sizes are those of no tensor
                self._doubt_sizes(node, (labels,), over)
        return state

    def _as_normed(self, state: State, over: Collection[int]) -> State:
        """The ids of a tensor, as a norm over these dimensions takes them."""
        return state

    def _statistic(self, node: fx.Node, along: set[int]) -> State:
        """A statistic along dimensions, which stay with size 1: a part of a norm, maybe."""
        source, result = first_of(node), list[Labels]()
        for labels in self._as_normed(self.of(source), along):
            if len(labels.dims) == 1 and labels.dims[0] in along:
                self.norms.append(Norm(node, labels.dims[0], labels.ids))
            else:
                result += self._mixed(node, (labels,), along)
        if operation(node) == "var_mean":
            self._parts[node] = [tuple(result), tuple(result)]
            return ()
        return tuple(result)

    def _check_rescales(self, norm: Norm) -> None:
        """Fixes units of which a statistic is used for anything but the units themselves."""
        if operation(norm.node) in NORMS | CONVOLUTIONS:
            return
        units, todo, seen = self.classes.roots(norm.ids), [norm.node], {norm.node}
        while todo:
            for user in todo.pop().users:
                if user in seen:
                    continue
                seen.add(user)
                if any(np.isin(units, self.classes.roots(la.ids)).any() for la in self.of(user)):
                    continue
                op = operation(user)
                passes = op in EXPANDING or getattr(user.target, "__name__", "") == "getitem"
                if user.op == "output" or not (passes or self._is_pointwise(user, op)):
                    self.classes.fix(norm.ids, f"{norm.node.target} mixes its units")
                    return
                todo.append(user)

    def _lost(self, left: Entries) -> tuple[Ids, Ids]:
        """The classes with entries that go, and those of them with others that stay."""
        gone, kept = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for key, entries in left.items():
            if key in self.parameters:
                roots = self.classes.roots(self.parameters[key])
                stays = np.isin(np.arange(len(roots)), entries.numpy())
                kept.append(roots[stays])
                gone.append(roots[~stays])
        lost = np.unique(np.concatenate(gone))
        return lost, np.intersect1d(lost, np.concatenate(kept))

    def are_whole(self, left: Entries) -> bool:
        """Does every unit go or stay as a whole?"""
        return not len(self._lost(left)[1])

    def entries_in_norms(self, left: Entries) -> dict[fx.Node, tuple[int, Tensor]]:
        """The norms over entries that go: the dimension, and the entries that are left of it.

        left: what stays of each dimension that is cut
        """
        lost, parted = self._lost(left)
        lost, found = np.setdiff1d(lost, parted), {}
        for node, dim, ids in self.norms:
            stays = ~np.isin(self.classes.roots(ids), lost)
            if not stays.all():
                found[node] = dim, torch.from_numpy(np.nonzero(stays)[0])
        return found
