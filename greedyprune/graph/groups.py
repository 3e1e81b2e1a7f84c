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

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .calls import is_alone, sees_input
from .classes import Ids
from .constant_sizes import attributes_of, line_of
from .propagate import IDENTITY, RESHAPING, Propagation
from .slices import Entries, NotPrunableError, Slice
from .tracing import Graph, Layer, Window, first_of, flops_of, operation


@dataclass(frozen=True)
class Group:
    """Units that are removed together.

    producers:     the layers and embeddings whose outputs are the units, in the order in which they
                   run
    consumers:     the layers that sum over the units
    units:         how many there are
    slices:        the parameters and buffers with entries of the units, and where; for a consumer
                   where the units are its inputs
    also:          those of them that hold the units along a second dimension, and where: the
                   weights of layers that both read and write a stream
    output:        the only consumer's output is the model's output
    not_output:    the operation between the consumer and the model's output; "" if there is none
    may_hold_size: operations whose arguments may hold the number of units as a constant
    sizes:         attributes of modules that these may come from, as "module.attribute", and which
                   of the entries that such an attribute counts are of which unit. Cutting sets them
                   where the group can't be cut otherwise (surgery/trial_cut.py)
    products:      the matrix products of each unit by itself (attention's), and the FLOPs of all
    windows:       how the consumers that are convolutions go over their inputs; those that are not
                   listed run as torch's own modules do
    repeated:      a consumer runs several times in one forward pass
    inner:         consumers whose inputs a hook on their module does not see (calls.py)
    mixed:         those of them whose derivatives it does not see either
    stream:        the units are sums of several layers' outputs, as along a residual connection
    tied:          tables of embeddings that linear maps have, too. Such a map takes the units, but
                   its error does not count, and it keeps its weights
    norms:         norms over the units: without some of them, the others change
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    units: int
    slices: Mapping[str, Slice]
    output: bool
    not_output: str = ""
    may_hold_size: tuple[str, ...] = ()
    sizes: Mapping[str, Slice] = field(default_factory=dict)
    also: Mapping[str, Slice] = field(default_factory=dict)
    products: Mapping[str, int] = field(default_factory=dict)
    windows: Mapping[str, Window] = field(default_factory=dict)
    repeated: bool = False
    inner: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    stream: bool = False
    norms: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()

    @property
    def left_out(self) -> str:
        """Why the group is only selected where it is asked for; "": it always is."""
        what = ""
        if self.norms:
            what = f"a norm goes over its units ({self.norms[0]})"
        if self.stream:
            what = "it gives a residual stream"
        return f"{what}, which its name or layers='all' selects" if what else ""

    @property
    def producer(self) -> str:
        """The first producer, by which the group is known."""
        return self.producers[0]

    @property
    def consumer(self) -> str:
        """The first consumer."""
        return self.consumers[0]

    @property
    def without_units(self) -> Entries:
        """What is left of each tensor where all units go."""
        return {(name, at.dim): at.rest() for name, at in self.places}

    @property
    def cut(self) -> dict[str, Any]:
        """What cutting needs to know, by the names of LayerSelection's attributes."""
        places = {"slices": self.slices, "also": self.also, "sizes": self.sizes}
        return {name: dict(value) for name, value in places.items()} | {"tied": self.tied}

    @property
    def places(self) -> list[tuple[str, Slice]]:
        """Every tensor with entries of the units, and where; some tensors twice."""
        return [*self.slices.items(), *self.also.items()]


def groups_in(graph: Graph) -> dict[str, Group | NotPrunableError]:
    """Every producer's group, or why it has none, in the order in which the producers run."""
    propagation = Propagation(graph)
    _fix_what_cannot_go(graph, propagation)
    structure: dict[str, Group | NotPrunableError] = {}
    for group in _groups(graph, propagation):
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


def _fix_what_cannot_go(graph: Graph, propagation: Propagation) -> None:
    """Fixes units of tensors that are shared, or that hold them in two ways."""
    shared, classes = _shared(graph.model) - _only_tied(graph), propagation.classes
    for (name, _), ids in propagation.parameters.items():
        if name in shared:
            classes.fix(ids, f"{name!r} is shared with another layer")
    layers = {layer.weight for layer in graph.layers.values() if layer.groups == 1}
    dims_of = defaultdict[str, list[Ids]](list)
    for (name, _), ids in propagation.parameters.items():
        dims_of[name].append(ids)
    for name, dims in dims_of.items():
        for one, other in combinations(dims, 2):
            if name not in layers:
                twice = np.intersect1d(classes.roots(one), classes.roots(other))
                classes.fix(twice, f"{name!r} holds its units in two different ways")


def _groups(graph: Graph, propagation: Propagation) -> Iterator[Group]:
    """The groups: units with entries in the same places."""
    places_of = defaultdict[int, list[tuple[int, int]]](list)  # by unit: tensor, how many entries
    keys = list(propagation.parameters)
    roots_of = [propagation.classes.roots(propagation.parameters[key]) for key in keys]
    for i, roots in enumerate(roots_of):
        units, counts = np.unique(roots, return_counts=True)
        for unit, count in zip(units.tolist(), counts.tolist(), strict=True):
            places_of[unit].append((i, count))
    alike = defaultdict[tuple[tuple[int, int], ...], list[int]](list)
    ids = np.array(list(places_of), np.int64)
    for unit, reason in zip(places_of, propagation.classes.reasons(ids), strict=True):
        if reason is None:
            alike[tuple(places_of[unit])].append(unit)
    groups = [
        group for places, units in alike.items()
        if (group := _group(
            graph, propagation, {keys[i]: roots_of[i] for i, _ in places}, np.array(units)
        )) is not None
    ]  # fmt: skip
    names = [_producer_at(graph, node) for node in graph.nodes]
    order = {name: i for i, name in reversed([*enumerate(names)]) if name is not None}
    named = set[str]()
    for group in sorted(groups, key=lambda group: (order[group.producer], -group.units)):
        if group.producer not in named:  # other units of the same layers stay
            named.add(group.producer)
            yield group


def _producer_at(graph: Graph, node: fx.Node) -> str | None:
    """The name of the layer or embedding that a node is."""
    layer = graph.layers.get(node)
    return _table_of(graph, node) if layer is None else layer.name


def _group(
    graph: Graph, propagation: Propagation, roots_of: Mapping[tuple[str, int], Ids], units: Ids
) -> Group | None:
    """The group of these units; None if no layer gives them, or none takes them.

    None, too, where there is one unit of several entries: none of these can go without the others.
    """
    layers = {la.name: la for la in graph.layers.values() if la.groups == 1}.values()
    given = {la.name: roots_of.get((la.weight, la.out_dim)) for la in layers}
    tables = {name for node in graph.nodes if (name := _table_of(graph, node)) is not None}
    given |= {name: roots_of.get((f"{name}.weight", 1)) for name in tables}
    names = dict.fromkeys(_producer_at(graph, node) for node in graph.nodes)
    producers = [name for name in names if name is not None and given.get(name) is not None]
    consumers = [la for la in layers if (la.weight, la.in_dim) in roots_of]
    if not producers or not consumers:
        return None
    if len(units) == 1 and any((roots == units[0]).sum() > 1 for roots in roots_of.values()):
        return None
    first = given[producers[0]]
    assert first is not None
    place = {int(unit): int(np.argmax(first == unit)) for unit in units}
    units = np.array(sorted(place, key=place.__getitem__))
    shapes = {name: tensor.shape for name, tensor in _tensors_of(graph.model)}
    slices, also = dict[str, Slice](), dict[str, Slice]()
    inputs = {(la.weight, la.in_dim) for la in consumers}
    for (name, dim), roots in sorted(roots_of.items(), key=lambda item: item[0] not in inputs):
        held = also if name in slices else slices
        held[name] = Slice(dim, _places(roots, units), shapes[name][dim])
    uses = {
        node: la.name for node, la in graph.layers.items() if la.name in {c.name for c in consumers}
    }
    not_output = "another consumer of its units"
    if len(consumers) == 1:
        not_output = "another use of its consumer"
    if len(uses) == 1:
        not_output = _before_output(graph, next(iter(uses)))
    windows = {uses[node]: graph.layers[node].window for node in uses}
    classes = propagation.classes

    def concerns(ids: Ids) -> bool:
        return bool(np.isin(classes.roots(ids), units).any())

    return Group(
        tuple(producers), tuple(dict.fromkeys(uses.values())), len(units),
        slices, not_output == "", not_output,
        tuple(line_of(doubt.node) for doubt in propagation.doubts if concerns(doubt.ids)),
        _sizes(graph, propagation, units), also,
        {node.name: flops_of(node) for node, ids in propagation.products if concerns(ids)},
        {name: window for name, window in windows.items() if window is not None},
        len(uses) > len(consumers),
        tuple(dict.fromkeys(uses[node] for node in uses if not sees_input(graph, node))),
        tuple(dict.fromkeys(uses[node] for node in uses if not is_alone(graph, node))),
        any(concerns(ids) for ids in propagation.summed),
        tuple(line_of(norm.node) for norm in propagation.norms if concerns(norm.ids)),
        tuple(dict.fromkeys(la.weight for la in graph.tied.values() if la.weight in slices)),
    )  # fmt: skip


def _sizes(graph: Graph, propagation: Propagation, units: Ids) -> dict[str, Slice]:
    """Attributes that operations may have sizes from, with the entries of each unit."""
    sizes, conflicts = dict[str, Slice](), set[str]()
    for node, ids, axis, value in propagation.doubts:
        roots = np.moveaxis(propagation.classes.roots(ids), axis, 0).reshape(value, -1)
        alone = np.where((roots == roots[:, :1]).all(1), roots[:, 0], -1)  # of one unit
        counts = [int((alone == unit).sum()) for unit in units]
        if not counts[0] or len(set(counts)) > 1:
            continue
        at = Slice(0, _places(alone, units), value)
        for name in attributes_of(graph.model, node, value):
            if sizes.setdefault(name, at) != at:
                conflicts.add(name)
    return {name: at for name, at in sizes.items() if name not in conflicts}


def _places(roots: Ids, units: Ids) -> Tensor:
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
        if node.users and all(
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
            return str(node.target)
    return "nothing that reaches the output"
