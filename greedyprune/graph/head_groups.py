"""The groups of dimensions inside attention's heads: of queries and keys, and of values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from .classes import Ids
from .group_reader import Reader, fix_what_cannot_go, places_of
from .groups import QUERY_KEY, VALUE, Group
from .head_labels import HeadPropagation
from .names import bias_name
from .nodes import ATTENTION, arguments_of, operation
from .slices import NotPrunableError, Slice
from .tracing import Graph


def groups_inside_heads(
    graph: Graph, known: Mapping[str, Group | NotPrunableError]
) -> dict[str, Group]:
    """The groups inside heads by their names, such as "attn.qkv[value]".

    known: the other groups. With a single head, the dimensions of its values are one of them
    """
    propagation = HeadPropagation(graph)
    if not propagation.scores:
        return {}
    fix_what_cannot_go(graph, propagation)
    others = [group.slices for group in known.values() if isinstance(group, Group)]
    found = HeadReader(graph, propagation).groups()
    return {group.producer: group for group in found if group.slices not in others}


class HeadReader(Reader):
    """Reads the groups of query-key and of value units."""

    shares_sizes = True  # the size of heads is one of queries, keys and values

    def __init__(self, graph: Graph, propagation: HeadPropagation) -> None:
        super().__init__(graph, propagation)
        self._inside = propagation.inside()
        self._sums = [(scores, self._units(scores.ids)) for scores in propagation.scores]
        parameters = graph.model.named_parameters(remove_duplicate=False)
        self._parameters = {name for name, _ in parameters}
        self._attention = {node.name for node in graph.nodes if operation(node) == ATTENTION}

    def _scores_of(self, units: Ids) -> dict[str, Slice]:
        concerned, roots = set(units.tolist()), self.propagation.classes.roots
        return {
            node.name: Slice(-1, places_of(roots(ids), units), len(ids))
            for (node, ids), of in self._sums if not of.isdisjoint(concerned)
        }  # fmt: skip

    def _group(
        self, roots_of: Mapping[tuple[str, int], Ids], members: Sequence[int]
    ) -> Group | None:
        group = super()._group(roots_of, members) if self._inside.issuperset(members) else None
        if group is None:
            return None
        part = QUERY_KEY if group.scores else VALUE
        halves = {  # one of an attention's two products is of queries and keys, the other of values
            f"{name}{part}": amount // 2
            for name, amount in group.products.items() if name in self._attention
        }  # fmt: skip
        whole = {n: amount for n, amount in group.products.items() if n not in self._attention}
        group = replace(group, part=part, products=whole | halves)
        if not group.scores:
            return group
        given = tuple(name for name in group.slices if name in self._parameters)
        group = replace(group, tied=given, not_output="attention")
        nodes = [scores.node for scores, _ in self._sums if scores.node.name in group.scores]
        return rescaling(group, any(map(_divides_by_root, nodes)))


def rescaling(group: Group, rescales: bool) -> Group:
    """A query-key group that keeps its scores' size where the code divides by the units' root."""
    return replace(group, rescaled=_last_tensors(group) if rescales else ())


def _last_tensors(group: Group) -> tuple[str, ...]:
    """The parameters that queries and keys are in proportion to: those of norms where there are."""
    if not group.norms:
        return group.tied
    weights = [name if name in group.slices else f"{name}.weight" for name in group.producers]
    given = {*weights, *map(bias_name, weights)}
    return tuple(name for name in group.tied if name not in given)


def _divides_by_root(node: fx.Node) -> bool:
    """Does a product divide by the root of the size that it sums over, as torch's attention does?"""
    return operation(node) == ATTENTION and arguments_of(node)["scale"] is None
