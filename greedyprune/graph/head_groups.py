"""The groups of dimensions inside attention's heads: of queries and keys, and of values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import fx

from .classes import Ids
from .group_reader import Reader, fix_what_cannot_go, places_of, sizes_in
from .groups import QUERY_KEY, VALUE, Group, Scores
from .head_labels import HeadPropagation, Inside
from .names import bias_name
from .nodes import ATTENTION, arguments_of, operation, shape_of
from .slices import NotPrunableError, Slice
from .tracing import Graph


def groups_inside_heads(
    graph: Graph, known: Mapping[str, Group | NotPrunableError]
) -> dict[str, Group]:
    """The groups inside heads by their names, such as "attn.qkv[value]".

    known: the other groups. With a single head, the dimensions of its values are one of them
    """
    propagation = HeadPropagation(graph)
    if not any(note.sums or operation(note.node) == ATTENTION for note in propagation.noted):
        return {}
    fix_what_cannot_go(graph, propagation)
    others = [group.slices for group in known.values() if isinstance(group, Group)]
    found = HeadReader(graph, propagation).groups()
    return {group.producer: group for group in found if group.slices not in others}


class HeadReader(Reader):
    """Reads the groups of query-key and of value units.

    Where heads may keep different dimensions, each has a class of its own. A unit is made of one of
    each head.
    """

    def __init__(self, graph: Graph, propagation: HeadPropagation) -> None:
        super().__init__(graph, propagation)
        self._inside, roots = propagation.places().keys(), propagation.classes.roots
        self._noted = [(note, self._units(note.ids), roots(note.ids)) for note in propagation.noted]
        parameters = graph.model.named_parameters(remove_duplicate=False)
        self._parameters = {name for name, _ in parameters}
        self._attention = {node.name for node in graph.nodes if operation(node) == ATTENTION}

    def _are_summed(self, members: Sequence[int]) -> bool:
        return any(note.sums and not of.isdisjoint(members) for note, of, _ in self._noted)

    def _group(
        self, roots_of: Mapping[tuple[str, int], Ids], members: Sequence[int]
    ) -> Group | None:
        if not self._inside >= set(members):
            return None
        group = super()._group(roots_of, members)
        notes = [(note, roots) for note, of, roots in self._noted if not of.isdisjoint(members)]
        heads = _heads_of(notes[0][1])
        classes = set(heads.ravel().tolist())
        is_matched = {*members} == classes and len(classes) == heads.size
        if group is None or not is_matched or heads.shape[1] == 1:
            return None
        part = VALUE if group.consumers else QUERY_KEY
        halves = {  # one of an attention's two products is of queries and keys, the other of values
            f"{name}{part}": amount // 2
            for name, amount in group.products.items() if name in self._attention
        }  # fmt: skip
        whole = {n: amount for n, amount in group.products.items() if n not in self._attention}
        group = replace(
            group, part=part, units=heads.shape[1], heads=len(heads), products=whole | halves
        )
        group = self._with_heads(group, roots_of, heads, notes)
        if part == VALUE:
            return group
        given = tuple(name for name in group.slices if name in self._parameters)
        group = replace(group, tied=given, not_output="attention")
        return rescaling(group, any(_divides_by_root(note.node) for note, _ in notes))

    def _with_heads(
        self, group: Group, roots_of: Mapping[tuple[str, int], Ids], heads: Ids,
        notes: Sequence[tuple[Inside, Ids]],
    ) -> Group:  # fmt: skip
        """The group with the entries of its units, of which each has a dimension of every head.

        heads: (heads, d), the classes
        """
        head_of, first = (np.full(int(heads.max()) + 1, -1) for _ in range(2))
        head_of[heads] = np.arange(len(heads))[:, None]
        first[heads] = heads[:1]

        def unit_of(ids: Ids) -> Ids:
            """The first head's class at the same place; other classes stay."""
            roots = self.propagation.classes.roots(ids)
            known = np.where(roots < len(first), first[np.minimum(roots, len(first) - 1)], -1)
            return np.where(known < 0, roots, known)

        places = {}
        for name, at in (*group.slices.items(), *group.also.items()):
            roots = roots_of[name, at.dim]
            of_heads = [places_of(roots, classes) for classes in heads]
            places[name, at.dim] = Slice(at.dim, torch.cat(of_heads, 1), at.size)
        concerned = set(heads.ravel().tolist())
        doubts = [doubt for doubt, of in self.doubts if not of.isdisjoint(concerned)]
        scores = {}
        for note, roots in notes:
            if note.sums:
                shape = [1] * (len(shape_of(note.node)) - 2)
                for dim, size in zip(note.dims, roots.shape[:-1], strict=True):
                    shape[dim] = size
                scores[note.node.name] = Scores(
                    places_of(unit_of(roots.reshape(-1, roots.shape[-1])[0]), heads[0]),
                    torch.from_numpy(head_of[roots[..., 0]].reshape(shape)),
                )
        return replace(
            group,
            slices={name: places[name, at.dim] for name, at in group.slices.items()},
            also={name: places[name, at.dim] for name, at in group.also.items()},
            sizes=sizes_in(self.graph, doubts, heads[0], unit_of, shared=True),
            scores=scores,
        )


def _heads_of(roots: Ids) -> Ids:
    """The classes of the dimensions of each head that is free to keep its own: (heads, d)."""
    rows = roots.reshape(-1, roots.shape[-1])
    heads, dims = (np.sort(np.unique(c, return_index=True)[1]) for c in (rows[:, 0], rows[0]))
    return rows[heads][:, dims]


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
    """Does a product divide by the root of the size it sums over, as torch's attention does?"""
    return operation(node) == ATTENTION and arguments_of(node)["scale"] is None
