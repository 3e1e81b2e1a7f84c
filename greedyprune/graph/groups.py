"""What can be selected, read off torch.export's graph.

From each producer (a linear layer or a convolution) forward through operations that keep the units
apart, until every path ends in a consumer (the same kinds) that contracts their dimension. Such a
group is closed: removing a unit means slicing the tensors that were met on the way. walk.py has the
operations.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from ..data.batches import Batch
from .propagate import (
    CONVOLUTIONS,
    IDENTITY,
    LINEAR,
    RESHAPING,
    Coarser,
    Joined,
    Layer,
    NotPrunableError,
    Slice,
    Walk,
    operation,
    shape_of,
)

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Group:
    """Units that are removed together.

    producer:  the first layer whose output they are; producers: all of them
    consumers: the layers that contract them
    slices:    the parameters and buffers with entries of the units, and where
    output:    the only consumer's output is the model's output
    sized:     an operation on the way that may have the number of units written into it
    products:  matrix products of each unit by itself (attention's), and the FLOPs of all
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    units: int
    slices: Mapping[str, Slice]
    output: bool
    not_output: str = ""  # what stands between the consumer and the model's output
    sized: str = ""
    products: Mapping[str, int] = field(default_factory=dict)

    @property
    def producer(self) -> str:
        return self.producers[0]

    @property
    def consumer(self) -> str:
        return self.consumers[0]


class Graph:
    """The exported graph of a model on one batch of example inputs."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(getattr(model, "config", None), "use_cache", False):  # no tensor comes of it
            kwargs = {"use_cache": False} | kwargs
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)  # it prints whole graphs where it fails
        try:
            program = torch.export.export(model, args, kwargs, strict=False)
        finally:
            logging.disable(before)
        signature = program.graph_signature
        self.program, self.kwargs = program, kwargs
        self._model = model
        self.nodes = list(program.graph.nodes)
        self._place = {node: i for i, node in enumerate(self.nodes)}
        self.tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.layers = {n: layer for n in self.nodes if (layer := self._layer(n)) is not None}

    def producers(self) -> Iterator[tuple[str, fx.Node]]:
        """The layers whose weights are a module's own, in the order in which they run."""
        for node, layer in self.layers.items():
            yield layer.name, node

    def group(self, name: str, node: fx.Node) -> Group:
        """The group that `node`'s units belong to; NotPrunableError where they can't be removed."""
        if self.layers[node].groups > 1:
            raise NotPrunableError(
                f"layer {name!r}: a grouped convolution, whose units are those of its input"
            )
        axis = self.layers[node].axis
        return self._found(name, shape_of(node)[axis], {node: Slice(axis)})

    def _found(self, name: str, units: int, producers: dict[fx.Node, Slice]) -> Group:
        """Walks, and again with coarser units or more producers where the walk asks for them."""
        walk = Walk(name, units, dict(producers), self.layers, self.tensors)
        try:
            self._walk(walk, producers)
        except Joined as joined:
            size = next(shape_of(each)[self.layers[each].axis] for each in joined.producers)
            common = math.gcd(size, units)
            if common == 1:
                raise walk.refuse(f"its {units} units meet {size} of another layer") from None
            here = _coarser(producers, (1, common, units // common))
            for each in joined.producers:
                axis = self.layers[each].axis
                if shape_of(each)[axis] != size or self.layers[each].groups > 1:
                    raise walk.refuse("its units meet those of unlike layers") from None
                here[each] = Slice(axis, 1, size // common)
            return self._found(name, common, here)
        except Coarser as coarser:
            reason = walk.refuse("all of its units are mixed with one another")
            for way in coarser.ways:
                try:
                    return self._found(name, way[1], _coarser(producers, way))
                except NotPrunableError as error:
                    reason = error
            raise reason from None
        return self._closed(walk, sorted(producers, key=self._place.__getitem__))

    def _walk(self, walk: Walk, producers: Mapping[fx.Node, Slice]) -> None:
        for node, at in producers.items():
            layer = self.layers[node]
            walk.slice(layer.weight, Slice(layer.out_dim, at.outer, at.inner))
            if layer.bias is not None:
                walk.slice(layer.bias, Slice(0, at.outer, at.inner))
            uses = [each for each in self.layers.values() if each.name == layer.name]
            if len(uses) > 1:
                raise NotPrunableError(
                    f"layer {layer.name!r}: its weights are used {len(uses)} times"
                )
        first = min(self._place[node] for node in producers)
        for node in self.nodes[first + 1 :]:
            if node in producers:
                if any(source in walk.carrying for source in node.all_input_nodes):
                    raise walk.refuse(f"its units are inputs of {self.layers[node].name!r}, too")
            elif any(source in walk.carrying for source in node.all_input_nodes):
                walk.step(node)

    def _closed(self, walk: Walk, producers: list[fx.Node]) -> Group:
        if not walk.consumers:
            raise walk.refuse("nothing uses its units")
        names = [self.layers[consumer].name for consumer in walk.consumers]
        if len(set(names)) < len(names):
            raise walk.refuse(f"its units feed {sorted(set(names))[0]!r} more than once")
        self._check_untied(walk, set(producers))
        between = "more than one layer takes its units, which"
        if len(walk.consumers) == 1:
            between = self._between_and_output(walk.consumers[0])
        return Group(
            tuple(self.layers[node].name for node in producers), tuple(names), walk.units,
            walk.slices, between == "", between, walk.sized, walk.products,
        )  # fmt: skip

    def _check_untied(self, walk: Walk, producers: set[fx.Node]) -> None:
        """What is sliced must not be used elsewhere."""
        inside = set(walk.carrying) | set(walk.consumers) | producers
        owners: dict[int, list[str]] = {}
        for tensor, value in self._model.state_dict(keep_vars=True).items():
            owners.setdefault(id(value), []).append(tensor)
        shared = {tensor for names in owners.values() if len(names) > 1 for tensor in names}
        for node in self.nodes:
            tensor = self.tensors.get(node.name, "")
            if tensor in walk.slices and (tensor in shared or not inside.issuperset(node.users)):
                raise walk.refuse(f"{tensor!r} is shared with another layer")

    def _layer(self, node: fx.Node) -> Layer | None:
        """The layer whose weights a node uses, if it is a module's own."""
        if node.op != "call_function" or operation(node) not in LINEAR | CONVOLUTIONS:
            return None
        op = operation(node)
        weight, bias = (node.args[2], node.args[0]) if op == "addmm" else (
            node.args[1], node.args[2] if len(node.args) > 2 else None)  # fmt: skip
        tensor = self.tensors.get(weight.name) if isinstance(weight, fx.Node) else None
        if tensor is None or tensor.rpartition(".")[2] != "weight":
            return None
        name = tensor.rpartition(".")[0]
        module = self._model.get_submodule(name)
        of_bias = self.tensors.get(bias.name) if isinstance(bias, fx.Node) else None
        if bias is not None and of_bias is None:
            return None
        dims = len(shape_of(node))
        if op == "linear" and type(module) is nn.Linear:
            return Layer(name, tensor, of_bias, 0, 1, 1, dims - 1)
        if op == "addmm" and type(module).__name__ == "Conv1D":  # GPT-2's: the weight transposed
            return Layer(name, tensor, of_bias, 1, 0, 1, dims - 1)
        if (
            op in CONVOLUTIONS
            and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            and type(module) in LAYERS
        ):
            return Layer(name, tensor, of_bias, 0, 1, module.groups, dims - 1 - int(op[-2]))
        return None

    def _between_and_output(self, consumer: fx.Node) -> str:
        """The first operation between the consumer and the model's output; "" if there is none."""
        reached = {consumer}
        for node in self.nodes[self._place[consumer] + 1 :]:
            if not any(source in reached for source in node.all_input_nodes):
                continue
            if node.op == "output":
                return ""
            if operation(node) in (IDENTITY | RESHAPING):
                reached.add(node)
            elif node.users:
                return str(node.target)
        return "nothing that reaches the output"


def _coarser(producers: Mapping[fx.Node, Slice], way: tuple[int, int, int]) -> dict[fx.Node, Slice]:
    """Units so far = before * units * after: where the new units lie."""
    before, _, after = way
    return {
        each: Slice(at.dim, at.outer * before, at.inner * after) for each, at in producers.items()
    }


# What each model's structure allows, from the last call; kept with the model, weakly.
_KNOWN: WeakKeyDictionary[nn.Module, tuple[object, dict[str, Group | NotPrunableError]]]
_KNOWN = WeakKeyDictionary()


def analyse(
    model: nn.Module, batch: Batch, check: Callable[[nn.Module, Group, Batch], None] | None = None
) -> dict[str, Group | NotPrunableError]:
    """Every producer's group, or why it has none, in the order in which they run.

    check: raises NotPrunableError for a group that can't be cut all the same

    Raises whatever torch.export raises for a model that it can't trace. A second call on an
    unchanged model finds the answer kept.
    """
    signature = check, _signature(model, batch)
    known = _KNOWN.get(model)
    if known is not None and known[0] == signature:
        return known[1]
    graph = Graph(model, batch.args, batch.kwargs)
    found: dict[str, Group | NotPrunableError] = {}
    for name, node in graph.producers():
        if name in found:  # of the group of a layer before it
            continue
        try:
            group = graph.group(name, node)
            if check is not None and group.sized:
                check(model, group, batch)
            found |= dict.fromkeys((name, *group.producers), group)
        except NotPrunableError as error:
            found[name] = error.with_traceback(None)
    _KNOWN[model] = signature, found
    return found


def _signature(model: nn.Module, batch: Batch) -> object:
    """What a trace depends on: modules, their plain attributes, shapes of tensors and inputs."""

    def plain(value: object) -> object:
        if isinstance(value, (bool, int, float, str, type(None))):
            return value
        if isinstance(value, Tensor):
            return tuple(value.shape), value.dtype
        if isinstance(value, (tuple, list)):
            return type(value), tuple(map(plain, value))
        if isinstance(value, dict):
            return tuple((str(key), plain(each)) for key, each in value.items())
        return id(value)

    modules = [
        (name, type(module), plain({k: v for k, v in vars(module).items() if k != "_modules"}))
        for name, module in model.named_modules()
    ]
    return modules, plain(batch.args), plain(batch.kwargs)


def find_groups(
    model: nn.Module, found: Mapping[str, Group | NotPrunableError], wanted: Sequence[str] | None
) -> list[Group]:
    """Of what `analyse` found, the groups of the wanted producers, or of all that have one.

    Raises NotPrunableError for a wanted layer that can't be pruned, or where no layer can.
    """
    if wanted is None:
        groups = [
            group for name, group in found.items()
            if isinstance(group, Group) and name == group.producer
        ]  # fmt: skip
        if not groups:
            reasons = [str(reason) for reason in found.values()]
            reasons += [
                f"layer {name!r}: {why_not(module)}"
                for name, module in model.named_modules()
                if name not in found and isinstance(module, LAYERS)
            ]
            why = "; ".join(reasons) or "it has no Linear and no convolution"
            raise NotPrunableError(f"model: no layer can be pruned: {why}")
        return groups
    groups = []
    known = ", ".join(repr(n) for n, group in found.items() if isinstance(group, Group)) or "none"
    for name in wanted:
        group = found.get(name)
        if isinstance(group, Group):
            if group not in groups:
                groups.append(group)
        elif group is not None:
            raise NotPrunableError(
                f"layers: found {name!r}, which can't be pruned ({group}), expected any of: {known}"
            )
        else:
            module = dict(model.named_modules()).get(name)
            why = "no such module" if module is None else why_not(module)
            raise ValueError(f"layers: found {name!r} ({why}), expected any of: {known}")
    return groups


def why_not(module: nn.Module) -> str:
    """Why a module is no producer."""
    kind = type(module).__name__
    if not isinstance(module, LAYERS):
        return f"{kind}: no Linear or convolution"
    if "weight" not in module._parameters:
        return f"{kind}: its weight is computed, by a parametrization or torch.nn.utils.prune"
    return (
        f"{kind}: it does not run, or shares its weight"
        if type(module) in LAYERS
        else f"{kind}: no plain Linear or convolution"
    )


def named_group(model: nn.Module, producer: str, consumer: str, batch: Batch) -> Group:
    """The group of a producer and a consumer named by hand, for models that can't be traced.

    One forward pass tells which modules run between the two and whether the consumer's output is
    the model's.
    """
    modules = dict(model.named_modules())
    for name in (producer, consumer):
        if type(modules.get(name)) is not nn.Linear:
            raise ValueError(
                f"layers: found {name!r} ({module_kind(model, name)}), "
                "expected the name of an nn.Linear"
            )
    first, last = modules[producer], modules[consumer]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    units = first.out_features
    if units != last.in_features:
        raise ValueError(
            f"layers: {producer!r} has {units} output units, but {consumer!r} takes "
            f"{last.in_features} inputs"
        )
    ran: list[tuple[str, object]] = []
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: ran.append((name, out)))
        for name, module in modules.items()
    ]
    try:
        outputs = model(*batch.args, **batch.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _ in ran]
    if names.count(producer) != 1 or names.count(consumer) != 1:
        raise ValueError(
            f"layers: {producer!r} ran {names.count(producer)} and {consumer!r} "
            f"{names.count(consumer)} times in one forward pass, expected once each"
        )
    slices = {f"{consumer}.weight": Slice(1)}
    for name in [producer, *names[names.index(producer) + 1 : names.index(consumer)]]:
        module = modules[name]
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        sized = {key: t for key, t in own if t.dim() and len(t) == units}
        if name != producer and sized and not isinstance(module, (nn.BatchNorm1d, nn.PReLU)):
            raise NotPrunableError(
                f"layer {producer!r}: {name!r} ({type(module).__name__}) stands between its units "
                f"and {consumer!r}"
            )
        slices |= {f"{name}.{key}": Slice(0) for key in sized}
    last_out = ran[names.index(consumer)][1]
    output = (
        isinstance(outputs, Tensor)
        and isinstance(last_out, Tensor)
        and torch.equal(outputs.flatten(), last_out.flatten())
    )
    between = "" if output else "something that was not traced"
    return Group((producer,), (consumer,), units, slices, output, between)


def module_kind(model: nn.Module, name: str) -> str:
    module = dict(model.named_modules()).get(name)
    return "no such module" if module is None else type(module).__name__
