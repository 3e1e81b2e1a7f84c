"""What may be pruned: the groups of units that can be removed from a model together.

From each producer (a Linear or a convolution) the units are carried forward through operations that
keep them apart (listed in propagate.py), until every path ends in a consumer: a layer that sums
over them. Such a group is closed: to remove a unit, it is enough to cut the tensors that were met
on the way. A layer is refused, with the reason, if

- it is a grouped convolution, whose units are those of its input,
- its units are the model's output, or an operation mixes them, or
- a tensor that would be cut is used elsewhere, too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from .calls import is_alone, runs_in_own_module, sees_input
from .classes import Ids
from .constant_sizes import attributes_of, line_of, sizes_held
from .groups import Group
from .labels import Doubt
from .nodes import IDENTITY, first_of, flops_of, operation, title
from .norm_labels import Norm
from .propagate import RESHAPING, Product, Propagation
from .recurrences import is_recurrence
from .slices import NotPrunableError, Slice
from .tracing import Graph, Layer

T = TypeVar("T", Doubt, Product, Norm)


def groups_in(graph: Graph) -> dict[str, Group | NotPrunableError]:
    """Every producer's group, or why it has none, in the order in which the producers run."""
    propagation = Propagation(graph)
    fix_what_cannot_go(graph, propagation)
    structure: dict[str, Group | NotPrunableError] = {}
    for group in Reader(graph, propagation).groups():
        for name in group.producers:
            structure.setdefault(name, group)
    by_place: dict[str, Group | NotPrunableError] = {}
    for node in graph.nodes:
        layer, table = graph.layers.get(node), _table_of(graph, node)
        if layer is not None:
            reason = NotPrunableError(_why_not(propagation, layer))
            by_place.setdefault(layer.name, structure.get(layer.name, reason))
        elif table is not None and table in structure:
            by_place.setdefault(table, structure[table])
    return by_place


def _table_of(graph: Graph, node: fx.Node) -> str | None:
    """The name of the module whose rows an embedding looks up; None: the node is none."""
    if node.op != "call_function" or operation(node) not in ("embedding", "embedding_bag"):
        return None
    owner, _, attribute = (graph.tensor_of(first_of(node)) or "").rpartition(".")
    return owner if owner and attribute == "weight" else None


def _why_not(propagation: Propagation, layer: Layer) -> str:
    if layer.groups > 1:
        return (
            f"layer {layer.name!r}: it is a grouped convolution, so its units are those of its "
            "input"
        )
    ids = propagation.parameters[layer.weight, layer.out_dim]
    reason = next(filter(None, propagation.classes.reasons(ids)), "nothing uses its units")
    if reason == "nothing uses its units" and len(np.unique(propagation.classes.roots(ids))) == 1:
        reason = propagation.classes.note(int(ids[0])) or reason
    return f"layer {layer.name!r}: {reason}"


def fix_what_cannot_go(graph: Graph, propagation: Propagation) -> None:
    """Fixes units of tensors that are shared, or that hold them in two ways.

    The weight of a layer may hold them in two ways: as its inputs and as its outputs.
    """
    shared, classes = _shared(graph.model) - _only_tied(graph), propagation.classes
    for (name, _), ids in propagation.parameters.items():
        if name in shared:
            classes.fix(ids, f"{name!r} is shared with another layer")
    layers = {layer.weight for layer in graph.layers.values() if layer.groups == 1}
    layers |= {layer.weight for node, layer in graph.tied.items() if is_recurrence(node)}
    dims_of = defaultdict[str, list[Ids]](list)
    for (name, _), ids in propagation.parameters.items():
        dims_of[name].append(ids)
    for name in dims_of.keys() - layers:
        for one, other in combinations(dims_of[name], 2):
            twice = np.intersect1d(classes.roots(one), classes.roots(other))
            classes.fix(twice, f"{name!r} holds its units in two different ways")


class Reader:
    """Reads groups from the ids of a graph's tensors."""

    def __init__(self, graph: Graph, propagation: Propagation) -> None:
        self.graph, self.propagation = graph, propagation
        self.layers = {la.name: la for la in graph.layers.values() if la.groups == 1}
        self.given = {la.name: (la.weight, la.out_dim) for la in self.layers.values()}
        names = list[str]()  # of layers and tables, in the order in which they run
        for node in graph.nodes:
            layer, table = graph.layers.get(node), _table_of(graph, node)
            names += [layer.name] if layer is not None else [table] if table is not None else []
            if table is not None:
                self.given[table] = f"{table}.weight", 1
        self.order = {name: i for i, name in reversed([*enumerate(names)])}
        self.sizes = {name: tensor.shape for name, tensor in _tensors_of(graph.model)}
        self.doubts = self._units_of(propagation.doubts)
        self.products = self._units_of(propagation.products)
        self.norms = self._units_of(propagation.norms)
        self.held = {  # the first operation that has a size as an argument, by the size
            size: node for node in reversed(graph.nodes) for size in sizes_held(node)
        }
        self.summed = {unit for ids in propagation.summed for unit in self._units(ids)}

    def _units(self, ids: Ids) -> set[int]:
        return set(np.unique(self.propagation.classes.roots(ids)).tolist())

    def _units_of(self, items: Iterable[T]) -> list[tuple[T, set[int]]]:
        """Items that have ids, each with the units that it concerns."""
        return [(item, self._units(item.ids)) for item in items]

    def groups(self) -> Iterator[Group]:
        """The groups: units with entries in the same places."""
        entries = defaultdict[int, list[tuple[int, int]]](list)  # tensor, how many entries
        keys, classes = list(self.propagation.parameters), self.propagation.classes
        roots_of = [classes.roots(self.propagation.parameters[key]) for key in keys]
        for i, roots in enumerate(roots_of):
            units, counts = np.unique(roots, return_counts=True)
            for unit, count in zip(units.tolist(), counts.tolist(), strict=True):
                entries[unit].append((i, count))
        alike = defaultdict[tuple[tuple[int, int], ...], list[int]](list)
        ids = np.array(list(entries), np.int64)
        for unit, reason in zip(entries, classes.reasons(ids), strict=True):
            if reason is None:
                alike[tuple(entries[unit])].append(unit)
        groups = [
            group for places, units in alike.items()
            if (group := self._group({keys[i]: roots_of[i] for i, _ in places}, units)) is not None
        ]  # fmt: skip
        named = set[str]()
        place = {group.producer: self.order[group.producers[0]] for group in groups}
        for group in sorted(groups, key=lambda group: (place[group.producer], -group.units)):
            if group.producer not in named:  # other units of the same layers stay
                named.add(group.producer)
                yield group

    def _group(
        self, roots_of: Mapping[tuple[str, int], Ids], members: Sequence[int]
    ) -> Group | None:
        """The group of these units; None if no layer gives them, or nothing takes them.

        None, too, where there is one unit of several entries: none of these can go without the
        others.
        """
        graph = self.graph
        given = [name for name, place in self.given.items() if place in roots_of]
        producers = sorted(given, key=self.order.__getitem__)
        consumers = {la.name for la in self.layers.values() if (la.weight, la.in_dim) in roots_of}
        if not producers or bool(consumers) == self._are_summed(members):
            return None
        alone = len(members) == 1
        if alone and any((roots == members[0]).sum() > 1 for roots in roots_of.values()):
            return None
        first = roots_of[self.given[producers[0]]]
        place = {unit: int(np.argmax(first == unit)) for unit in members}
        units = np.array(sorted(place, key=place.__getitem__))
        slices, also = self._slices(roots_of, units, consumers)
        uses = {node: la.name for node, la in graph.layers.items() if la.name in consumers}
        not_output = "another consumer of its units"
        if len(consumers) == 1:
            not_output = "another use of its consumer"
        if len(uses) == 1:
            not_output = _before_output(graph, next(iter(uses)))
        windows, concerned = {uses[node]: graph.layers[node].window for node in uses}, set(members)
        doubts = [doubt for doubt, of in self.doubts if not of.isdisjoint(concerned)]
        return Group(
            producers=tuple(producers),
            consumers=tuple(dict.fromkeys(uses.values())),
            units=len(units),
            slices=slices,
            output=not_output == "",
            not_output=not_output,
            may_hold_size=tuple(line_of(doubt.node) for doubt in doubts)
            or self._held_elsewhere((*slices.values(), *also.values())),
            sizes=sizes_in(graph, doubts, units, self.propagation.classes.roots),
            also=also,
            products={
                product.node.name: flops_of(product.node)
                for product, of in self.products if not of.isdisjoint(concerned)
            },
            windows={name: window for name, window in windows.items() if window is not None},
            flops=self._flops_of(slices),
            repeated=len(uses) > len(consumers),
            inner=tuple(dict.fromkeys(uses[node] for node in uses if not sees_input(graph, node))),
            mixed=tuple(dict.fromkeys(uses[node] for node in uses if not is_alone(graph, node))),
            stream=not self.summed.isdisjoint(concerned),
            norms=tuple(
                line_of(norm.node) for norm, of in self.norms if not of.isdisjoint(concerned)
            ),
            tied=tuple(
                dict.fromkeys(la.weight for la in graph.tied.values() if la.weight in slices)
            ),
        )  # fmt: skip

    def _are_summed(self, members: Sequence[int]) -> bool:
        """Does a product of two tensors sum over these units?"""
        return False

    def _held_elsewhere(self, places: Iterable[Slice]) -> tuple[str, ...]:
        """The first operation on other tensors with the size of one of these as an argument."""
        found = [self.held[at.size] for at in places if at.size in self.held]
        return (line_of(min(found, key=self.graph.position.__getitem__)),) if found else ()

    def _flops_of(self, weights: Container[str]) -> dict[str, int]:
        """The FLOPs of those of these layers that do not run as a call of their module."""
        flops = Counter[str]()
        for node, layer in self.graph.layers.items():
            if layer.weight in weights and not runs_in_own_module(self.graph, node):
                flops[layer.weight] += flops_of(node)
        for node, layer in self.graph.tied.items():
            if layer.weight in weights and is_recurrence(node):
                flops[layer.weight] += flops_of(node)
        return dict(flops)

    def _slices(
        self, roots_of: Mapping[tuple[str, int], Ids], units: Ids, consumers: set[str]
    ) -> tuple[dict[str, Slice], dict[str, Slice]]:
        """Where tensors hold the units, and where some hold them along a second dimension."""
        slices, also = dict[str, Slice](), dict[str, Slice]()
        inputs = {(self.layers[name].weight, self.layers[name].in_dim) for name in consumers}
        inputs |= {(layer.weight, layer.in_dim) for layer in self.graph.tied.values()}
        for (name, dim), roots in sorted(roots_of.items(), key=lambda item: item[0] not in inputs):
            held = also if name in slices else slices
            held[name] = Slice(dim, places_of(roots, units), self.sizes[name][dim])
        return slices, also


def sizes_in(
    graph: Graph, doubts: Iterable[Doubt], units: Ids, unit_of: Callable[[Ids], Ids],
    shared: bool = False,
) -> dict[str, Slice]:  # fmt: skip
    """Attributes that operations may have sizes from, with the entries of each unit.

    unit_of: gives the unit of each id, as an id
    shared: may they count other units, too, an entry with one of the group's?
    """
    sizes, conflicts, order = dict[str, Slice](), set[str](), np.argsort(units)
    for node, ids, axis, value, dim in doubts:
        roots = np.moveaxis(unit_of(ids), axis, 0).reshape(value, -1)
        first = roots[:, :1]
        if shared:
            is_unit = np.isin(roots, units)
            first = np.where(is_unit, roots, -1).max(1, keepdims=True)
            roots = np.where(is_unit, roots, first)
        alone = np.where((roots == first).all(1), first[:, 0], -1)  # of one unit
        counts = np.bincount(np.searchsorted(units, alone[np.isin(alone, units)], sorter=order))
        if len(counts) < len(units) or len(set(counts.tolist())) > 1:
            continue
        at = Slice(0, places_of(alone, units), value)
        for name in attributes_of(graph.model, graph.tensors, node, value, dim):
            if sizes.setdefault(name, at) != at:
                conflicts.add(name)
    return {name: at for name, at in sizes.items() if name not in conflicts}


def places_of(roots: Ids, units: Ids) -> Tensor:
    """The entries of each unit, (N, w) int64, in a dimension whose entries are in these classes."""
    order = np.argsort(units)
    entries = np.nonzero(np.isin(roots, units))[0]
    unit_of = order[np.searchsorted(units, roots[entries], sorter=order)]
    return torch.from_numpy(entries[np.argsort(unit_of, kind="stable")].reshape(len(units), -1))


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _shared(model: nn.Module) -> set[str]:
    """The names of tensors that several modules have. A module with several names has them once."""
    owners: dict[str, tuple[int, nn.Module]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            owners[f"{path}.{key}".lstrip(".")] = id(tensor), module
    modules = defaultdict[int, set[nn.Module]](set)
    for tensor_id, owner in owners.values():
        modules[tensor_id].add(owner)
    return {name for name, (tensor_id, _) in owners.items() if len(modules[tensor_id]) > 1}


def _only_tied(graph: Graph) -> set[str]:
    """The tables that several modules have, and that are only looked up or multiplied with."""
    return {
        graph.tensors[node.name] for node in graph.nodes if node.name in graph.tensors
        if node.users and not any(map(is_recurrence, node.users)) and all(
            user in graph.tied or operation(user) == "embedding" for user in node.users
        )
    }  # fmt: skip


def _before_output(graph: Graph, consumer: fx.Node) -> str:
    """The first operation between a consumer and the model's output; "" if there is none."""
    reached = {consumer}
    for node in graph.nodes[graph.position[consumer] + 1 :]:
        if not any(source in reached for source in node.all_input_nodes):
            continue
        if node.op == "output":
            return ""
        if operation(node) in IDENTITY | RESHAPING:
            reached.add(node)
        elif node.users:
            return title(node)
    return "nothing that reaches the output"
