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

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from ..data.batches import Batch
from ..data.forward import hooked
from .adapters import ADAPTED, has_adapter
from .calls import is_alone, sees_input
from .constant_sizes import line_of
from .propagate import (
    IDENTITY,
    RESHAPING,
    CoarserUnits,
    Merge,
    MoreProducers,
    NotPrunableError,
    Propagation,
    Slice,
)
from .refusals import by_reason, refused_in, why_not, without_layer
from .tracing import Graph, Window, is_plain, operation, shape_of


@dataclass(frozen=True)
class Group:
    """Units that are removed together.

    producers:     the layers whose outputs are the units, in the order in which they run
    consumers:     the layers that sum over the units
    units:         how many there are
    slices:        the parameters and buffers with entries of the units, and where
    output:        the only consumer's output is the model's output
    not_output:    the operation between the consumer and the model's output; "" if there is none
    may_hold_size: operations whose arguments may hold the number of units as a constant
    products:      the matrix products of each unit by itself (attention's), and the FLOPs of all
    windows:       how the consumers that are convolutions go over their inputs; those that are not
                   listed run as torch's own modules do
    repeated:      a consumer runs several times in one forward pass
    inner:         consumers whose inputs a hook on their module does not see (calls.py)
    mixed:         those of them whose derivatives it does not see either
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    units: int
    slices: Mapping[str, Slice]
    output: bool
    not_output: str = ""
    may_hold_size: tuple[str, ...] = ()
    products: Mapping[str, int] = field(default_factory=dict)
    windows: Mapping[str, Window] = field(default_factory=dict)
    repeated: bool = False
    inner: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()

    @property
    def producer(self) -> str:
        """The first producer, by which the group is known."""
        return self.producers[0]

    @property
    def consumer(self) -> str:
        """The first consumer."""
        return self.consumers[0]


# Every producer's group, or why it has none.
Structure = Mapping[str, Group | NotPrunableError]


def group_of(graph: Graph, node: fx.Node) -> Group:
    """The group of the units that the layer `node` gives.

    Raises NotPrunableError where they can't be removed.
    """
    layer = graph.layers[node]
    if layer.groups > 1:
        raise NotPrunableError(
            f"layer {layer.name!r}: it is a grouped convolution, so its units are those of its "
            "input"
        )
    units = shape_of(node)[layer.channel_dim]
    producers = {use: Slice(graph.layers[use].channel_dim) for use in graph.uses_of(layer.name)}
    return _closed_group(graph, layer.name, units, producers)


def _closed_group(graph: Graph, name: str, units: int, producers: Mapping[fx.Node, Slice]) -> Group:
    """Carries the units through the graph; again where they are to be merged or meet others."""
    propagation = Propagation(graph, name, units, producers)
    try:
        propagation.run()
    except MoreProducers as met:
        common, merged = _with_producers(propagation, producers, met.producers)
        return _closed_group(graph, name, common, merged)
    except CoarserUnits as coarser:
        reasons = []
        for merge in coarser.merges:
            try:
                return _closed_group(graph, name, merge.units, _merged(producers, merge))
            except NotPrunableError as error:
                reasons.append(error)
        raise reasons[0] from None  # of the merge that leaves the most units
    if not propagation.consumers:
        raise propagation.refusal("nothing uses its units")
    _check_not_shared(graph, propagation, producers)
    uses = {node: graph.layers[node].name for node in propagation.consumers}
    consumers = tuple(dict.fromkeys(uses.values()))
    not_output = "another consumer of its units"
    if len(consumers) == 1:
        not_output = "another use of its consumer"
    if len(uses) == 1:
        not_output = _before_output(graph, propagation.consumers[0])
    ordered = sorted(producers, key=graph.position.__getitem__)
    windows = {uses[node]: graph.layers[node].window for node in uses}
    return Group(
        tuple(dict.fromkeys(graph.layers[node].name for node in ordered)), consumers, units,
        propagation.slices, not_output == "", not_output,
        tuple(map(line_of, propagation.may_hold_size)), propagation.products,
        {name: window for name, window in windows.items() if window is not None},
        len(uses) > len(consumers),
        tuple(dict.fromkeys(uses[node] for node in uses if not sees_input(graph, node))),
        tuple(dict.fromkeys(uses[node] for node in uses if not is_alone(graph, node))),
    )  # fmt: skip


def _with_producers(
    propagation: Propagation, producers: Mapping[fx.Node, Slice], others: Sequence[fx.Node]
) -> tuple[int, dict[fx.Node, Slice]]:
    """The number of units that these layers and the others have in common, and their places."""
    layers = propagation.graph.layers
    size = shape_of(others[0])[layers[others[0]].channel_dim]
    names = dict.fromkeys(layers[other].name for other in others)
    others = [node for name in names for node in propagation.graph.uses_of(name)]
    common = math.gcd(size, propagation.units)
    if common == 1:
        raise propagation.refusal(
            f"its {propagation.units} units are multiplied with {size} of another layer"
        )
    merged = _merged(producers, Merge(1, common, propagation.units // common))
    for node in others:
        dim = layers[node].channel_dim
        if shape_of(node)[dim] != size or layers[node].groups > 1:
            raise propagation.refusal(
                "its units are multiplied with those of layers of several sizes"
            )
        merged[node] = Slice(dim, 1, size // common)
    return common, merged


def _merged(producers: Mapping[fx.Node, Slice], merge: Merge) -> dict[fx.Node, Slice]:
    """Where the producers have the merged units."""
    return {
        node: Slice(at.dim, at.outer * merge.before, at.inner * merge.after)
        for node, at in producers.items()
    }


def _check_not_shared(graph: Graph, propagation: Propagation, producers: Iterable[fx.Node]) -> None:
    """The tensors that are cut must not be used elsewhere, by this name or another.

    A module that has several names has its tensors once.
    """
    inside = {*propagation.carrying, *propagation.consumers, *producers}
    owners: dict[str, tuple[int, nn.Module]] = {}
    for path, module in graph.model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            owners[f"{path}.{key}".lstrip(".")] = id(tensor), module
    modules = defaultdict[int, set[nn.Module]](set)
    for tensor_id, owner in owners.values():
        modules[tensor_id].add(owner)
    shared = {name for name, (tensor_id, _) in owners.items() if len(modules[tensor_id]) > 1}
    for node in graph.nodes:
        name = graph.tensors.get(node.name, "")
        if name in propagation.slices and (name in shared or not inside.issuperset(node.users)):
            raise propagation.refusal(f"{name!r} is shared with another layer")


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


# The structure that the last call of `analyse` found for each model, with what it depends on.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[object, Structure]] = WeakKeyDictionary()


def analyse(
    model: nn.Module, batch: Batch, check: Callable[[nn.Module, Group, Batch], None] | None = None
) -> Structure:
    """Every producer's group, or why it has none, in the order in which the producers run.

    check: raises NotPrunableError for a group whose `may_hold_size` prevents cutting

    Raises TraceError for a model that torch.export can't trace. A second call with an unchanged
    model returns what the first one found.
    """
    signature = check, _signature(model, batch)
    known = _KNOWN.get(model)
    if known is not None and known[0] == signature:
        return known[1]
    graph = Graph(model, batch.args, batch.kwargs)
    structure: dict[str, Group | NotPrunableError] = {}
    for node, layer in graph.layers.items():
        if layer.name in structure:  # in the group of a layer before it
            continue
        names = [layer.name]
        try:
            group = group_of(graph, node)
            names = [*dict.fromkeys((layer.name, *group.producers))]
            if any(has_adapter(model, name) for name in (*group.producers, *group.consumers)):
                raise NotPrunableError(ADAPTED)
            if check is not None and group.may_hold_size:
                check(model, group, batch)
            structure |= dict.fromkeys(names, group)
        except NotPrunableError as error:
            reason = ADAPTED if has_adapter(model, layer.name) else without_layer(error)
            # A new one: the frames of its traceback and context would keep the model alive.
            structure |= {
                name: type(error)(f"layer {name!r}: {reason}")
                for name in names if name not in structure
            }  # fmt: skip
    for name, reason in graph.not_layers.items():
        structure.setdefault(name, NotPrunableError(f"layer {name!r}: {reason}"))
    _KNOWN[model] = signature, structure
    return structure


def _signature(model: nn.Module, batch: Batch) -> object:
    """What a trace depends on: modules, their plain attributes, shapes of tensors and inputs."""

    def plain(value: object) -> object:
        if isinstance(value, (bool, int, float, str, type(None))):
            return value
        if isinstance(value, Tensor):
            return tuple(value.shape), value.dtype, value.layout
        if isinstance(value, (tuple, list)):
            return type(value), tuple(map(plain, value))
        if isinstance(value, dict):
            return tuple((str(key), plain(entry)) for key, entry in value.items())
        return id(value)

    modules = [
        (name, type(module), plain({k: v for k, v in vars(module).items() if k != "_modules"}))
        for name, module in model.named_modules()
    ]
    return modules, plain(batch.args), plain(batch.kwargs)


def find_groups(
    model: nn.Module, structure: Structure, wanted: Sequence[str] | None
) -> list[Group]:
    """The groups of the wanted producers, from what `analyse` returned; None: all groups.

    Raises NotPrunableError for a wanted layer that can't be pruned, or where no layer can, and
    ValueError for an unknown one.
    """
    groups: list[Group] = []
    if wanted is None:
        groups += [
            group for name, group in structure.items()
            if isinstance(group, Group) and name == group.producer
        ]  # fmt: skip
        if not groups:
            reasons = by_reason(refused_in(model, structure)) or [
                "it has no Linear and no convolution"
            ]
            raise NotPrunableError(f"model: no layer can be pruned: {'; '.join(reasons)}")
        return groups
    prunable = [name for name, group in structure.items() if isinstance(group, Group)]
    expected = f"expected any of: {', '.join(map(repr, prunable)) or 'none'}"
    for name in wanted:
        group = structure.get(name)
        if isinstance(group, Group):
            if group not in groups:
                groups.append(group)
        elif group is not None:
            reason = str(group).removeprefix(f"layer {name!r}: ")
            raise NotPrunableError(
                f"layers: found {name!r}, which can't be pruned ({reason}), {expected}"
            )
        else:
            module = dict(model.named_modules()).get(name)
            reason = "no such module" if module is None else why_not(module)
            raise ValueError(f"layers: found {name!r} ({reason}), {expected}")
    return groups


def named_group(model: nn.Module, producer: str, consumer: str, batch: Batch) -> Group:
    """The group of a producer and a consumer that the caller names, for untraceable models.

    One forward pass shows which modules run between the two, and whether the consumer's output is
    the model's. Both must be nn.Linear, and between them only BatchNorm1d and PReLU may have
    tensors with an entry for each unit.

    Raises ValueError for names that don't fit, NotPrunableError for another module between them.
    """
    modules = dict(model.named_modules())
    first, last = modules.get(producer), modules.get(consumer)
    for name, module in ((producer, first), (consumer, last)):
        if not isinstance(module, nn.Linear) or not is_plain(module):
            kind = "no such module" if module is None else type(module).__name__
            raise ValueError(f"layers: found {name!r} ({kind}), expected the name of an nn.Linear")
        if "weight" not in module._parameters:
            raise NotPrunableError(f"layers: found {name!r} ({why_not(module)})")
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    units = first.out_features
    if units != last.in_features:
        raise ValueError(
            f"layers: {producer!r} has {units} output units, but {consumer!r} takes "
            f"{last.in_features} inputs"
        )
    calls, outputs = _calls(model, batch)
    names = [name for name, _ in calls]
    if names.count(producer) != 1 or names.count(consumer) != 1:
        raise ValueError(
            f"layers: {producer!r} ran {names.count(producer)} and {consumer!r} "
            f"{names.count(consumer)} times in one forward pass, expected once each"
        )
    slices = {f"{consumer}.weight": Slice(1)}
    for name in [producer, *names[names.index(producer) + 1 : names.index(consumer)]]:
        module = modules[name]
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        per_unit = [key for key, tensor in tensors if tensor.dim() and len(tensor) == units]
        if name != producer and per_unit and not isinstance(module, (nn.BatchNorm1d, nn.PReLU)):
            raise NotPrunableError(
                f"layer {producer!r}: {name!r} ({type(module).__name__}) stands between its units "
                f"and {consumer!r}"
            )
        slices |= {f"{name}.{key}": Slice(0) for key in per_unit}
    last_output = calls[names.index(consumer)][1]
    is_output = (
        isinstance(outputs, Tensor)
        and isinstance(last_output, Tensor)
        and torch.equal(outputs.flatten(), last_output.flatten())
    )
    not_output = "" if is_output else "something that was not traced"
    return Group((producer,), (consumer,), units, slices, is_output, not_output)


def _calls(model: nn.Module, batch: Batch) -> tuple[list[tuple[str, object]], object]:
    """The modules that run, in order, each with what it returns; and what the model returns."""
    calls: list[tuple[str, object]] = []

    def record(name: str, output: object) -> None:
        calls.append((name, output))

    with hooked(model, [name for name, _ in model.named_modules()], after=record):
        return calls, model(*batch.args, **batch.kwargs)
